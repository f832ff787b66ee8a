"""COCO's regions, polygons and run lengths, as masks.

pycocotools does not check its input: coordinates far away take all memory, and runs that do not fill the image leave
the rest of the mask uninitialised. So every region is checked before it is drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spot_fast.system.optional import required

_REACH = 100  # most coordinates and outline length of a polygon, times the sum of the image's sides
_MOST_DIGITS = 6  # of a run length in COCO's compressed form, five bits each: 2**30 pixels and their sign


def decode_segmentation(segmentation: list | dict | None, height: int, width: int) -> np.ndarray:
    """Draws a COCO region as bool [height, width]: polygons, uncompressed RLE (a list of counts) or compressed RLE.

    None, [] and polygons of fewer than three points draw nothing. ValueError says what is wrong with others.
    """
    if isinstance(segmentation, dict):
        return _of_runs(segmentation, height, width)
    if segmentation is not None and not isinstance(segmentation, list):
        raise ValueError(f"the segmentation is {_short(segmentation)}: expected polygons or run lengths")
    return _of_polygons(segmentation or [], height, width)


def _of_polygons(polygons: list, height: int, width: int) -> np.ndarray:
    # Imported here, because training and other data sets do not need it.
    rle = required("pycocotools.mask", "drawing polygons", "pycocotools")
    reach = _REACH * (height + width)
    drawn = [points for polygon in polygons if (points := _points(polygon, reach)) is not None]
    if not drawn:
        return np.zeros((height, width), bool)
    return rle.decode(rle.merge(rle.frPyObjects(drawn, height, width))).astype(bool)


def _points(polygon: Any, reach: float) -> np.ndarray | None:
    """float64 [x, y, x, y, …] of a polygon; None if it has no area."""
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is {_short(polygon)}: expected a list of x, y, x, y, …")
    if len(polygon) < 6:
        return None
    try:
        points = np.array(polygon)
        if points.dtype.kind in "US":
            points = points.astype(float)
    except (ValueError, OverflowError):
        points = np.array(None)
    if points.ndim != 1 or points.dtype.kind not in "iuf":
        raise ValueError(f"a polygon is {_short(polygon)}: expected a list of x, y, x, y, …")
    if len(points) % 2:
        raise ValueError(f"a polygon has {len(points)} coordinates: expected pairs of x and y")
    points = points.astype(np.float64)
    largest = np.abs(points).max()  # NaN where one is NaN
    if not largest <= reach:
        wrong = points[~(np.abs(points) <= reach)][0]
        raise ValueError(f"a polygon has the coordinate {wrong:g}: expected pixels of the image")
    # pycocotools keeps five points for each pixel of the outline.
    corners = points.reshape(-1, 2)
    if np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum() > reach:
        raise ValueError(f"a polygon's outline is longer than {reach} pixels")
    return points


def _of_runs(region: dict, height: int, width: int) -> np.ndarray:
    size, counts = region.get("size"), region.get("counts")
    if size != [height, width]:
        size = f"{size[1]} x {size[0]}" if isinstance(size, list) and len(size) == 2 else _short(size)
        raise ValueError(f"the size of the run lengths is {size}, the image is {width} x {height}")
    runs = _listed_runs(counts) if isinstance(counts, list) else _compressed_runs(counts)
    # Bounds first, so that the sum cannot overflow.
    if runs.size and not 0 <= runs.min() <= runs.max() <= height * width:
        raise ValueError(f"a run length is {runs.min() if runs.min() < 0 else runs.max()}, of {height * width} pixels")
    if runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()} of {height * width} pixels")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _listed_runs(counts: list) -> np.ndarray:
    try:
        runs = np.array(counts)
        with np.errstate(invalid="ignore"):  # NaN and infinity are reported below
            whole = runs.astype(np.int64)
    except (ValueError, TypeError, OverflowError):
        whole = None
    if whole is None or whole.ndim != 1 or runs.dtype.kind not in "iuf" or not np.array_equal(whole, runs):
        raise ValueError(f"the run lengths are {_short(counts)}: expected whole numbers")
    return whole


def _compressed_runs(counts: Any) -> np.ndarray:
    """int64 run lengths of COCO's string: digits of five bits, lowest first, from character 48; bit 32 says that more
    follow, bit 16 of the last is the sign. From the fourth on, a number is the difference to the last but one."""
    if not isinstance(counts, str | bytes):
        raise ValueError(f"the run lengths are {_short(counts)}: expected a list or a string")
    text = counts.encode() if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = digits & 32 == 0
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not last[-1]:
        raise ValueError(f"the run lengths are {_short(counts)}: that is not COCO's compressed form")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_DIGITS:
        raise ValueError("a run length is larger than any image")
    position = np.arange(len(digits)) - np.repeat(starts, lengths)  # of each digit in its number
    runs = np.add.reduceat((digits & 31) << 5 * position, starts) - ((digits[ends] & 16) << 5 * lengths - 4)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _short(value: Any) -> str:
    """An unexpected value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
