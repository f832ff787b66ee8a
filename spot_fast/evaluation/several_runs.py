"""Scored runs side by side: which differ only in their seed, and their tables by protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spot_fast.config import Config
from spot_fast.evaluation.scoring import Evaluation, Table


@dataclass(frozen=True)
class ScoredRun:
    """A run by name, with its settings and scores."""

    name: str
    config: Config
    evaluation: Evaluation


def seed_groups(configs: Sequence[Config]) -> list[list[int]]:
    """Indices of runs that differ only in their seed, two or more each."""
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(replace(config, seed=0).to_json(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def tables_by_protocol(runs: Sequence[ScoredRun]) -> list[tuple[Table, ...]]:
    """For each protocol the tables of all runs."""
    return list(zip(*(run.evaluation.tables for run in runs), strict=True))
