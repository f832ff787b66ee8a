"""Reduces images with more than 8 bits a channel, from cameras, microscopes and scanners, to 8 bits.

A file of 16 bits seldom says how many its camera has, and the upper byte of 12 bits is nearly black. So the largest
value decides how many bits count, 8, 10, 12, 14 or 16, and the upper eight of these are kept. Alpha is treated
likewise, by itself.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS = (8, 10, 12, 14, 16)
_DARK = 64  # of the upper byte: values below need no more than 14 bits
# Pillow's raw modes of 16 bits keep the upper byte; with the other byte order it is the lower one.
_LOWER = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if np.little_endian else ";16L"}


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values as uint8: integers up to 65535 as above, anything else scaled to its own range."""
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0 and values.max() < 1 << _BITS[-1]:
        largest = int(values.max())
        bits = next(bits for bits in _BITS if largest < 1 << bits)
        return (values >> bits - 8).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    return ((values - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)


def lower_bytes(image: Image.Image) -> list | None:
    """Decoder tiles for the lower bytes of an opened image of 16-bit colours, whose own read the upper ones; None for
    other images. Grey with alpha becomes four channels: both bytes of grey, both of alpha."""
    if image.mode not in ("RGB", "RGBA"):
        return None
    tiles = []
    for tile in getattr(image, "tile", ()):
        *place, args = tile
        mode, *rest = (args,) if isinstance(args, str) else args or ("",)
        if mode == "LA;16B":
            lower = "RGBA"
        elif isinstance(mode, str) and mode[-4:] in _LOWER:
            lower = mode[:-4] + _LOWER[mode[-4:]]
        else:
            return None
        new = (*place, lower if isinstance(args, str) else (lower, *rest))
        tiles.append(type(tile)(*new) if hasattr(tile, "_fields") else new)
    return tiles or None


def is_dark(image: Image.Image) -> bool:
    """Whether colours with these upper bytes need fewer than 16 bits."""
    return max(high for _, high in image.getextrema()[:3]) < _DARK


def joined(upper: Image.Image, lower: Image.Image, grey: bool) -> Image.Image:
    """The 8-bit image from upper and lower bytes; grey: `lower` has both bytes, of grey and of alpha."""
    high, low = np.asarray(upper).astype(np.uint16), np.asarray(lower)
    values = low[..., 0::2].astype(np.uint16) << 8 | low[..., 1::2] if grey else high << 8 | low
    colours = 1 if grey else 3
    parts = (values[..., :colours], values[..., colours:])
    eight = np.concatenate([eight_bits(part) for part in parts if part.size], -1)
    image = Image.fromarray(eight)
    image.info = upper.info
    return image
