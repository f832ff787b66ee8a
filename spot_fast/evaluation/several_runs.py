"""What several runs have in common: validation images, and settings but for the seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spot_fast.config import Config
from spot_fast.data import open_set
from spot_fast.data.base import ImageSet
from spot_fast.evaluation.scoring import Evaluation, Table


@dataclass(frozen=True)
class ScoredRun:
    """A run by name, with its settings and scores."""

    name: str
    config: Config
    evaluation: Evaluation


def open_val_set(config: Config, data: str | None, opened: dict[str, ImageSet]) -> ImageSet:
    """A run's validation images, of folder `data` if given; `opened` keeps them for runs on the same images."""
    config = replace(config, data=data) if data else config
    keys = ("preset", "data", "val_images", "image_size", "mask_size", "crop")
    key = json.dumps([getattr(config, name) for name in keys])
    if key not in opened:
        opened[key] = open_set(config, "val")
    return opened[key]


def seed_groups(configs: Sequence[Config]) -> list[list[int]]:
    """Indices of runs that differ only in their seed, two or more each."""
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(replace(config, seed=0).to_json(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def tables_by_protocol(runs: Sequence[ScoredRun]) -> list[tuple[Table, ...]]:
    """For each protocol the tables of all runs."""
    return list(zip(*(run.evaluation.tables for run in runs), strict=True))
