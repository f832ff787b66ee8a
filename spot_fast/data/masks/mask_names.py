"""Which file of a folder is the mask of an image, by its name."""

from __future__ import annotations

import os
from pathlib import Path

from spot_fast.data.datasets.names import composed

MASK = "_mask"  # photo_mask.png beside photo.jpg
# Of several the first is the mask. The last are lossy: they are found so that they can be refused.
_ENDINGS = (
    ".png",
    ".tif",
    ".tiff",
    ".gif",
    ".bmp",
    ".pgm",
    ".tga",
    ".webp",
    ".jp2",
    ".avif",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
)


def without_ending(name: str) -> str:
    """The name of an image's or mask's file without its ending, in NFC and with _mask in small letters."""
    stem = composed(Path(name).stem)
    return stem[: -len(MASK)] + MASK if stem.lower().endswith(MASK) else stem


def masks_in(folder: Path) -> dict[str, Path]:
    """The files that can be masks by their ending, in any capitals, each under its name without that.

    Of those that differ in their ending alone the one whose ending comes first in `_ENDINGS`, in small letters.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = [(_ENDINGS.index(ending), name) for name in names if (ending := Path(name).suffix.lower()) in _ENDINGS]
    # The preferred ones last, where they replace the others: small letters sort behind capitals.
    found.sort(key=lambda each: (-each[0], each[1]))
    return {without_ending(name): folder / name for _, name in found}
