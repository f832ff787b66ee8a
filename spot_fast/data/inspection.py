"""The inspections of `data check`: files are read at both ends, or decoded whole on request (`decoding.damage`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from spot_fast.data.base import ImageFiles, ImageSet
from spot_fast.data.decoding.damage import file_damage
from spot_fast.data.listing.search import counted
from spot_fast.data.loading.loader import MAX_CORRUPT
from spot_fast.errors import UserError

# Inspects one image or clip and returns (file, reason) of all that is wrong.
Inspection = Callable[[], list[tuple[str, str]]]


@dataclass
class Split:
    """One split of a data set. trouble: why it cannot be opened; unit: what an inspection inspects."""

    name: str
    summary: str = ""
    inspections: list[Inspection] = field(default_factory=list)
    trouble: str = ""
    unit: str = "images"
    images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    bad_inspections: int = 0

    @property
    def usable(self) -> bool:
        """Whether it opens, with no more damage than the loader tolerates."""
        return not self.trouble and self.bad_inspections <= max(1.0, MAX_CORRUPT * len(self.inspections))


@dataclass
class CheckResult:
    """A recognised data set: its title, preset and splits, and notes that stop nothing."""

    title: str
    preset: str
    splits: list[Split]
    notes: list[str]


def summary(image_set: ImageSet) -> str:
    """Numbers in words, such as "2 images, 4 mask files"."""
    images = counted(len(image_set), "image")
    if not image_set.has_masks:
        return images
    if instances := getattr(image_set, "instances", None):
        return f"{images}, {counted(sum(map(instances.count, image_set.listed)), 'annotation')}"
    files = sum(len(image_set.mask_files(index)) for index in range(len(image_set)))
    return f"{images}, {counted(files, 'mask file') if files else 'masks'}"


def of_sets(
    title: str,
    preset: str,
    open_split: Callable[[str], ImageSet],
    decode: bool,
    *,
    summary: Callable[[ImageSet], str] = summary,
    remarks: Callable[[ImageSet], list[str]] = lambda image_set: [],
) -> CheckResult:
    """The data set whose splits "train" and "val" `open_split` opens; its UserError becomes the split's trouble."""
    result = CheckResult(title, preset, [], [])
    seen: set[Path] = set()
    for split in ("train", "val"):
        try:
            image_set = open_split(split)
        except UserError as error:
            result.splits.append(Split(split, trouble=str(error)))
            continue
        if split == "val" and not image_set.has_masks:
            result.notes.append("no masks: it trains and segments, but cannot be evaluated")
        paths = image_set.paths if isinstance(image_set, ImageFiles) else [None] * len(image_set)
        inspections = [
            # An image of both splits is inspected once.
            partial(_inspect, image_set, index, path is None or path not in seen, decode)
            for index, path in enumerate(paths)
        ]
        seen.update(paths)
        notes = (*remarks(image_set), *image_set.notes)
        result.notes += [note for note in notes if note not in result.notes]
        result.splits.append(Split(split, summary(image_set), inspections, images=len(image_set)))
    return result


def _inspect(image_set: ImageSet, index: int, image: bool, decode: bool) -> list[tuple[str, str]]:
    """Inspects the masks of an image, and with `image` the image itself."""
    if isinstance(image_set, ImageFiles):
        name = str(image_set.paths[index])
        reason = file_damage(image_set.paths[index], decode=decode) if image else None
    else:
        name, reason = image_set.label(index), _damage_by_reading(image_set, index) if image and decode else None
    bad = [(name, reason)] if reason else []
    if not image_set.has_masks or reason == "missing":
        return bad
    try:
        masks = [(str(file), reason) for file in image_set.mask_files(index) if (reason := file_damage(file))]
        if decode and not bad and not masks:
            image_set.val_masks(index)
    except UserError as error:
        masks = [(name, str(error))]
    return bad + masks


def _damage_by_reading(image_set: ImageSet, index: int) -> str | None:
    try:
        image_set.prepared(index)
        return None
    except UserError as error:
        return str(error)
