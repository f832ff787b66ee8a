"""How an image of any size and shape becomes what a model takes: its grid of patches, and the windows on that grid.

stretch       the whole image as the square that the model was trained on; shapes are squeezed
tiles         overlapping squares of the trained size from the image in its own shape, each seen as in training;
              what no square holds whole is found in pieces, which `stitching` joins
interpolate   the whole image in its own shape at once, on another grid than the model has seen (`regrid`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spot_fast.data.decoding import transforms
from spot_fast.errors import UserError

FITS = ("stretch", "tiles", "interpolate")
MAX_WINDOWS = 64  # of an image in tiles
MAX_TOKENS = 4096  # of an image whose positions are interpolated: attention takes the square of it


@dataclass(frozen=True)
class Layout:
    """An image resized to `grid` (height, width) patches and seen through windows of `window` patches each.

    corners: (top, left) of each window, in patches; together the windows cover the grid. tiled: what the windows show
    is to be stitched, even where there is one only.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    corners: tuple[tuple[int, int], ...] = ((0, 0),)
    tiled: bool = False


# (width, height) of an image → its layout
Fit = Callable[[int, int], Layout]


def fit_of(name: str, model_size: int, patch: int, size: int | None = None) -> Fit:
    """The layout of any image under `name`, one of FITS.

    Args:
        model_size, patch: the side of the model's square and of a patch, pixels.
        size: the shorter side of a resized image in pixels, rounded to patches (default: model_size); not for
            stretch.

    The longer side follows, rounded to patches, and is shortened where an image is so long that it would need more
    than MAX_WINDOWS or MAX_TOKENS. UserError where `size` does not fit.
    """
    own = model_size // patch
    if name == "stretch":
        return lambda width, height: Layout((own, own), (own, own))
    short = round((size or model_size) / patch)
    if name == "tiles":
        most = math.isqrt(MAX_WINDOWS)
        largest = own + (most - 1) * _stride(own)
        if not own <= short <= largest:
            raise UserError(
                f"--size {size} with --fit tiles: use {model_size} (the model's square) to "
                f"{largest * patch} ({most} x {most} squares)"
            )
        longest = own + (MAX_WINDOWS // len(_starts(short, own)) - 1) * _stride(own)
    elif name == "interpolate":
        largest = math.isqrt(MAX_TOKENS)
        if not 1 <= short <= largest:
            raise UserError(
                f"--size {size} with --fit interpolate: use {patch} to {largest * patch}, at most {MAX_TOKENS} patches"
            )
        longest = MAX_TOKENS // short
    else:
        raise ValueError(f"fit {name!r} is unknown: use one of {', '.join(FITS)}")

    def fit(width: int, height: int) -> Layout:
        long = min(max(round(short * max(width, height) / min(width, height)), short), longest)
        grid = (short, long) if width >= height else (long, short)
        if name == "interpolate":
            return Layout(grid, grid)
        tops, lefts = (_starts(side, own) for side in grid)
        return Layout(grid, (own, own), tuple((top, left) for top in tops for left in lefts), tiled=True)

    return fit


def _stride(window: int) -> int:
    """Patches from one window to the next at most: neighbours share half."""
    return max(1, window // 2)


def _starts(side: int, window: int) -> list[int]:
    """Where windows begin on a side of so many patches, evenly spaced from edge to edge."""
    count = math.ceil((side - window) / _stride(window)) + 1
    return [round(i * (side - window) / max(count - 1, 1)) for i in range(count)]


def windows_of(image: Image.Image, layout: Layout, patch: int) -> Tensor:
    """An RGB image → its windows, uint8 [W, 3, h, w]; resized bilinearly, as for training."""
    height, width = (side * patch for side in layout.grid)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    tall, wide = (side * patch for side in layout.window)
    return torch.stack(
        [
            transforms.to_tensor(pixels[top * patch : top * patch + tall, left * patch : left * patch + wide])
            for top, left in layout.corners
        ]
    )
