"""What a report knows of runs: their settings and logs, how they score, and the images it shows of a set."""

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
from spot_fast.reporting.introspection import Gradients, Look

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
    """The log of the run in `folder`, empty where there is none. Lines that make no sense are left out."""
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
    """The number called `name` of each line; None where there is none."""
    found = (line.get(name) for line in lines)
    return [v if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) else None for v in found]


def state_metadata(folder: Path) -> dict[str, str]:
    """What the training state says about how it was trained (seconds, threads, device); empty without one."""
    try:
        return read_metadata(folder / STATE)
    except UserError:
        return {}


@dataclass
class RunRecord:
    """A run of the report. name: its folder's. state: see `state_metadata`. evaluation: None where its validation
    images have no masks. gradients: None where they were not asked for, or are another run's of the same settings."""

    name: str
    run: Run
    log: Log
    state: dict[str, str]
    evaluation: Evaluation | None = None
    gradients: Gradients | None = None

    @property
    def pace(self) -> float | None:
        """Training images a second, the median over the lines of the log."""
        known = [v for v in values_of(self.log.train or self.log.epoch, "images_per_s") if v]
        return statistics.median(known) if known else None


@dataclass
class SetRecord:
    """A validation set with the places, in the report's list, of the runs on it. alike: places of runs that differ in
    their seed only, two or more each. images: what is shown, with a Look of each run; None: cannot be read."""

    image_set: ImageSet
    places: list[int]
    alike: list[list[int]] = field(default_factory=list)
    images: list[ImageRecord] = field(default_factory=list)

    @property
    def kinds(self) -> list[int]:
        """The first run of each kind: of those that differ in their seed only, one."""
        later = {place for group in self.alike for place in group[1:]}
        return [place for place in self.places if place not in later]


@dataclass
class ImageRecord:
    """A chosen image: uint8 [3, S, S], masks where there are any, and a Look for each of the set's runs."""

    chosen: Chosen
    pixels: Tensor
    truth: Masks | None
    looks: list[Look]


@dataclass
class Report:
    """Everything that the page says. settings: seed and precision of what was measured. about: date, versions,
    device. data, limit: as on the command line."""

    command: str
    runs: list[RunRecord]
    sets: list[SetRecord]
    settings: dict[str, str]
    about: dict[str, str]
    data: str | None = None
    limit: int = 0


@dataclass(frozen=True)
class Chosen:
    """An image of the gallery: why it is in there (one of CHOICES), its index in the set, its name, and its mBO_i (a
    fraction, mean over the runs), None without masks."""

    why: str
    index: int
    label: str
    score: float | None


def image_scores(evaluation: Evaluation) -> Tensor:
    """mBO_i of each image, NaN where it is not counted: decoder masks of as many patch orders as there are."""
    decoder = [row for row in evaluation.table("spot").rows if row.masks == "decoder"]
    return decoder[-1].per_image["mbo_i"]


def choose_images(
    image_set: ImageSet, evaluations: Sequence[Evaluation], *, each: int, seed: int, limit: int = 0
) -> list[Chosen]:
    """`each` best, median, worst and random images by the mean of their mBO_i over `evaluations` of `image_set`.

    No image is chosen twice, so of a small set there are fewer. Without evaluations random ones alone; limit: of the
    first so many images, 0 = all.
    """
    count = min(len(image_set), limit or len(image_set))
    draws = generator(Stream.GALLERY, seed)
    if not evaluations:
        drawn = sorted(draws.choice(count, min(2 * each, count), replace=False).tolist())
        return [Chosen("random", index, image_set.label(index), None) for index in drawn]
    indices = evaluations[0].indices
    scores = torch.stack([image_scores(e) for e in evaluations]).mean(0)
    counted = [place for place, score in enumerate(scores.tolist()) if not math.isnan(score)]
    ranked = sorted(counted, key=lambda place: (-scores[place].item(), place))
    each = min(each, max(1, len(ranked) // len(CHOICES)))
    middle = max(0, (len(ranked) - each) // 2)
    places = {"best": ranked[:each], "median": ranked[middle : middle + each], "worst": ranked[::-1][:each]}
    rest = [place for place in counted if not any(place in some for some in places.values())]
    places["random"] = sorted(draws.choice(rest, min(each, len(rest)), replace=False).tolist()) if rest else []
    seen: set[int] = set()
    chosen = []
    for why in CHOICES:
        for place in places[why]:
            if place not in seen:
                seen.add(place)
                index = indices[place]
                chosen.append(Chosen(why, index, image_set.label(index), scores[place].item()))
    return chosen
