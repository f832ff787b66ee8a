"""Assigns a colour to each segment of an image.

The segment along more than half of the image's border is grey: it surrounds the others. Each colour but grey has a
fixed anchor in the image; the other segments get distinct colours such that the sum of area times squared distance from
centre to anchor is least. Colours therefore depend only on where segments are and how large: not on the numbers of
slots, nor on batch, run or seed as long as the segments are about the same.
"""

from __future__ import annotations

import colorsys

import numpy as np
from scipy.optimize import linear_sum_assignment

MAX_LABELS = 256  # an indexed PNG has no more
# The centre's colour, then those around it clockwise from the right, neighbours unlike each other; grey is the last.
_HAND_PICKED = (
    (230, 57, 70),
    (29, 120, 216),
    (255, 190, 11),
    (42, 157, 90),
    (155, 70, 214),
    (0, 190, 205),
    (255, 122, 0),
    (240, 98, 180),
    (128, 185, 24),
    (90, 60, 40),
    (25, 45, 120),
    (190, 190, 190),
)
GREY = _HAND_PICKED[-1]
_AROUND, _DISTANCE = 6, 0.36  # anchors around the centre, and their distance from it in sides of the image
_STEPS = 0.7548776662466927, 0.5698402909980532  # 1 / p and 1 / p², p³ = p + 1: spreads points evenly in a square


def palette(count: int = MAX_LABELS) -> np.ndarray:
    """uint8 [count, 3]: distinct colours, always the same; beyond twelve, hues a golden angle apart."""
    colours = list(_HAND_PICKED[:count])
    for i in range(len(colours), count):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.55)[i % 2], (0.95, 0.7, 0.5)[i % 3])
        colours.append((int(255 * red), int(255 * green), int(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)


def anchors(count: int) -> np.ndarray:
    """[count, 2]: (y, x) in the unit square of the anchors of the colours but grey, for so many segments.

    The centre, six around it, and any others spread evenly. With few anchors a segment that moves a little keeps its
    colour; seven suffice for most models' slots.
    """
    angle = np.arange(_AROUND) * (2 * np.pi / _AROUND)
    ring = 0.5 + _DISTANCE * np.stack([np.sin(angle), np.cos(angle)], 1)
    more = (0.5 + np.arange(1, max(count - _AROUND, 1))[:, None] * _STEPS) % 1
    return np.concatenate([[[0.5, 0.5]], ring, more])[:count]


def segment_colours(labels: np.ndarray) -> np.ndarray:
    """Colours uint8 [256, 3] of a label map [height, width] of at most 256 labels: row k is label k's.

    Labels missing from the map get the remaining colours, grey among them.
    """
    height, width = labels.shape
    area = np.bincount(labels.ravel(), minlength=MAX_LABELS).astype(np.float64)
    ys, xs = np.mgrid[:height, :width]
    sums = [
        np.bincount(labels.ravel(), (axis.ravel() + 0.5) / side, MAX_LABELS)
        for axis, side in ((ys, height), (xs, width))
    ]
    centre = np.stack(sums, 1) / np.maximum(area, 1)[:, None]
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    along = np.bincount(border, minlength=MAX_LABELS)
    rest = np.flatnonzero((area > 0) & (2 * along <= len(border)))
    rest = rest[np.lexsort((*centre[rest].T, area[rest]))]  # ties must not be broken by label numbers
    grey = len(_HAND_PICKED) - 1
    colours = np.roll(palette()[: grey + 1], 1, axis=0), palette()[grey + 1 :]  # grey first
    order = np.full(MAX_LABELS, -1)
    order[2 * along > len(border)] = 0
    if len(rest):
        fixed = anchors(min(max(_AROUND + 1, len(rest)), MAX_LABELS - 1))
        distance = np.square(centre[rest][:, None] - fixed).sum(-1)
        rows, columns = linear_sum_assignment(distance * area[rest][:, None])
        order[rest[rows]] = columns + 1
    free = sorted(set(range(MAX_LABELS)) - set(order.tolist()))
    order[order < 0] = free
    return np.concatenate(colours)[order]
