"""Decides which image masks were drawn on: the stored one, or the one that EXIF turns upright."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from spot_fast.data.decoding.opening import open_image, orientation

_ASKEW = 0.05  # largest difference in shape of a scaled copy, as a fraction

Size = tuple[int, int]  # width and height in pixels


def stored_size(path: Path, encoded: bytes | None = None) -> Size:
    """Size of an image file, from its header; CorruptImage if that cannot be read."""
    return _sizes(path, encoded, exif=False)[0]


def both_sizes(path: Path, encoded: bytes | None = None) -> tuple[Size, Size]:
    """The size as stored, and turned upright; they differ if EXIF demands a quarter turn."""
    return _sizes(path, encoded, exif=True)


def _sizes(path: Path, encoded: bytes | None, exif: bool) -> tuple[Size, Size]:
    try:
        image = Image.open(path if encoded is None else io.BytesIO(encoded))
    except Exception:
        image = open_image(path, encoded)
    with image:
        return image.size, image.size[::-1] if exif and _quarter_turn(image) else image.size


def _quarter_turn(image: Image.Image) -> bool:
    if image.format == "TIFF":  # Pillow turns it itself, and its size already
        return False
    return orientation(image) > 4


def scaled_copy(one: Size, other: Size) -> bool:
    """Whether the sizes have the same shape, up to rounding of the sides to whole pixels."""
    (width, height), (other_width, other_height) = one, other
    difference = abs(width * other_height - other_width * height)
    # Rounding a side of the smaller by less than a pixel moves the product by less than a side of the larger.
    return difference <= min(max(*one, *other), _ASKEW * width * other_height)


def turned(masks: Size, stored: Size, upright: Size, otherwise: bool) -> bool | None:
    """Whether masks of that size were drawn on the upright image; None if they fit neither.

    The same size goes before a scaled copy. otherwise: the answer if both images fit alike, as squares do.
    """
    for alike in (tuple.__eq__, scaled_copy):
        fits = alike(masks, stored), alike(masks, upright)
        if any(fits):
            return otherwise if all(fits) else fits[1]
    return None
