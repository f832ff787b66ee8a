"""From a decoded image to the encoder's square, with the sizes and rounding of torchvision.

SPOT (section 6) resizes the minor side bilinearly and crops; MOVi frames are stretched bicubically. Pillow's filters
are antialiased. Label maps follow the same geometry with the nearest neighbour.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

VERSION = 2  # raise it when the same file gives other pixels, here or in `opening`: it invalidates cached ones
WHOLE = 16  # of an image more than 16 times as long as wide only the middle 16 squares are resized


def minor_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the minor side at `size` and the other truncated, as torchvision does."""
    short, long = sorted((width, height))
    long = int(size * long / short)
    return (size, long) if width <= height else (long, size)


def kept_part(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the part of a resized image that crops come from.

    All of it, or the middle WHOLE squares of a longer strip: memory grows with the square, not with the strip.
    """
    kept = min(width, WHOLE * size), min(height, WHOLE * size)
    return *((side - part) // 2 for side, part in zip((width, height), kept, strict=True)), *kept


def resize_minor(image: Image.Image, size: int) -> Image.Image:
    """Resizes the minor side to `size`, bilinearly; of a strip `kept_part`, within one level of that of the whole."""
    whole = minor_size(*image.size, size)
    left, top, width, height = kept_part(*whole, size)
    if (width, height) == whole:
        return image.resize(whole, Image.Resampling.BILINEAR)
    start, end = (
        [position * side / resized for position, side, resized in zip(corner, image.size, whole, strict=True)]
        for corner in ((left, top), (left + width, top + height))
    )
    # Cut the part out first, with the border that the filter reaches: Pillow keeps boxes in single precision, which is
    # too coarse for coordinates far along a strip.
    reach = math.ceil(max(1.0, min(image.size) / size)) + 1
    near = [max(0, math.floor(position) - reach) for position in start]
    far = [min(side, math.ceil(position) + reach) for side, position in zip(image.size, end, strict=True)]
    box = [position - origin for position, origin in zip(start + end, near * 2, strict=True)]
    return image.crop((*near, *far)).resize((width, height), Image.Resampling.BILINEAR, box=box)


def center_corner(width: int, height: int, size: int, rng: object = None) -> tuple[int, int]:
    """Left and top of the centred square: half to even, as torchvision rounds."""
    return round((width - size) / 2), round((height - size) / 2)


def random_corner(width: int, height: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a uniformly drawn square."""
    return int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = center_corner(*image.size, size)
    return image.crop((left, top, left + size, top + size))


def stretch(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _resize_labels(labels: np.ndarray, width: int, height: int) -> np.ndarray:
    image = Image.fromarray(labels.astype(np.int32))
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST))


def center_crop_labels(labels: np.ndarray, size: int) -> torch.Tensor:
    """Label map [height, width] -> int64 [size, size]: minor side to `size`, centre crop."""
    height, width = labels.shape
    resized = minor_size(width, height, size)
    if max(resized) > WHOLE * size:
        # The same centre as `resize_minor` keeps, without making the resized strip.
        part = kept_part(*resized, size)
        corner = center_corner(*part[2:], size)
        columns, rows = (
            ((part[axis] + corner[axis] + np.arange(size) + 0.5) * side / resized[axis]).astype(np.int64)
            for axis, side in enumerate((width, height))
        )
        return torch.from_numpy(labels[np.ix_(rows, columns)].astype(np.int64))
    left, top = center_corner(*resized, size)
    square = _resize_labels(labels, *resized)[top : top + size, left : left + size]
    return torch.from_numpy(square.astype(np.int64))


def stretch_labels(labels: np.ndarray, size: int) -> torch.Tensor:
    """Label map [height, width] -> int64 [size, size]."""
    return torch.from_numpy(_resize_labels(labels, size, size).astype(np.int64))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 [3, height, width]."""
    # NumPy transposes on this thread; torch would start a team of OpenMP threads in every loader thread.
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).copy())
