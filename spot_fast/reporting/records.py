"""The data of a report: runs with their settings, logs and scores, and the images that it shows of a set."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import METRICS, STATE, Run, read_metadata
from spot_fast.data.base import ImageSet, Masks
from spot_fast.errors import UserError
from spot_fast.evaluation.scoring import Evaluation
from spot_fast.random_streams import Stream, generator
from spot_fast.reporting.introspection import Introspection, PatchGradients

CHOICES = ("best", "median", "worst", "random")


@dataclass(frozen=True)
class Log:
    """metrics.jsonl by kind of line, in the order of their steps; skipped: steps whose update was left out."""

    train: list[dict] = field(default_factory=list)
    epoch: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.train or self.epoch or self.validation)


def read_log(folder: Path) -> Log:
    """The log of the run in `folder`, empty where it is missing. Malformed lines are left out."""
    log = Log()
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return log
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if record.get("kind") == "skipped":
            steps = record.get("steps")
            log.skipped.extend(steps if isinstance(steps, list) else [])
        elif record.get("kind") in ("train", "epoch", "validation"):
            getattr(log, record["kind"]).append(record)
    return log


def values_of(lines: Sequence[dict], name: str) -> list[float | None]:
    """Entry `name` of each line; None where it is missing or no finite number."""
    values = (line.get(name) for line in lines)
    return [v if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) else None for v in values]


def state_metadata(folder: Path) -> dict[str, str]:
    """Metadata of the training state (seconds, threads, device); empty without one."""
    try:
        return read_metadata(folder / STATE)
    except UserError:
        return {}


@dataclass
class RunRecord:
    """A run of the report.

    name: its folder's. state: see `state_metadata`. evaluation: None where its validation images have no masks.
    gradients: None without --gradient-images, and for all but one of the runs that differ only in their seed.
    """

    name: str
    run: Run
    log: Log
    state: dict[str, str]
    evaluation: Evaluation | None = None
    gradients: PatchGradients | None = None

    @property
    def seconds(self) -> float | None:
        """Training time."""
        try:
            return float(self.state["seconds"])
        except (KeyError, ValueError):
            return None

    @property
    def pace(self) -> float | None:
        """Training images a second, the median over the lines of the log."""
        known = [v for v in values_of(self.log.train or self.log.epoch, "images_per_s") if v]
        return statistics.median(known) if known else None


@dataclass
class SetRecord:
    """A validation set and the runs on it.

    run_indices: of those runs in the report's list. seed_groups: indices of runs that differ only in their seed, two or
    more each. images: those that the report shows.
    """

    image_set: ImageSet
    run_indices: list[int]
    seed_groups: list[list[int]] = field(default_factory=list)
    images: list[ImageRecord] = field(default_factory=list)

    @property
    def distinct(self) -> list[int]:
        """Indices of the runs, but of those that differ only in their seed the first alone."""
        repeated = {index for group in self.seed_groups for index in group[1:]}
        return [index for index in self.run_indices if index not in repeated]


@dataclass
class ImageRecord:
    """An image to show: uint8 [3, S, S], masks where the set has them, and an Introspection for each of its runs."""

    choice: Choice
    pixels: Tensor
    truth: Masks | None
    introspections: list[Introspection] = field(default_factory=list)


@dataclass
class Report:
    """Everything on the page. settings: seed and precision of the measurements. about: date, versions, device. data,
    limit: as on the command line."""

    command: str
    runs: list[RunRecord]
    sets: list[SetRecord]
    settings: dict[str, str]
    about: dict[str, str]
    data: str | None = None
    limit: int = 0


@dataclass(frozen=True)
class Choice:
    """An image of the gallery: why it was chosen (one of CHOICES), its index in the set, its name, and its mBO_i (a
    fraction, mean over the runs), None without masks."""

    why: str
    index: int
    label: str
    score: float | None


def image_scores(evaluation: Evaluation) -> Tensor:
    """mBO_i of each image, NaN where it is not counted: decoder masks, averaged over all patch orders."""
    decoder = [row for row in evaluation.table("spot").rows if row.masks == "decoder"]
    return decoder[-1].per_image["mbo_i"]


def choose_images(
    image_set: ImageSet, evaluations: Sequence[Evaluation], *, each: int, seed: int, limit: int = 0
) -> list[Choice]:
    """`each` best, median, worst and random images by the mean of their mBO_i over `evaluations` of `image_set`.

    No image is chosen twice, so a small set gives fewer. Without evaluations all are random; limit: choose from the
    first so many images, 0 = all.
    """
    count = min(len(image_set), limit or len(image_set))
    draws = generator(Stream.GALLERY, seed)
    if not evaluations:
        drawn = sorted(draws.choice(count, min(2 * each, count), replace=False).tolist())
        return [Choice("random", index, image_set.label(index), None) for index in drawn]
    indices = evaluations[0].indices
    scores = torch.stack([image_scores(e) for e in evaluations]).mean(0)
    counted = [i for i, score in enumerate(scores.tolist()) if not math.isnan(score)]
    ranked = sorted(counted, key=lambda i: (-scores[i].item(), i))
    each = min(each, max(1, len(ranked) // len(CHOICES)))
    middle = max(0, (len(ranked) - each) // 2)
    ranks = {"best": ranked[:each], "median": ranked[middle : middle + each], "worst": ranked[::-1][:each]}
    rest = [i for i in counted if not any(i in some for some in ranks.values())]
    ranks["random"] = sorted(draws.choice(rest, min(each, len(rest)), replace=False).tolist()) if rest else []
    seen: set[int] = set()
    chosen = []
    for why in CHOICES:
        for i in ranks[why]:
            if i not in seen:
                seen.add(i)
                chosen.append(Choice(why, indices[i], image_set.label(indices[i]), scores[i].item()))
    return chosen
