"""From an image file to the square the encoder sees: Pillow, with the sizes and rounding of torchvision.

Every mode becomes 8-bit RGB; what is kept of more than 8 bits, `depth` says.
SPOT (section 6) resizes the minor side bilinearly and crops; MOVi frames are stretched bicubically. Label maps follow
the same geometry with the nearest neighbour. Pillow's bilinear and bicubic filters are antialiased.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from spot_fast.data.decoding import depth, png
from spot_fast.errors import CorruptImage

VERSION = 2  # to be raised when the same file gives other pixels: caches of the old ones are then not used
WHOLE = 16  # times as long as wide: of a longer image only the middle is resized
_TURN = Image.Transpose
# How an image of that EXIF orientation becomes upright.
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}

# Between one and two times Pillow's limit it warns, for every image, and reads it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def memory_of(path: str | Path) -> Iterator[None]:
    """CorruptImage in place of a MemoryError, so that an image too large for the machine is named and replaced."""
    try:
        yield
    except MemoryError:
        raise CorruptImage(f"image {path} needs more memory than is free: scale it down") from None


def open_image(path: str | Path, encoded: bytes | None = None) -> Image.Image:
    """The decoded image in its own mode; CorruptImage names the file and the reason.

    encoded: what is in the file, where that has been read already. Larger than Pillow's decompression-bomb limit (179
    megapixels) or than the free memory counts as corrupt too.
    """
    try:
        with memory_of(path):
            try:
                return _decoded(path if encoded is None else io.BytesIO(encoded))
            except Exception:
                without = png.without_text(path, encoded)
                if without is None:
                    raise
                return _decoded(io.BytesIO(without))
    except CorruptImage:
        raise
    except FileNotFoundError:
        raise CorruptImage(f"image {path} does not exist") from None
    except Exception as error:
        raise CorruptImage(f"image {path} cannot be read: {_reason(error)}") from None


def _decoded(file: str | Path | io.BytesIO) -> Image.Image:
    with Image.open(file) as image:
        if not (image.width and image.height):
            raise ValueError("it has no pixels")
        deep = depth.lower_bytes(image) is not None
        image.load()
    if not deep or not depth.is_dark(image):
        return image
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with Image.open(file) as lower:
        grey = lower.tile[0][3] == "LA;16B"
        lower.tile = depth.lower_bytes(lower)
        lower.load()
    return depth.joined(image, lower, grey)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        most = f"{2 * Image.MAX_IMAGE_PIXELS:,}"
        return f"its size exceeds the limit of {most} pixels, a decompression bomb to Pillow: scale it down"
    return str(error) or type(error).__name__


def open_rgb(path: str | Path, encoded: bytes | None = None, *, upright: bool = False) -> Image.Image:
    """The image, read as `open_image` does, as 8-bit RGB, from whatever mode it has; transparent parts become white.

    upright: turn the image as its EXIF orientation says. Data sets whose masks are drawn on the stored pixels leave
    this off.
    """
    image = open_image(path, encoded)
    try:
        with memory_of(path):
            turn = _TURNS.get(orientation(image)) if upright else None
            return to_rgb(image if turn is None else image.transpose(turn))
    except CorruptImage:
        raise
    except Exception as error:
        raise CorruptImage(f"image {path} cannot be converted to RGB: {error or type(error).__name__}") from None


def orientation(image: Image.Image) -> int:
    """How EXIF or XMP say the image is to be turned, 1 to 8; 1 too where neither can be read, for the pixels can."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if found in range(2, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(depth.eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def minor_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the minor side at `size` and the other truncated to an integer, as torchvision does."""
    short, long = sorted((width, height))
    long = int(size * long / short)
    return (size, long) if width <= height else (long, size)


def kept_part(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of what crops are taken from, in an image whose resized size is `width` x `height`:
    all of it, or of a strip longer than WHOLE squares the middle ones. So memory follows the square."""
    kept = min(width, WHOLE * size), min(height, WHOLE * size)
    return *((side - part) // 2 for side, part in zip((width, height), kept, strict=True)), *kept


def resize_minor(image: Image.Image, size: int) -> Image.Image:
    """The image with its minor side at `size`, bilinearly; of a strip the kept part, within one level of the same
    part of the whole."""
    whole = minor_size(*image.size, size)
    left, top, width, height = kept_part(*whole, size)
    if (width, height) == whole:
        return image.resize(whole, Image.Resampling.BILINEAR)
    start, end = (
        [place * side / resized for place, side, resized in zip(corner, image.size, whole, strict=True)]
        for corner in ((left, top), (left + width, top + height))
    )
    # Cut out first, with what the filter reaches: Pillow keeps boxes in single precision.
    reach = math.ceil(max(1.0, min(image.size) / size)) + 1
    near = [max(0, math.floor(place) - reach) for place in start]
    far = [min(side, math.ceil(place) + reach) for side, place in zip(image.size, end, strict=True)]
    box = [place - from_ for place, from_ in zip(start + end, near * 2, strict=True)]
    return image.crop((*near, *far)).resize((width, height), Image.Resampling.BILINEAR, box=box)


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
    resized = minor_size(width, height, size)
    if max(resized) > WHOLE * size:
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
    """Label map [height, width] -> int64 [size, size] by nearest neighbour."""
    return torch.from_numpy(_resize_labels(labels, size, size).astype(np.int64))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 [3, height, width]."""
    # NumPy transposes on this thread; torch would start a team of OpenMP threads in every loader thread.
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).copy())
