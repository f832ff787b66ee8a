"""COCO instances files: images, and their objects as polygons or run lengths.

Label maps follow the published protocol (SPOT, section 7). An image's annotations are numbered from 1 in the order of
the file. Where instances overlap the earlier one has the pixel, and a pixel of more than one instance is ignored by
every metric. Crowd regions are instances like any other. An annotation of an unknown category draws nothing and covers
nothing, but uses up its number.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .base import FullLabels

_MAX_SIDE = 1 << 16  # pixels; no image format that is read here has more


@dataclass(frozen=True)
class Listed:
    """An image as the file lists it; sizes in pixels."""

    id: Any
    file_name: str
    height: int
    width: int


class Instances:
    """Images and annotations of `path`; UserError where it is not such a file.

    class_of: category id → class from 1. Without it, or where the file lists a category that it lacks, the file's own
    categories are numbered from 1 in their order; where the file has none either, `class_of` stays None, every
    annotation counts and the class of all is 1.
    needs: what belongs there, for the message where the file is missing.
    """

    def __init__(self, path: Path, *, class_of: Mapping[Any, int] | None = None, needs: str = "") -> None:
        self.path = path
        content = _parsed(path, _read_text(path, needs))
        self.images = _listed(path, _list(content, "images", path))
        annotations = _list(content, "annotations", path)
        try:
            listed = [category["id"] for category in content.get("categories") or ()]
            if listed and (class_of is None or not set(listed) <= class_of.keys()):
                class_of = {category: place for place, category in enumerate(listed, start=1)}
            self.class_of = class_of
            self._annotations = defaultdict(list)
            for annotation in annotations:
                self._annotations[annotation["image_id"]].append(annotation)
        except (KeyError, TypeError) as error:
            raise _misfit(path, error) from None

    def count(self, image: Listed) -> int:
        """How many annotations the image has."""
        return len(self._annotations.get(image.id, ()))

    def label_maps(self, image: Listed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(instances, classes, ignore), each int32 [height, width] at the size of the image."""
        instances, classes, covered = _draw(self._objects(image), image)
        return instances, classes, (covered > 1).astype(np.int32)

    def full_labels(self, image: Listed, *, crowd: bool) -> FullLabels:
        """The same for other protocols than SPOT's; crowd: whether crowd regions are instances or nothing."""
        objects = self._objects(image, crowd=crowd)
        instances, classes, covered = _draw(objects, image)
        top_classes = classes.copy()
        if (covered > 1).any():
            for of_class, mask in sorted(((of_class, mask) for _, of_class, mask in objects), key=lambda pair: pair[0]):
                np.copyto(top_classes, of_class, where=mask)
        return FullLabels(instances, classes, top_classes, covered > 1, np.zeros(covered.shape, bool))

    def _objects(self, image: Listed, *, crowd: bool = True) -> list[tuple[int, int, np.ndarray]]:
        """Number, class and mask (bool [height, width]) of each annotation of a known category, in their order."""
        objects = []
        annotations = self._annotations.get(image.id, ())
        if not crowd:
            annotations = [a for a in annotations if not (isinstance(a, dict) and a.get("iscrowd"))]
        for number, annotation in enumerate(annotations, start=1):
            try:
                of_class = 1 if self.class_of is None else self.class_of.get(annotation["category_id"])
                if of_class is not None:
                    mask = decode_segmentation(annotation["segmentation"], image.height, image.width)
                    objects.append((number, of_class, mask))
            except Exception as error:  # noqa: BLE001 - pycocotools raises bare Exception on a malformed region
                name = annotation.get("id", number) if isinstance(annotation, dict) else number
                raise UserError(f"{self.path}: annotation {name} of image {image.file_name} cannot be decoded: "
                                f"{type(error).__name__} {error}") from None
        return objects


def _draw(objects: list[tuple[int, int, np.ndarray]], image: Listed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instances, classes and how many objects cover each pixel, each int32 [height, width]."""
    instances, classes, covered = np.zeros((3, image.height, image.width), np.int32)
    # From the last to the first, so that the earlier one has the pixel.
    for number, of_class, mask in reversed(objects):
        np.copyto(instances, number, where=mask)
        np.copyto(classes, of_class, where=mask)
        covered += mask
    return instances, classes, covered


def read_images(path: Path, *, needs: str = "") -> list[Listed]:
    """The list under "images" alone: training needs nothing else of COCO's 450 MB.

    Quotes inside a JSON string are escaped, so the pattern can only match a key.
    """
    text = _read_text(path, needs)
    found = re.search(r'"images"\s*:\s*(?=\[)', text)
    if not found:
        raise UserError(f'{path} is not a COCO instances file: it has no list "images"')
    return _listed(path, _parsed(path, text, found.end()))


def is_instances_file(path: Path) -> bool:
    """Whether the text has the two lists of a COCO file, and segmentations; it may still be damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return all(re.search(key, text) for key in (r'"images"\s*:\s*\[', r'"annotations"\s*:\s*\[', r'"segmentation"\s*:'))


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


def _read_text(path: Path, needs: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing" + (f": {needs}" if needs else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _parsed(path: Path, text: str, start: int = 0) -> Any:
    """The JSON value that begins at `start`: all of the text, or from there on as far as it goes."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[0] if start else json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not complete JSON ({error}): download it again") from None


def _list(content: Any, key: str, path: Path) -> list:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f'{path} is not a COCO instances file: it has no list "{key}"')
    return content[key]


def _listed(path: Path, images: list) -> list[Listed]:
    try:
        listed = [Listed(image["id"], image["file_name"], int(image["height"]), int(image["width"]))
                  for image in images]  # fmt: skip
        for image in listed:
            hash(image.id)
            if not isinstance(image.file_name, str) or not 0 < min(image.height, image.width) <= _MAX_SIDE >= max(
                    image.height, image.width):  # fmt: skip
                raise ValueError(f"{image.file_name!r}, {image.width} x {image.height}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _misfit(path, error) from None
    return listed


def _misfit(path: Path, error: Exception) -> UserError:
    trouble = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit ({error})"
    return UserError(f"{path} is not a COCO instances file: an entry {trouble}")
