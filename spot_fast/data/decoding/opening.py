"""Opens image files with Pillow, as they are or as 8-bit RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from spot_fast.data.decoding import depth
from spot_fast.errors import CorruptImage

_TURN = Image.Transpose
# EXIF orientation → the transposition that makes the image upright.
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

# Between one and two times Pillow's size limit it would warn for every image, and read it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def memory_of(path: str | Path) -> Iterator[None]:
    """Turns a MemoryError into CorruptImage, so that an image that is too large is named and replaced."""
    try:
        yield
    except MemoryError:
        raise CorruptImage(f"image {path} needs more memory than is free: scale it down") from None


def open_image(path: str | Path, encoded: bytes | None = None) -> Image.Image:
    """Decodes an image in its own mode; CorruptImage names the file and the reason.

    encoded: the file's bytes, if they have been read. An image beyond Pillow's decompression-bomb limit (179
    megapixels) or the free memory counts as corrupt.
    """
    try:
        with memory_of(path):
            try:
                return _decoded(path if encoded is None else io.BytesIO(encoded))
            except Exception:
                # Text that Pillow refuses is no reason to lose the pixels.
                without = _without_png_text(path, encoded)
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
    # Pillow has kept the upper byte of 16-bit colours; dark images need the lower one too, from a second pass.
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with Image.open(file) as lower:
        grey = lower.tile[0][3] == "LA;16B"
        lower.tile = depth.lower_bytes(lower)
        lower.load()
    return depth.joined(image, lower, grey)


def _without_png_text(path: str | Path, encoded: bytes | None) -> bytes | None:
    """The PNG file without text and colour profile; None for other formats and files that have neither.

    Pillow refuses text that is damaged or, as image generators write it, longer than a megabyte. A chunk of a PNG is
    its length (four bytes), type (four), data and checksum (four).
    """
    if encoded is None:
        with open(path, "rb") as file:
            encoded = PNG + file.read() if file.read(len(PNG)) == PNG else b""
    if not encoded.startswith(PNG):
        return None
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(encoded):
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        if encoded[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(encoded[at:end])
        at = end
    return b"".join(kept) if len(kept) > 1 and sum(map(len, kept)) < len(encoded) else None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        most = f"{2 * Image.MAX_IMAGE_PIXELS:,}"
        return f"its size exceeds the limit of {most} pixels, a decompression bomb to Pillow: scale it down"
    return str(error) or type(error).__name__


def open_rgb(path: str | Path, encoded: bytes | None = None, *, upright: bool = False) -> Image.Image:
    """`open_image` as 8-bit RGB; transparent parts become white. upright: turn it as its EXIF orientation says."""
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
    """The orientation in EXIF or XMP, 1 to 8; 1 (upright) if neither can be read, since the pixels can."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF
        return 1
    return orientation if orientation in range(2, 9) else 1


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
