"""The grid of patches on which a model sees an image of any size and shape.

stretch       the whole image as the square that the model was trained on; shapes are squeezed
interpolate   the whole image in its own shape, on a grid that the model was not trained on (`model.regrid`)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from spot_fast.data.decoding import transforms
from spot_fast.errors import UserError

FITS = ("stretch", "interpolate")
MAX_TOKENS = 4096  # patches of an image: the memory of attention grows with their square

Grid = tuple[int, int]  # (height, width) in patches
Fit = Callable[[int, int], Grid]  # (width, height) of an image in pixels → its grid


def fit_of(name: str, model_size: int, patch: int, size: int | None = None) -> Fit:
    """The grid of any image under `name`, one of FITS.

    Args:
        model_size, patch: side of the model's square and of a patch, in pixels.
        size: shorter side of a resized image in pixels, rounded to patches (default: model_size); not for stretch.

    The longer side follows, rounded to patches, and is shortened where the image would need more than MAX_TOKENS.
    UserError where `size` is out of range.
    """
    if name == "stretch":
        side = model_size // patch
        return lambda width, height: (side, side)
    if name != "interpolate":
        raise ValueError(f"fit {name!r} is unknown: use one of {', '.join(FITS)}")
    short, largest = round((size or model_size) / patch), math.isqrt(MAX_TOKENS)
    if not 1 <= short <= largest:
        raise UserError(
            f"--size {size} with --fit interpolate: use {patch} to {largest * patch}, at most {MAX_TOKENS} patches"
        )

    def fit(width: int, height: int) -> Grid:
        long = min(max(round(short * max(width, height) / min(width, height)), short), MAX_TOKENS // short)
        return (short, long) if width >= height else (long, short)

    return fit


def resized(image: Image.Image, grid: Grid, patch: int) -> Tensor:
    """An RGB image as uint8 [3, H, W] of `grid` patches; resized bilinearly, as for training."""
    height, width = (side * patch for side in grid)
    return transforms.to_tensor(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)))
