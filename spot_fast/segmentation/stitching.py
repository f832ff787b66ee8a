"""Masks of overlapping windows → segments of the whole image.

Every window numbers its slots as it likes. Where two windows overlap they look at the very same patches, so slots that
mean the same thing cover the same patches there. Of each pair of overlapping windows the slots are matched one to one
with the greatest total IoU of their label maps in the overlap, as SPOT matches teacher and student; matches of at least
MIN_IOU are then joined, the best first, unless that would put two slots of one window into one segment. So neither the
numbering of the slots nor the order of the windows matters. A segment's soft mask is the mean of its slots' masks over
the windows that see a patch, each weighted by how far inside the window the patch lies, so that no seam shows where
windows end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from spot_fast.segmentation.colours import MAX_LABELS
from spot_fast.segmentation.layouts import Layout
from spot_kernels import assign_masks

MIN_IOU = 0.4  # of two slots in the overlap of their windows, to be one segment


@dataclass(frozen=True)
class Stitched:
    """masks: soft masks [h · w, M] of the whole grid by kind. segments: int64 [W, K], the segment of each slot of each
    window, -1 for slots that are largest nowhere."""

    masks: dict[str, Tensor]
    segments: Tensor


def stitch(masks: dict[str, Tensor], layout: Layout) -> Stitched:
    """Soft masks [W, N, K] of an image's windows, by kind → its segments, the largest first.

    Slots are matched by the first kind, and all kinds have the same segments. Soft masks are at least 0; they sum to 1
    over the segments of a patch but for slots that are largest nowhere, and but for the smallest beyond MAX_LABELS.
    """
    first = next(iter(masks.values()))
    segments = _joined(first.argmax(-1), layout, first.shape[-1])
    count = min(int(segments.max()) + 1, MAX_LABELS)
    segments = torch.where(segments < count, segments, -1)
    return Stitched({kind: _blended(soft, segments, count, layout) for kind, soft in masks.items()}, segments)


def _joined(labels: Tensor, layout: Layout, slots: int) -> Tensor:
    """Label maps [W, N] of the windows → segment of each window's slot, int64 [W, K], numbered by area."""
    height, width = layout.window
    maps = labels.view(-1, height, width)
    matches = []
    for one, other in itertools.combinations(range(len(layout.corners)), 2):
        parts = _overlap(layout.corners[one], layout.corners[other], height, width)
        if parts is None:
            continue
        a, b = (maps[place][part].reshape(1, -1) for place, part in zip((one, other), parts, strict=True))
        columns, iou, _ = assign_masks(b, a, slots)
        both = [(-float(iou[0, k]), one, other, k, int(columns[0, k])) for k in range(slots)]
        matches += [match for match in both if -match[0] >= MIN_IOU]
    group = {(window, k): {(window, k)} for window in range(len(maps)) for k in range(slots)}
    for _, one, other, k, column in sorted(matches):
        a, b = group[one, k], group[other, column]
        if a is not b and not {window for window, _ in a} & {window for window, _ in b}:
            a |= b
            group.update((member, a) for member in b)
    area = torch.stack([(labels == k).sum(1) for k in range(slots)], 1)
    unique = {id(members): members for members in group.values()}.values()
    sizes = [(sum(int(area[member]) for member in members), min(members), members) for members in unique]
    segments = torch.full((len(maps), slots), -1)
    for number, (_, _, members) in enumerate(sorted((s for s in sizes if s[0]), key=lambda s: (-s[0], s[1]))):
        for member in members:
            segments[member] = number
    return segments


def _overlap(one: tuple[int, int], other: tuple[int, int], height: int, width: int):
    """The part of each of two windows at these corners that both see, as slices; None where there is none."""
    top, left = (max(a, b) for a, b in zip(one, other, strict=True))
    bottom, right = min(one[0], other[0]) + height, min(one[1], other[1]) + width
    if top >= bottom or left >= right:
        return None
    return [(slice(top - y, bottom - y), slice(left - x, right - x)) for y, x in (one, other)]


def _blended(soft: Tensor, segments: Tensor, count: int, layout: Layout) -> Tensor:
    """[W, N, K] → [h · w, M]."""
    height, width = layout.window
    weight = _tent(height)[:, None] * _tent(width)
    total = torch.zeros(*layout.grid, count, dtype=torch.float32)
    weights = torch.zeros(*layout.grid, dtype=torch.float32)
    for masks, numbers, (top, left) in zip(soft, segments, layout.corners, strict=True):
        part = slice(top, top + height), slice(left, left + width)
        kept = numbers >= 0
        weighted = masks.float().view(height, width, -1)[..., kept] * weight[..., None]
        total[part] = total[part].index_add(-1, numbers[kept], weighted)
        weights[part] += weight
    return (total / weights[..., None]).flatten(0, 1)


def _tent(length: int) -> Tensor:
    """Weights that fall evenly from the middle of a window to its ends, where they are not yet 0."""
    place = torch.arange(length, dtype=torch.float32) + 0.5
    return torch.minimum(place, length - place)
