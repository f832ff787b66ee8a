"""Baseline masks, which need no training: blocks of the image, and k-means of its features. A model has to beat both.

Block masks are those of SPOT's Table 6: columns of equal width, each cut into blocks of equal height. k-means runs per
image on the features that the decoder reconstructs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spot_fast.random_streams import Stream, generator
from spot_fast.system.devices import send

MAX_COLUMNS = 4
# Columns and masks that the paper chose for each data set; and the whole image as one mask, the reference for FG-ARI.
PUBLISHED_BLOCKS = {"coco": (2, 7), "voc": (2, 6), "movi_c": (3, 11), "movi_e": (4, 24)}
ONE_BLOCK = (1, 1)
STARTS = 4
_MAX_ITERATIONS = 100
_CHECK_EVERY = 8  # iterations between checks for convergence on a GPU


def block_masks(columns: int, num_masks: int, size: int) -> Tensor:
    """int64 [size, size] in 0…num_masks-1: columns of num_masks // columns blocks each, the last with the remainder.

    Numbered down the columns, left to right. Widths and heights are rounded up: the last column and the last block of
    each are smaller, or missing where the side has too few pixels.
    """
    if not 1 <= columns <= num_masks:
        raise ValueError(f"columns is {columns}: give 1 to num_masks ({num_masks})")
    if size < 1:
        raise ValueError(f"size is {size}: give the side of the label map in pixels, at least 1")
    pixel = torch.arange(size)
    column = pixel // math.ceil(size / columns)
    blocks = num_masks // columns
    in_full = pixel // math.ceil(size / blocks)
    in_last = pixel // math.ceil(size / (num_masks - blocks * (columns - 1)))
    return column * blocks + torch.where(column == columns - 1, in_last[:, None], in_full[:, None])


def block_mask_candidates(num_masks: int, size: int) -> dict[int, Tensor]:
    """`block_masks` of every column count from 1 to 4 that num_masks allows: {columns: int64 [size, size]}.

    "The best block mask" of a model with K slots is the candidate of K masks with the highest mBO_i.
    """
    return {columns: block_masks(columns, num_masks, size) for columns in range(1, min(MAX_COLUMNS, num_masks) + 1)}


def published_layouts(preset: str) -> list[tuple[int, int]]:
    """Columns and masks of the block masks in SPOT's Table 6 for the data set of `preset`, the single mask last."""
    return [PUBLISHED_BLOCKS[preset], ONE_BLOCK] if preset in PUBLISHED_BLOCKS else [ONE_BLOCK]


def kmeans_labels(
    features: Tensor,
    k: int,
    seed: int = 0,
    *,
    indices: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """k-means of each image's tokens: features [B, N, D] → int64 [B, N] in 0…k-1, on the features' device.

    Greedy k-means++ starts (the best of 2 + ln k draws for each centre), Lloyd's iterations until no label changes (at
    most 100), best of 4 starts by the sum of squared distances. A cluster that runs empty moves to the token farthest
    from its own centre. normalise: scale tokens to unit length first, so that distance is cosine distance.

    Deterministic: the draws of image b depend on seed and indices[b] (default: b) only, not on the batch it comes in.
    """
    if features.ndim != 3:
        raise ValueError(f"features has shape {list(features.shape)}: expected [B, N, D]")
    if not 1 <= k <= features.shape[1]:
        raise ValueError(f"k is {k}: give 1 to the number of tokens ({features.shape[1]})")
    batch, tokens, _ = features.shape
    indices = torch.arange(batch) if indices is None else indices
    if len(indices) != batch:
        raise ValueError(f"indices has {len(indices)} entries: expected one for each of the {batch} images in features")
    points = features.detach().float()
    if normalise:
        points = F.normalize(points, dim=-1)
    trials = 2 + int(math.log(k))
    draws = [generator(Stream.KMEANS, seed, i).random((STARTS, k, trials), dtype=np.float32) for i in indices]
    draws = torch.from_numpy(np.array(draws, np.float32).reshape(batch, STARTS, k, trials))
    draws = send(draws, points.device)
    centres = _plus_plus(points, draws)
    labels = torch.full((batch, STARTS, tokens), -1, device=points.device)
    # A check waits for a GPU, so it is rare there; iterations beyond convergence change nothing.
    every = _CHECK_EVERY if _reading_waits(points.device) else 1
    for iteration in range(1, _MAX_ITERATIONS + 1):
        before = labels
        nearest, labels = _distances(points, centres).min(-1)
        if iteration % every == 0 and torch.equal(labels, before):
            break
        centres = _means(points, labels, nearest, k)
    best = nearest.sum(-1).argmin(1)
    return labels[torch.arange(batch, device=points.device), best]


def _reading_waits(device: torch.device) -> bool:
    """Whether reading a tensor of `device` makes the host wait for computations there."""
    return device.type != "cpu"


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [B, R, N, k] of points [B, N, D] to centres [B, R, k, D]."""
    batch, starts, k, width = centres.shape
    dot = points @ centres.reshape(batch, starts * k, width).mT
    dot = dot.reshape(batch, points.shape[1], starts, k).transpose(1, 2)
    return (points.square().sum(-1)[:, None, :, None] - 2 * dot + centres.square().sum(-1)[:, :, None]).clamp(min=0)


def _take(points: Tensor, index: Tensor) -> Tensor:
    """points [B, N, D] at index [B, ...] → [B, ..., D]."""
    width = points.shape[-1]
    return points.gather(1, index.flatten(1)[..., None].expand(-1, -1, width)).reshape(*index.shape, width)


def _plus_plus(points: Tensor, draws: Tensor) -> Tensor:
    """Greedy k-means++: centres [B, R, k, D] from points [B, N, D] and uniform draws [B, R, k, trials]."""
    batch, starts, k, trials = draws.shape
    tokens = points.shape[1]
    first = (draws[:, :, 0, 0] * tokens).long().clamp(max=tokens - 1)
    chosen = [first]
    nearest = _distances(points, _take(points, first)[:, :, None])[..., 0]
    for i in range(1, k):
        cumulative = nearest.cumsum(-1)
        threshold = draws[:, :, i] * cumulative[..., -1:]
        candidates = torch.searchsorted(cumulative, threshold, right=True).clamp(max=tokens - 1)
        reached = torch.minimum(nearest[..., None], _distances(points, _take(points, candidates)))
        best = reached.sum(2).argmin(-1, keepdim=True)
        chosen.append(candidates.gather(-1, best)[..., 0])
        nearest = reached.gather(-1, best[:, :, None].expand(-1, -1, tokens, -1))[..., 0]
    return _take(points, torch.stack(chosen, -1))


def _means(points: Tensor, labels: Tensor, nearest: Tensor, k: int) -> Tensor:
    """Mean of each cluster [B, R, k, D]; the j-th empty one moves to the j-th of the tokens by distance `nearest`."""
    batch, starts, _ = labels.shape
    member = F.one_hot(labels, k).to(points.dtype)
    sums = (member.transpose(2, 3).flatten(1, 2) @ points).unflatten(1, (starts, k))
    size = member.sum(2)
    empty = size == 0
    means = sums / size.clamp(min=1)[..., None]
    if _reading_waits(points.device) or empty.any():
        farthest = nearest.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        index = farthest.gather(-1, (empty.cumsum(-1) - 1).clamp(min=0))
        means = torch.where(empty[..., None], _take(points, index), means)
    return means
