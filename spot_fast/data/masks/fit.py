"""Decides whether masks were drawn on the stored image or on the one that EXIF turns upright."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from spot_fast.data.decoding.opening import open_image, orientation

_ASKEW = 0.05  # largest difference in shape of a scaled copy, as a fraction

Size = tuple[int, int]  # width and height in pixels


def stored_size(path: Path, encoded: bytes | None = None) -> Size:
    """Size of an image file, from its header; CorruptImage if that cannot be read."""
    with _opened(path, encoded) as image:
        return image.size


def both_sizes(path: Path, encoded: bytes | None = None) -> tuple[Size, Size]:
    """The size as stored, and turned upright; they differ if EXIF demands a quarter turn."""
    with _opened(path, encoded) as image:
        quarter_turn = image.format != "TIFF" and orientation(image) > 4  # Pillow turns a TIFF by itself
        return image.size, image.size[::-1] if quarter_turn else image.size


def _opened(path: Path, encoded: bytes | None) -> Image.Image:
    try:
        return Image.open(path if encoded is None else io.BytesIO(encoded))
    except Exception:  # the header alone cannot be read: decoding repairs what can be, or names the file
        return open_image(path, encoded)


def scaled_copy(one: Size, other: Size) -> bool:
    """Whether the sizes have the same shape, up to rounding of the sides to whole pixels."""
    (width, height), (other_width, other_height) = one, other
    difference = abs(width * other_height - other_width * height)
    # Rounding a side of the smaller by less than a pixel moves the product by less than a side of the larger.
    return difference <= min(max(*one, *other), _ASKEW * width * other_height)


def turned(masks: Size, stored: Size, upright: Size, otherwise: bool) -> bool | None:
    """Whether masks of that size were drawn on the upright image; None if they fit neither image.

    The same size goes before a scaled copy. otherwise: the answer if they fit both, as squares do.
    """
    for alike in (tuple.__eq__, scaled_copy):
        fits = alike(masks, stored), alike(masks, upright)
        if any(fits):
            return otherwise if all(fits) else fits[1]
    return None
