"""Which colour each segment gets.

The largest segment is grey, and every other one has the colour whose fixed place in the picture is nearest to its
centre, no colour twice, so that the sum of squared distances times areas is least. So colours depend on nothing but
where the segments are and how large: not on how slots are numbered, nor on batch, run or seed as long as these find
about the same segments.
"""

from __future__ import annotations

import colorsys

import numpy as np
from scipy.optimize import linear_sum_assignment

MAX_LABELS = 256  # an indexed PNG has no more
GREY = (176, 176, 176)
# Those that follow each other here, and so lie far apart in the picture, may resemble each other more than others do.
_HAND_PICKED = (
    (230, 57, 70), (29, 120, 216), (255, 190, 11), (42, 157, 90), (155, 70, 214), (0, 190, 205),
    (255, 122, 0), (240, 98, 180), (128, 185, 24), (90, 60, 40), (25, 45, 120),
)
_STEPS = 0.7548776662466927, 0.5698402909980532  # 1 / p and 1 / p², p³ = p + 1: spreads points evenly in a square


def palette(count: int = MAX_LABELS) -> np.ndarray:
    """uint8 [count, 3]: grey, then colours that are told apart at a glance, then hues a golden angle apart."""
    colours = [GREY, *_HAND_PICKED][:count]
    for i in range(len(colours), count):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.55)[i % 2], (0.95, 0.7, 0.5)[i % 3])
        colours.append((int(255 * red), int(255 * green), int(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)


def places(count: int) -> np.ndarray:
    """[count, 2]: where in the unit square the colours after grey have their place, (y, x)."""
    return (0.5 + np.arange(1, count + 1)[:, None] * _STEPS) % 1


def segment_colours(labels: np.ndarray) -> np.ndarray:
    """The colours of a label map [height, width] of at most 256 labels, as uint8 [256, 3]: row k is label k's.

    Labels that are nowhere on the map get what is left.
    """
    height, width = labels.shape
    area = np.bincount(labels.ravel(), minlength=MAX_LABELS).astype(np.float64)
    ys, xs = np.mgrid[:height, :width]
    sums = [np.bincount(labels.ravel(), (axis.ravel() + 0.5) / side, MAX_LABELS)
            for axis, side in ((ys, height), (xs, width))]  # fmt: skip
    centre = np.stack(sums, 1) / np.maximum(area, 1)[:, None]
    # Equal areas go by place, because numbers mean nothing.
    present = sorted(np.flatnonzero(area), key=lambda k: (-area[k], *centre[k]))
    colours = palette()
    order = np.full(MAX_LABELS, -1)
    order[present[0]] = 0
    rest = present[1:]
    if rest:
        anchors = places(min(max(len(_HAND_PICKED), len(rest)), MAX_LABELS - 1))
        distance = np.square(centre[rest][:, None] - anchors).sum(-1)
        _, chosen = linear_sum_assignment(distance * area[rest][:, None])
        order[rest] = chosen + 1
    free = sorted(set(range(MAX_LABELS)) - set(order.tolist()))
    order[order < 0] = free
    return colours[order]
