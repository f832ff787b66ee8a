"""ClevrTex as it is published: clevrtex_full/N/CLEVRTEX_full_NNNNNN.png with CLEVRTEX_full_NNNNNN_flat.png beside it.

Of each variant the first tenth of the numbers is for tests, the second for validation, the rest for training; outd has
no splits and is for tests alone. As in published results, "val" here is the test split. Frames are 320 × 240; the
benchmark takes the central square of 0.8 times the minor side, 192 × 192, and compares masks at 128 × 128 (Karazija et
al. 2021, arXiv 2111.10265, and its clevrtex_eval.py). Masks are palette PNGs of object numbers from 1 on, 0 is the
background; there are no classes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spot_fast.data.base import Geometry, ImageFiles, Masks
from spot_fast.data.listing.search import counted
from spot_fast.data.masks.labels import open_labels
from spot_fast.errors import UserError

# Images of each variant, as published.
VARIANTS = {"full": 50_000, "pbg": 20_000, "vbg": 20_000, "grassbg": 20_000, "camo": 20_000, "outd": 10_000}
EXPECTED = "clevrtex_full/ (or another variant) with CLEVRTEX_full_NNNNNN.png and CLEVRTEX_full_NNNNNN_flat.png in it"
_IMAGE = re.compile(rf"CLEVRTEX_(?P<variant>{'|'.join(VARIANTS)})_(?P<number>\d{{6}})\.png")
_CENTRAL = 0.8


class ClevrTex(ImageFiles):
    """One split ("train" or "val", the test split) of the variant at `root`, or of clevrtex_full/ in it.

    Images are in the order of their numbers, at most `limit` (0 = all). Only "val" has masks. expected: how many there
    are in the published split. geometry: options of ImageFiles, whose crops all take the central square.
    """

    drawn = f"central {_CENTRAL}"

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        mask_size: int = 128,
        crop: str = "center",
        limit: int = 0,
        **geometry: Any,
    ) -> None:
        folder = _find(Path(root))
        variant, images = _images(folder)
        count = VARIANTS[variant]
        tests = range(count) if variant == "outd" else range(count // 10)
        self.has_masks = split == "val"
        self.name = f"ClevrTex {variant} {'test' if self.has_masks else 'train'}"
        if variant == "outd" and not self.has_masks:
            raise UserError(
                f"--data {root} holds ClevrTex's outd, which has no training images: train on clevrtex_full, and "
                "evaluate with --data on outd"
            )
        numbers = tests if self.has_masks else range(count // 5, count)
        paths = [images[number] for number in sorted(images) if number in numbers]
        if not paths:
            raise UserError(
                f"{folder} has no images with numbers from {numbers.start:,} to {numbers.stop - 1:,}, which are "
                f"{self.name}: unpack all parts of the download"
            )
        self.expected, self.present = len(numbers), len(paths)
        super().__init__(paths[: limit or None], mask_size=mask_size, crop=crop, **geometry)

    def rgb(self, index: int, upright: bool | None = None) -> Image.Image:
        image = super().rgb(index, upright)
        left, top, side = _central(*image.size)
        return image.crop((left, top, left + side, top + side))

    def geometry(self, width: int, height: int, rng: np.random.Generator) -> Geometry:
        left, top, side = _central(width, height)
        scale = self.image_size / side
        return Geometry(width * scale, height * scale, left * scale, top * scale)

    def mask_files(self, index: int) -> list[Path]:
        path = self.paths[index]
        return [path.with_name(f"{path.stem}_flat.png")] if self.has_masks else []

    def val_masks(self, index: int) -> Masks:
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on the test split")
        (file,) = self.mask_files(index)
        labels = open_labels(file)
        self.fitting(index, labels.shape[::-1], file)
        left, top, side = _central(*labels.shape[::-1])
        return Masks(self.square_labels(labels[top : top + side, left : left + side]))


def recognises(path: Path) -> bool:
    if not path.is_dir():
        return False
    folders = [path, *_variants(path)]
    return any(
        _IMAGE.fullmatch(file.name)
        for folder in folders
        for pattern in ("CLEVRTEX_*.png", "*/CLEVRTEX_*.png")
        for file in folder.glob(pattern)
    )


def remarks(images: ClevrTex) -> list[str]:
    if images.present == images.expected:
        return []
    return [f"{images.name} has {counted(images.present, 'image')} here and {images.expected:,} in published results"]


def _central(width: int, height: int) -> tuple[int, int, int]:
    """(left, top, side) of the benchmark's square."""
    side = int(_CENTRAL * min(width, height))
    return (width - side) // 2, (height - side) // 2, side


def _variants(root: Path) -> list[Path]:
    return [folder for name in VARIANTS if (folder := root / f"clevrtex_{name}").is_dir()]


def _find(root: Path) -> Path:
    """The folder of one variant: `root`, or in it clevrtex_full or the only other one."""
    inside = _variants(root)
    if len(inside) > 1 and inside[0].name != "clevrtex_full":
        names = ", ".join(folder.name for folder in inside)
        raise UserError(f"--data {root} has several variants ({names}): give the folder of one of them")
    return inside[0] if inside else root


def _images(folder: Path) -> tuple[str, dict[int, Path]]:
    """The variant in `folder`, and its images by number."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions") from None

    found: dict[str, dict[int, Path]] = {}
    for inside, _, names in os.walk(folder, onerror=refuse):
        for image in filter(None, map(_IMAGE.fullmatch, names)):
            numbered, path = found.setdefault(image["variant"], {}), Path(inside, image[0])
            other = numbered.setdefault(int(image["number"]), path)
            if other != path:
                raise UserError(f"{other} and {path} have the same number: remove one of them")
    if not found:
        raise UserError(f"--data {folder} has no CLEVRTEX_*_NNNNNN.png: ClevrTex needs {EXPECTED}")
    if len(found) > 1:
        raise UserError(f"{folder} has images of {' and '.join(found)}: give each variant a folder of its own")
    return next(iter(found.items()))
