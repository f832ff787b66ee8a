"""COCO instances files: images, and their objects as polygons or run lengths.

Label maps follow the published protocol (SPOT, section 7). An image's annotations are numbered from 1 in the order of
the file. Where instances overlap, the earlier one gets the pixel, which is void for every metric. Crowd regions are
instances like any other. An annotation of an unknown category draws nothing, but uses up its number.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spot_fast.data.listing.names import read_text
from spot_fast.data.masks.ground_truth import FullLabels
from spot_fast.data.masks.regions import decode_segmentation
from spot_fast.errors import UserError

_MAX_SIDE = 1 << 16  # pixels; no image format that is read here has more
_MOST_PIXELS = 179_000_000  # Pillow's limit for an image
_UNLISTED = object()


@dataclass(frozen=True)
class Listed:
    """An image as the file lists it; height and width in pixels, 0 if the file gives none that are possible."""

    id: Any
    file_name: str
    height: int
    width: int

    @property
    def drawn_upright(self) -> bool:
        """Whether masks that fit the image both as stored and upright are taken for drawn on the latter.

        COCO's own masks were drawn on the stored pixels; annotators of other photos see them upright.
        """
        return not (isinstance(self.id, int) and self.file_name.endswith(f"{self.id:012}.jpg"))


class Instances:
    """Images and annotations of `path`; UserError if it is no such file.

    class_of: category id → class from 1. Without it, or if the file lists other categories, the file's own are numbered
    from 1 in their order; if it has none, `class_of` stays None and every annotation has class 1. An id may be a number
    in one list and text in another.
    notes: lines about what is left out. needs: the folder's content, for the message if the file is missing.
    """

    def __init__(self, path: Path, *, class_of: Mapping[Any, int] | None = None, needs: str = "") -> None:
        self.path = path
        content = _parsed(path, _read_text(path, needs))
        self.images = _listed(path, _list(content, "images", path))
        annotations = _list(content, "annotations", path)
        try:
            listed = [category["id"] for category in content.get("categories") or ()]
            if listed and (class_of is None or not set(listed) <= class_of.keys()):
                class_of = {category: number for number, category in enumerate(listed, start=1)}
            self.class_of = class_of
            self._categories = None if class_of is None else _Ids(class_of)
            self._annotations = self._by_image(annotations)
        except (AttributeError, KeyError, TypeError) as error:
            raise _misfit(path, error) from None
        self._names = Counter(image.file_name for image in self.images)
        self._ids = Counter(image.id for image in self.images)

    def _by_image(self, annotations: list) -> dict[Any, list]:
        images, found, notes = _Ids(image.id for image in self.images), defaultdict(list), []
        for annotation in annotations:
            found[images.find(annotation["image_id"])].append(annotation)
        lost = len(found.pop(_UNLISTED, ()))
        if lost and lost == len(annotations):
            raise UserError(
                f"{self.path}: none of the {lost} annotations is of an image in the list: the first has "
                f"image_id {annotations[0]['image_id']!r}, the images have ids such as "
                f"{', '.join(repr(image.id) for image in self.images[:3])}"
            )
        if lost:
            notes.append(f"{lost} of {len(annotations)} annotations are of images that are not in the list")
        kept = [annotation for of_image in found.values() for annotation in of_image]
        unknown = [each.get("category_id") for each in kept if self._class(each) is None]
        if unknown and len(unknown) == len(kept):
            raise UserError(
                f"{self.path}: none of the {len(kept)} annotations is of a known category: the first has "
                f"category_id {unknown[0]!r}; list the categories in the file"
            )
        if unknown:
            notes.append(f"{len(unknown)} of {len(annotations)} annotations are of unknown categories and not drawn")
        self.notes = notes
        return found

    def _class(self, annotation: dict) -> int | None:
        if self._categories is None:
            return 1
        return self.class_of.get(self._categories.find(annotation.get("category_id")))

    def count(self, image: Listed) -> int:
        """How many annotations the image has."""
        return len(self._annotations.get(image.id, ()))

    def size(self, image: Listed) -> tuple[int, int]:
        """(width, height) of the image's masks; UserError if the file gives none, or lists the image twice."""
        if not 0 < image.width * image.height <= _MOST_PIXELS:
            raise UserError(
                f"{self.path} says that {image.file_name} is {image.width} x {image.height}: give its "
                "width and height in pixels"
            )
        if self._names[image.file_name] > 1 or self._ids[image.id] > 1:
            what = "file name" if self._names[image.file_name] > 1 else f"id {image.id!r}"
            raise UserError(
                f"{self.path} has several images with the {what} of {image.file_name}: list each image "
                "once, with an id of its own"
            )
        return image.width, image.height

    def label_maps(self, image: Listed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(instances, classes, ignore), each int32 [height, width] at the size of the image."""
        full = self.full_labels(image, crowd=True)
        return full.instances, full.classes, full.covered.astype(np.int32)

    def full_labels(self, image: Listed, *, crowd: bool) -> FullLabels:
        """For protocols other than SPOT's. crowd: draw crowd regions as instances, or not at all."""
        width, height = self.size(image)
        # Column by column in memory, as pycocotools draws regions.
        instances, classes, top_classes = np.zeros((3, width, height), np.int32).transpose(0, 2, 1)
        covered = np.zeros((width, height), bool).T
        for number, of_class, mask in self._objects(image, crowd):
            covered |= mask & (instances > 0)
            np.copyto(instances, number, where=mask)
            np.copyto(classes, of_class, where=mask)
            np.maximum(top_classes, of_class, where=mask, out=top_classes)
        return FullLabels(instances, classes, top_classes, covered, np.zeros(covered.shape, bool))

    def _objects(self, image: Listed, crowd: bool) -> Iterator[tuple[int, int, np.ndarray]]:
        """Number, class and mask (bool [height, width]) of each annotation of a known category, the last one first, so
        that earlier ones overwrite later ones."""
        annotations = self._annotations.get(image.id, [])
        if not crowd:
            annotations = [annotation for annotation in annotations if not _is_crowd(annotation)]
        for number, annotation in reversed(list(enumerate(annotations, start=1))):
            of_class = self._class(annotation)
            if of_class is None:
                continue
            try:
                if "segmentation" not in annotation:
                    raise ValueError("it has no segmentation")
                mask = decode_segmentation(annotation["segmentation"], image.height, image.width)
            except UserError:  # pycocotools is missing
                raise
            except Exception as error:
                raise UserError(
                    f"{self.path}: annotation {annotation.get('id', number)} of image {image.file_name} "
                    f"cannot be decoded: {error}"
                ) from None
            yield number, of_class, mask


class _Ids:
    """The ids in a list, which another list may write as text, or as numbers."""

    def __init__(self, listed: Iterable[Any]) -> None:
        self._listed = dict.fromkeys(listed)
        self._otherwise: dict[Any, Any] = {}
        for each in self._listed:
            number = _number(each)
            # 7 beside "7", or "7" beside "07": then only the exact spelling counts.
            self._otherwise[number] = each if number not in self._otherwise else _UNLISTED

    def find(self, value: Any) -> Any:
        """The listed id that `value` means, or _UNLISTED."""
        try:
            return value if value in self._listed else self._otherwise.get(_number(value), _UNLISTED)
        except TypeError:  # a list or a dict is no id
            return _UNLISTED


def _number(value: Any) -> Any:
    """The whole number that an id stands for, "7" and "7.0" for 7, or the id itself."""
    for read in (int, float) if isinstance(value, str) else ():
        try:
            return read(value)
        except ValueError:
            continue
    return value


def _is_crowd(annotation: dict) -> bool:
    value = annotation.get("iscrowd")
    return value.strip().lower() not in ("", "0", "false") if isinstance(value, str) else bool(value)


def read_images(path: Path, *, needs: str = "") -> list[Listed]:
    """Reads only the list under "images": training needs nothing else of COCO's 450 MB."""
    text = _read_text(path, needs)
    # Quotes inside a JSON string are escaped, so the pattern can only match a key.
    found = re.search(r'"images"\s*:\s*(?=\[)', text)
    if not found:
        raise UserError(f'{path} is not a COCO instances file: it has no list "images"')
    return _listed(path, _parsed(path, text, found.end()))


def is_instances_file(path: Path) -> bool:
    """Whether the text has the two lists of a COCO file, and segmentations; it may still be damaged."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        return False
    return all(re.search(key, text) for key in (r'"images"\s*:\s*\[', r'"annotations"\s*:\s*\[', r'"segmentation"\s*:'))


def _read_text(path: Path, needs: str) -> str:
    try:
        return read_text(path)
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
        listed = [
            Listed(image["id"], image["file_name"], _side(image.get("height")), _side(image.get("width")))
            for image in images
        ]
        for image in listed:
            hash(image.id)
            if not isinstance(image.file_name, str):
                raise ValueError(f"file_name {image.file_name!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _misfit(path, error) from None
    return listed


def _side(value: Any) -> int:
    try:
        side = int(value)
        return side if side == float(value) and 0 < side <= _MAX_SIDE else 0
    except (TypeError, ValueError, OverflowError):
        return 0


def _misfit(path: Path, error: Exception) -> UserError:
    trouble = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit ({error})"
    return UserError(f"{path} is not a COCO instances file: an entry {trouble}")
