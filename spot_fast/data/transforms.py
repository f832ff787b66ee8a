"""From an image file to the square the encoder sees: Pillow, with the sizes and rounding of torchvision.

SPOT (section 6) resizes the minor side bilinearly and crops; MOVi frames are stretched bicubically. Label maps follow
the same geometry with the nearest neighbour. Pillow's bilinear and bicubic filters are antialiased.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import CorruptImage

VERSION = 1  # to be raised when the same file gives other pixels: caches of the old ones are then not used


def open_image(path: str | Path, encoded: bytes | None = None) -> Image.Image:
    """The decoded image in its own mode; CorruptImage names the file and the reason.

    encoded: what is in the file, where that has been read already. Larger than Pillow's decompression-bomb limit (179
    megapixels) counts as corrupt too.
    """
    try:
        with Image.open(path if encoded is None else io.BytesIO(encoded)) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except FileNotFoundError:
        raise CorruptImage(f"image {path} does not exist") from None
    except Exception as error:  # noqa: BLE001 - damaged files make Pillow raise nearly anything
        reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise CorruptImage(f"image {path} cannot be read: {str(reason) or type(error).__name__}") from None


def open_rgb(path: str | Path, encoded: bytes | None = None, *, upright: bool = False) -> Image.Image:
    """The image, read as `open_image` does, as 8-bit RGB, from whatever mode it has; transparent parts become white.

    upright: turn the image as its EXIF orientation says. Data sets whose masks are drawn on the stored pixels leave
    this off.
    """
    image = open_image(path, encoded)
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - metadata and palettes can be damaged too
        raise CorruptImage(f"image {path} cannot be converted to RGB: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 grey values of a deep image: 16-bit integers lose their low byte, anything else is scaled to its range."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    if image.mode.startswith("I") and values.size and values.min() >= 0 and values.max() < 65536:
        return (values / 256.0).astype(np.uint8)
    low, high = values.min(), values.max()
    return ((values - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)


def minor_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the minor side at `size` and the other truncated to an integer, as torchvision does."""
    short, long = sorted((width, height))
    long = int(size * long / short)
    return (size, long) if width <= height else (long, size)


def resize_minor(image: Image.Image, size: int) -> Image.Image:
    return image.resize(minor_size(*image.size, size), Image.Resampling.BILINEAR)


def center_corner(width: int, height: int, size: int, rng: object = None) -> tuple[int, int]:
    """Left and top of the centred square: half to even, as torchvision rounds."""
    return round((width - size) / 2), round((height - size) / 2)


def random_corner(width: int, height: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a square at a uniformly drawn place."""
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
    """Label map [height, width] -> int64 [size, size]: minor side to `size` by nearest neighbour, centre crop."""
    height, width = labels.shape
    width, height = minor_size(width, height, size)
    left, top = center_corner(width, height, size)
    square = _resize_labels(labels, width, height)[top:top + size, left:left + size]
    return torch.from_numpy(square.astype(np.int64))


def stretch_labels(labels: np.ndarray, size: int) -> torch.Tensor:
    """Label map [height, width] -> int64 [size, size] by nearest neighbour."""
    return torch.from_numpy(_resize_labels(labels, size, size).astype(np.int64))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 [3, height, width]."""
    # NumPy transposes on this thread; torch would start a team of OpenMP threads in every loader thread.
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).copy())
