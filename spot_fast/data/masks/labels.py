"""Reads label images, whose values are the instances or classes of the pixels."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from spot_fast.data.decoding.opening import open_image
from spot_fast.errors import UserError

RIM = 255  # the label that VOC draws around objects
_LOSSLESS = frozenset({"PNG", "TIFF", "GIF", "BMP", "DIB", "PPM", "TGA", "SGI", "PCX"})
_LOSSY_TIFF = frozenset({"jpeg", "tiff_jpeg", "webp"})
_FEW_EDGES = 1  # labels that may look like soft edges without an error
_SAVE = "save it as a palette or grey PNG whose values are the labels"


def open_labels(path: str | Path, encoded: bytes | None = None, *, rim: Collection[str] = ()) -> np.ndarray:
    """Reads an indexed label image as int32 [height, width]: grey values, or palette indices whatever their colours.

    rim: Pillow modes in which 255 is VOC's rim around objects, and becomes background. UserError if the image has
    colours, labels other than whole numbers from 0, or lost labels to a lossy format or soft edges; CorruptImage if it
    cannot be read.
    """
    image = open_lossless(path, encoded)
    if image.mode not in ("P", "L", "1", "I", "F") and not image.mode.startswith("I;16"):
        raise UserError(f"{path} has colours ({image.mode}) instead of indexed labels: {_SAVE}")
    if image.format == "GIF" and image.mode == "P" and _is_grey(image):
        image = image.convert("L")  # Pillow numbers the greys of a GIF anew
    values = np.asarray(image)
    with np.errstate(invalid="ignore"):  # NaN and infinity are reported below
        labels = values.astype(np.int32)
    if labels.size and (labels.min() < 0 or image.mode == "F" and not np.array_equal(labels, values)):
        raise UserError(
            f"{path} has labels from {values.min():g} to {values.max():g}: expected whole numbers, 0 for "
            "the background and from 1 on for objects"
        )
    if image.mode in rim:
        labels[labels == RIM] = 0
    seen, edges = _count_edges(labels)
    if edges > max(_FEW_EDGES, seen // 2):
        raise UserError(
            f"{path} has soft edges: {edges} of the {seen} labels seen lie between others; resize and draw "
            "masks without smoothing"
        )
    return labels


def open_lossless(path: str | Path, encoded: bytes | None = None) -> Image.Image:
    """Opens an image as `opening.open_image` does; UserError if its format may have changed pixels."""
    image = open_image(path, encoded)
    lossy = image.format == "TIFF" and image.info.get("compression") in _LOSSY_TIFF
    if image.format not in _LOSSLESS or lossy:
        colours = image.getcolors(image.width * image.height) or ()
        kind = "a TIFF with lossy compression" if lossy else f"a {image.format}"
        raise UserError(f"{path} is {kind} ({len(colours)} labels seen): masks have to be lossless, {_SAVE}")
    if image.format in ("TIFF", "GIF"):
        with Image.open(path if encoded is None else io.BytesIO(encoded)) as pages:
            if pages.n_frames > 1:
                raise UserError(f"{path} has {pages.n_frames} pages: save one label image for each image")
    return image


def _is_grey(image: Image.Image) -> bool:
    palette = np.reshape(image.getpalette(), (-1, 3))
    return bool((palette == palette[:, :1]).all())


def _count_edges(labels: np.ndarray) -> tuple[int, int]:
    """Numbers of labels other than the background, and of those that look like a smoothed edge.

    Such a label is nowhere two pixels wide, and most of its pixels lie between a smaller and a larger label on opposite
    sides, or apart from each other. Even small objects are rarely either.
    """
    number, at = _numbered(labels)
    if number <= _FEW_EDGES + 1:
        return number - 1, 0
    right, down = at[:, 1:] == at[:, :-1], at[1:] == at[:-1]
    wide = np.zeros(number, bool)
    wide[at[:-1, :-1][right[:-1] & right[1:] & down[:, :-1]]] = True
    wide[0] = True
    if number - np.count_nonzero(wide) <= max(_FEW_EDGES, (number - 1) // 2):
        return number - 1, 0
    sizes = np.bincount(at.ravel(), minlength=number)
    padded = np.pad(at, 1, mode="edge")
    height, width = at.shape
    between = np.zeros(at.shape, bool)
    joined = np.zeros(number, np.int64)
    for y, x in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ahead = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        between |= (behind < at) & (at < ahead) | (ahead < at) & (at < behind)
        same = ahead == at
        joined += np.bincount(at[same], minlength=number)
    mostly_between = np.bincount(at[between], minlength=number) >= 0.8 * sizes
    scattered = (sizes >= 4) & (2 * joined <= sizes)
    return number - 1, int(np.count_nonzero(~wide & (mostly_between | scattered)))


def _numbered(labels: np.ndarray) -> tuple[int, np.ndarray]:
    """Number of labels, 0 included, and the map with them renumbered from 0 in their order."""
    if labels.size and labels.max() < 1 << 16:
        present = np.bincount(labels.ravel(), minlength=1) > 0
        present[0] = True
        return int(present.sum()), (present.cumsum() - 1)[labels]
    found, at = np.unique(np.append(labels.ravel(), 0), return_inverse=True)
    return len(found), at[:-1].reshape(labels.shape)
