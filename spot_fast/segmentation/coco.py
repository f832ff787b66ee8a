"""Segments as a data set in COCO's format, which pycocotools, FiftyOne, CVAT, supervision and detectron2 open.

Each segment is an annotation of the one category "segment": its region as compressed run lengths, area in pixels, box
(x, y, width, height), `slot`, and `score`, the confidence of its mask (`evaluation.recall.mask_scores`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from spot_fast import __version__
from spot_fast.data.listing.names import composed
from spot_fast.data.masks.instances import Listed, read_images
from spot_fast.errors import UserError
from spot_fast.evaluation.recall import mask_scores
from spot_fast.files import atomic_write
from spot_fast.system.optional import required

CATEGORIES = [{"id": 1, "name": "segment", "supercategory": "segment"}]
_BY = "spot_fast"
_HEAD = 4096  # bytes of a file in which its `info` is


@dataclass(frozen=True)
class ImageEntry:
    """An image of a data set: its id and name there, its size in pixels, and its `regions`."""

    id: Any
    file_name: str
    width: int
    height: int
    regions: list[dict]

    def as_image(self) -> dict:
        return {"id": self.id, "file_name": self.file_name, "width": self.width, "height": self.height}

    def as_annotations(self, first: int) -> list[dict]:
        """The regions as annotations with ids from `first` on."""
        return [
            {"id": number, "image_id": self.id, "category_id": 1, "iscrowd": 0, **region}
            for number, region in enumerate(self.regions, start=first)
        ]


def regions(labels: np.ndarray, masks: Tensor) -> list[dict]:
    """The segments of a label map uint8 [H, W] as COCO regions; masks [N, K]: the soft masks it was made from.

    A slot without a pixel has none.
    """
    rle = required("pycocotools.mask", "COCO's format", "pycocotools")
    scores = mask_scores(masks).tolist()
    columns = np.asfortranarray(labels)  # as pycocotools counts pixels
    found = []
    for slot in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(scores))).tolist():
        # A slot at a time: the masks of a photo of 100 megapixels would take seven times that.
        region = rle.encode((columns == slot).view(np.uint8))
        found.append(
            {
                "segmentation": {"size": list(labels.shape), "counts": region["counts"].decode()},
                "area": int(rle.area(region)),
                "bbox": rle.toBbox(region).tolist(),
                "score": round(scores[slot], 6),
                "slot": slot,
            }
        )
    return found


def info(model: str, masks: str) -> dict:
    """The `info` of a data set. model: a key that tells it from other models; masks: the kind of masks."""
    return {
        "description": f"{masks} masks, score = mask confidence",
        "contributor": _BY,
        "version": __version__,
        "model": model,
    }


def data_set(about: dict, images: Iterable[ImageEntry]) -> dict:
    """about: `info`."""
    images = list(images)
    annotations: list[dict] = []
    for image in images:
        annotations += image.as_annotations(len(annotations) + 1)
    return {
        "info": about,
        "categories": CATEGORIES,
        "images": [image.as_image() for image in images],
        "annotations": annotations,
    }


def write_data_set(path: Path, about: dict, images: Callable[[], Iterator[ImageEntry]]) -> None:
    """Writes `data_set(about, images())` image by image, so that memory does not grow with their number.

    images: called twice. UserError where the file cannot be written.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="ascii") as file:
            file.write(f'{{"info": {json.dumps(about)},\n"categories": {json.dumps(CATEGORIES)},\n"images": [')
            separator = "\n"
            for image in images():
                file.write(separator + json.dumps(image.as_image()))
                separator = ",\n"
            file.write('],\n"annotations": [')
            separator, number = "\n", 1
            for image in images():
                for annotation in image.as_annotations(number):
                    file.write(separator + json.dumps(annotation))
                    separator = ",\n"
                number += len(image.regions)
            file.write("]}\n")

    atomic_write(path, write)


def check_target(path: Path, model: str) -> None:
    """UserError where `path` is a file, but not one that `write_data_set` wrote for the same model."""
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD)
    written = re.match(rb'\{"info": (\{[^{}]*\})', head)
    about = json.loads(written[1]) if written else {}
    if (about.get("contributor"), about.get("model")) != (_BY, model):
        raise UserError(
            f"{path} exists and holds no segments of the same model: choose another file, or add --overwrite"
        )


def listed_images(annotations: Path, names: Sequence[str]) -> list[Listed | None]:
    """For each file name the image that a COCO annotation file lists under it, None for those that it does not list.

    A name is looked up as it is, then without its folders where only one image has it. UserError where none is listed,
    or two files are one listed image.
    """
    images = read_images(annotations)
    exact = {composed(image.file_name): image for image in images}
    bare = Counter(PurePosixPath(name).name for name in exact)
    single = {base: image for name, image in exact.items() if bare[base := PurePosixPath(name).name] == 1}
    found = [exact.get(composed(name)) or single.get(PurePosixPath(composed(name)).name) for name in names]
    if not any(found):
        raise UserError(
            f"--annotations {annotations} lists none of the {len(names)} images, such as {names[0]}: it lists "
            f"{', '.join(image.file_name for image in images[:3]) or 'nothing'}"
        )
    files: dict[Listed, str] = {}
    for name, image in zip(names, found, strict=True):
        if image is not None and (other := files.setdefault(image, name)) != name:
            raise UserError(
                f"{other} and {name} are both {image.file_name} of --annotations {annotations}: give one of the two"
            )
    return found
