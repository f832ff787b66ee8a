"""COCO 2017 as it is distributed: annotations/instances_*.json beside the image folders.

Label maps follow the published protocol (SPOT, section 7). An image's annotations are numbered from 1 in the order of
the file. Where instances overlap the earlier one has the pixel, and a pixel of more than one instance is ignored by
every metric. Crowd regions are instances like any other. An annotation of an unknown category draws nothing and covers
nothing, but uses up its number. A class is the place of its category in the list of COCO's ids, from 1 to 80.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FullLabels, ImageFiles, Masks

# COCO's 80 things: ids run to 90 with ten numbers left out.
_LEFT_OUT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CLASS_OF_CATEGORY = {
    category: place for place, category in enumerate((i for i in range(1, 91) if i not in _LEFT_OUT), start=1)
}
EXPECTED = "annotations/instances_train2017.json and train2017/ to train, annotations/instances_val2017.json and " \
           "val2017/ to evaluate"


class Coco(ImageFiles):
    """One split ("train" or "val") of COCO under `root`; the image folders may also lie in `root`/images.

    Pictures are in the order of the annotation file, at most `limit` of them (0 = all). Only "val" has masks.
    """

    has_classes = True

    def __init__(self, root: str | Path, split: str, *, image_size: int = 224, mask_size: int = 320,
                 crop: str = "center", flip: bool = False, limit: int = 0) -> None:
        self.name = f"COCO {split}2017"
        self.has_masks = split == "val"
        self.annotation_file = Path(root) / "annotations" / f"instances_{split}2017.json"
        folder = _image_folder(Path(root), f"{split}2017")
        if self.has_masks:
            content = _read_json(self.annotation_file)
            images, annotations = _list(content, "images", self.annotation_file), _list(
                content, "annotations", self.annotation_file)
        else:
            images, annotations = _read_images(self.annotation_file), []
        images = images[:limit] if limit else images
        if not images:
            raise UserError(f"{self.annotation_file} lists no images")
        try:
            self.image_ids = [image["id"] for image in images]
            self.sizes = [(image["height"], image["width"]) for image in images]
            paths = [folder / image["file_name"] for image in images]
            self._annotations = defaultdict(list)
            for annotation in annotations:
                self._annotations[annotation["image_id"]].append(annotation)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.annotation_file} is not a COCO instances file: an entry lacks {error}") from None
        super().__init__(paths, image_size=image_size, mask_size=mask_size, crop=crop, flip=flip)

    def full_masks(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(instances, classes, ignore), each int32 [height, width] at the size of the image."""
        height, width = self.sizes[index]
        instances, classes = np.zeros((2, height, width), np.int32)
        covered = np.zeros((height, width), np.int32)
        for number, annotation in enumerate(self._annotations[self.image_ids[index]], start=1):
            try:
                of_class = CLASS_OF_CATEGORY.get(annotation["category_id"])
                if of_class is None:
                    continue
                mask = decode_segmentation(annotation["segmentation"], height, width)
            except Exception as error:  # noqa: BLE001 - pycocotools raises bare Exception on a malformed region
                raise UserError(f"{self.annotation_file}: annotation {annotation.get('id', number)} of image "
                                f"{self.label(index)} cannot be decoded: {type(error).__name__} {error}") from None
            free = mask & (covered == 0)
            instances[free] = number
            classes[free] = of_class
            covered += mask
        return instances, classes, (covered > 1).astype(np.int32)

    def val_masks(self, index: int) -> Masks:
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on COCO val2017")
        return Masks(*(self.square_labels(labels) for labels in self.full_masks(index)))

    def full_labels(self, index: int, *, crowd: bool) -> FullLabels:
        """As `full_masks`, for other protocols than SPOT's; crowd: whether crowd regions are instances or nothing."""
        if crowd:
            annotations = self._annotations[self.image_ids[index]]
        else:
            annotations = [a for a in self._annotations[self.image_ids[index]] if not a.get("iscrowd")]
        picked = copy.copy(self)
        picked._annotations = {self.image_ids[index]: annotations}
        instances, classes, covered = picked.full_masks(index)
        top_classes = classes.copy()
        if covered.any():
            height, width = self.sizes[index]
            for annotation in annotations:
                of_class = CLASS_OF_CATEGORY.get(annotation["category_id"], 0)
                mask = decode_segmentation(annotation["segmentation"], height, width)
                top_classes[mask] = np.maximum(top_classes[mask], of_class)
        return FullLabels(instances, classes, top_classes, covered > 0, np.zeros(covered.shape, bool))


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """bool [height, width] of a COCO region: polygons, uncompressed RLE (a list of counts) or compressed RLE."""
    from pycocotools import mask as rle  # here, so that training and other data sets do without

    if not segmentation:
        return np.zeros((height, width), bool)
    if isinstance(segmentation, list):
        region = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        region = rle.frPyObjects(segmentation, height, width)
    else:
        region = segmentation
    mask = rle.decode(region)
    if mask.shape != (height, width):
        raise ValueError(f"the region is {mask.shape[1]} x {mask.shape[0]}, the image {width} x {height}")
    return mask.astype(bool)


def _image_folder(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: COCO needs one with {EXPECTED}")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"--data {root} has neither {name}/ nor images/{name}/: COCO needs {EXPECTED}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: COCO needs {EXPECTED}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not complete JSON ({error}): download it again") from None


def _read_images(path: Path) -> list[dict]:
    """The list under "images" alone: training needs nothing else of the 450 MB file.

    Quotes inside a JSON string are escaped, so the pattern can only match a key.
    """
    text = _read_text(path)
    found = re.search(r'"images"\s*:\s*(?=\[)', text)
    if not found:
        raise UserError(f'{path} is not a COCO instances file: it has no list "images"')
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not complete JSON ({error}): download it again") from None


def _list(content: dict, key: str, path: Path) -> list:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f'{path} is not a COCO instances file: it has no list "{key}"')
    return content[key]
