"""Scores of two partitions of an image, from their table of pixel counts: adjusted Rand index, panoptic quality."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adjusted_rand(counts: Tensor) -> Tensor:
    """Adjusted Rand index of each image (Hubert and Arabie 1985): float64 [B], 1 where its denominator is 0.

    counts int64 [B, K, J]. In Python integers at the end: at 320 x 320 products of pair counts exceed 64 bits.
    """
    both = _pairs(counts).sum((1, 2)).tolist()
    in_pred = _pairs(counts.sum(2)).sum(1).tolist()
    in_truth = _pairs(counts.sum(1)).sum(1).tolist()
    total = _pairs(counts.sum((1, 2))).tolist()
    scores = []
    for s, a, b, t in zip(both, in_pred, in_truth, total, strict=True):
        # (s - ab/t) / ((a + b)/2 - ab/t), numerator and denominator times 2t to stay in integers.
        denominator = t * (a + b) - 2 * a * b
        scores.append(2 * (s * t - a * b) / denominator if denominator else 1.0)
    return torch.tensor(scores, dtype=torch.float64)


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) // 2


def panoptic_quality(counts: Tensor, void: Tensor) -> Tensor:
    """Panoptic quality of each image with a single class (Kirillov et al. 2019, section 4.1): float64 [B].

    PQ = sum of IoU over matches / (matches + half the other predicted masks + half the other true segments); a mask and
    a segment match if their IoU is above 1/2, which makes matches unique. counts int64 [B, K, J] of pixels with a true
    segment; void int64 [B, K]: each mask's other pixels. They belong to no mask, and an unmatched mask that consists of
    them for more than half is not counted, nor is one without pixels. NaN without a true segment.
    """
    in_pred, in_truth = counts.sum(2), counts.sum(1)
    union = in_pred[:, :, None] + in_truth[:, None] - counts
    # Half of it in integers: an IoU of exactly 1/2 is no match.
    match = 2 * counts > union
    matched = match.any(2)
    others = (in_pred > 0) & ~matched & (2 * void <= in_pred + void)
    overlap = (counts.double() / union.clamp(min=1) * match).sum((1, 2))
    true_segments = (in_truth > 0).sum(1)
    matches = matched.sum(1)
    quality = overlap / (matches + others.sum(1) / 2 + (true_segments - matches) / 2).clamp(min=0.5)
    return quality.masked_fill(true_segments == 0, math.nan)
