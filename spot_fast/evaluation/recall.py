"""Average recall of objects (AR@1, AR@10, AR@100) as COCO's evaluation counts it, without regard to classes.

An image's predicted masks are ranked by their score, and the first 1, 10 or 100 of them may find its objects: each
takes the free object that it overlaps most, if their IoU reaches a threshold. AR is the share of all objects found,
the mean over the thresholds 0.5, 0.55, …, 0.95. Objects are those of the label maps; COCOeval on the same masks gives
the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DETECTIONS = (1, 10, 100)
THRESHOLDS = torch.linspace(0.5, 0.95, 10, dtype=torch.float64)


def mask_scores(masks: Tensor) -> Tensor:
    """Confidence of soft masks [..., N, K] as a number from 0 to 1 each: float32 [..., K].

    It is the mean of a mask over the patches where it is the largest (as MaskFormer scores masks), and where there is
    no such patch the mask's largest value, which is below the winner's everywhere.
    """
    masks = masks.float()
    largest = masks.argmax(-1, keepdim=True)
    won = torch.zeros_like(masks).scatter_(-1, largest, 1.0)
    patches = won.sum(-2)
    return torch.where(patches > 0, (masks * won).sum(-2) / patches.clamp(min=1), masks.amax(-2))


def found_objects(iou: Tensor, present: Tensor, used: Tensor, scores: Tensor | None) -> Tensor:
    """How many objects of each image the first 1, 10 and 100 masks find at each threshold: int64 [B, 3, 10].

    Args:
        iou: [B, K, J] of predicted masks and objects.
        present: [B, J], whether an object has pixels.
        used: [B, K], whether a mask has pixels; others have no rank.
        scores: [B, K]; equal ones rank by number. None: masks have no ranking, and where a number of detections cuts
            some off, the count is -1.
    """
    batch, masks, objects = iou.shape
    rank = torch.zeros(batch, masks) if scores is None else scores.float().cpu()
    order = rank.masked_fill(~used, -torch.inf).argsort(dim=1, descending=True, stable=True)
    found = torch.zeros(batch, len(DETECTIONS), len(THRESHOLDS), dtype=torch.int64)
    if not objects:
        return found
    least = THRESHOLDS.clamp(max=1 - 1e-10)[:, None]
    free = present[:, None].expand(-1, len(THRESHOLDS), -1).clone()
    so_far = torch.zeros(batch, len(THRESHOLDS), dtype=torch.int64)
    for place in range(masks):
        if place in DETECTIONS:
            found[:, DETECTIONS.index(place)] = so_far
        of_mask = iou[torch.arange(batch), order[:, place], None].expand_as(free).masked_fill(~free, -1.0)
        best, taken = of_mask.max(2, keepdim=True)
        hit = best >= least
        free.scatter_(2, taken, free.gather(2, taken) & ~hit)
        so_far += hit[..., 0]
    for index, most in enumerate(DETECTIONS):
        if most >= masks:
            found[:, index] = so_far
        elif scores is None:
            found[used.sum(1) > most, index] = -1
    return found


def average_recall(found: Tensor, objects: Tensor) -> list[float | None]:
    """AR at each of DETECTIONS over all images; found [n, 3, 10] of `found_objects`, objects [n] their number.

    None without an object, or where masks without a ranking were cut off.
    """
    total = int(objects.sum())
    if not total:
        return [None] * len(DETECTIONS)
    means = (found.sum(0).double() / total).mean(1).tolist()
    return [None if (found[:, i] < 0).any() else mean for i, mean in enumerate(means)]


def by_detections(recall: Sequence[float | None]) -> dict[str, float | None]:
    """The three numbers by their names."""
    return {f"AR@{most}": value for most, value in zip(DETECTIONS, recall, strict=True)}
