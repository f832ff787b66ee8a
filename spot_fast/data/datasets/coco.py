"""COCO 2017 as it is distributed: annotations/instances_*.json beside the image folders.

annotations/panoptic_val2017.json and panoptic_val2017/ are read where they are there and panoptic scores are asked for.

Classes are numbered from 1 by position in the list of categories: COCO's 80, or those of another set in its layout.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spot_fast.data.base import FullLabels, ImageFiles, Masks
from spot_fast.data.listing.names import located
from spot_fast.data.masks.instances import Instances, read_images
from spot_fast.data.masks.panoptic import Panoptic
from spot_fast.errors import UserError

# COCO's 80 things: ids run to 90 with ten numbers left out.
_LEFT_OUT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CLASS_OF_CATEGORY = {
    category: number for number, category in enumerate((i for i in range(1, 91) if i not in _LEFT_OUT), start=1)
}
EXPECTED = (
    "annotations/instances_train2017.json and train2017/ to train, annotations/instances_val2017.json and "
    "val2017/ to evaluate"
)


class Coco(ImageFiles):
    """One split ("train" or "val") of COCO under `root`; the image folders may also lie in `root`/images.

    Images are in the order of the annotation file, at most `limit` of them (0 = all). Only "val" has masks. Training
    takes images as stored, evaluation in the orientation of the annotated size. geometry: options of ImageFiles.
    """

    has_classes = True

    def __init__(self, root: str | Path, split: str, *, limit: int = 0, **geometry: Any) -> None:
        self.name = f"COCO {split}2017"
        self.has_masks = split == "val"
        self.annotation_file = Path(root) / "annotations" / f"instances_{split}2017.json"
        folder = _image_folder(Path(root), f"{split}2017")
        needs = f"COCO needs {EXPECTED}"
        if self.has_masks:
            self.instances = Instances(self.annotation_file, class_of=CLASS_OF_CATEGORY, needs=needs)
            images, self.notes = self.instances.images, self.instances.notes
        else:
            images = read_images(self.annotation_file, needs=needs)
        self.listed = images[:limit] if limit else images
        if not self.listed:
            raise UserError(f"{self.annotation_file} lists no images")
        self.image_ids = [image.id for image in self.listed]
        paths = [located(folder / image.file_name) for image in self.listed]
        super().__init__(paths, **geometry)

    def full_masks(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(instances, classes, ignore), each int32 [height, width] at the size of the image."""
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on COCO val2017")
        self.fitting(index, self.drawn_size(index), self.instances.path)
        return self.instances.label_maps(self.listed[index])

    def val_masks(self, index: int) -> Masks:
        return Masks(*(self.square_labels(labels) for labels in self.full_masks(index)))

    def full_labels(self, index: int, *, crowd: bool) -> FullLabels:
        """For protocols other than SPOT's. crowd: draw crowd regions as instances, or not at all."""
        self.fitting(index, self.drawn_size(index), self.instances.path)
        return self.instances.full_labels(self.listed[index], crowd=crowd)

    @property
    def has_panoptic(self) -> bool:
        return self.has_masks and self._panoptic is not None

    @cached_property
    def _panoptic(self) -> Panoptic | None:
        path = self.annotation_file.with_name(self.annotation_file.name.replace("instances", "panoptic"))
        if not path.is_file():
            return None
        root = path.parent.parent
        for folder in (path.with_suffix(""), root / path.stem, root / "images" / path.stem):
            if folder.is_dir():
                found = Panoptic(path, folder)
                if lacking := sum(found.file(number) is None for number in self.image_ids):
                    self.notes = [*self.notes, f"{lacking} of {len(self)} images are not in {path.name}"]
                return found
        self.notes = [
            *self.notes,
            f"{path} is not used: there is no {path.stem}/ with its PNGs, unpack {path.stem}.zip",
        ]
        return None

    def panoptic_segments(self, index: int) -> np.ndarray:
        image = self.listed[index]
        segments = self._panoptic.segments(image.id) if self.has_panoptic else super().panoptic_segments(index)
        if segments is None:  # the list lacks the image
            return np.zeros(self.drawn_size(index)[::-1], np.int32)
        self.fitting(index, segments.shape[::-1], self._panoptic.file(image.id))
        return segments

    def drawn_size(self, index: int) -> tuple[int, int] | None:
        return self.instances.size(self.listed[index]) if self.has_masks else None

    def upright_alike(self, index: int) -> bool:
        return self.listed[index].drawn_upright

    def label(self, index: int) -> str:
        return self.listed[index].file_name


def recognises(path: Path) -> bool:
    """Whether `path` has an annotation file or an image folder of COCO 2017."""
    return any(
        (path / "annotations" / f"instances_{split}2017.json").is_file()
        or any((path / inside / f"{split}2017").is_dir() for inside in ("", "images"))
        for split in ("train", "val")
    )


def remarks(images: Coco) -> list[str]:
    if not images.has_masks or images.instances.class_of is CLASS_OF_CATEGORY:
        return []
    count = len(images.instances.class_of)
    return [f"its {count} categories are its own, not COCO's: classes are their positions in its list"]


def _image_folder(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: COCO needs one with {EXPECTED}")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"--data {root} has neither {name}/ nor images/{name}/: COCO needs {EXPECTED}")
