"""How good masks on a grid of tokens can be: the ground truth itself, rounded to the grid and scored like a model's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.tables import METRICS
from spot_fast.data.base import ImageSet
from spot_fast.evaluation.metrics import Scores, count_pairs, labels_from_soft
from spot_fast.evaluation.scoring import stack_truth


def token_ceiling(val_set: ImageSet, grid: int, batch_size: int = 32) -> dict[str, float | None]:
    """Scores, as fractions by metric, of masks that give each of grid x grid tokens to the label with most of its
    pixels.

    Each label is a mask, the background too, however many slots a model has. The masks are enlarged as a model's are.
    mBO_c is of instance masks, so it bounds no model's.
    """
    scores = Scores()
    for start in range(0, len(val_set), batch_size):
        masks = [val_set.val_masks(index) for index in range(len(val_set))[start : start + batch_size]]
        truth = stack_truth(masks, torch.device("cpu"))
        labels = torch.stack(list(rounded([m.instances for m in masks], grid)))
        count = int(labels.max()) + 1
        size = truth.labels.shape[-1]
        predicted = labels_from_soft(F.one_hot(labels, count).float(), size)
        scores.add_counts(count_pairs(predicted, count, truth), truth)
    result = scores.result()
    return {name: result[name] for name in METRICS}


def rounded(maps: list[Tensor], grid: int) -> Iterator[Tensor]:
    """Label maps [S, S] → int64 [grid * grid]: the place, among the map's own labels, of that with most pixels in each
    token; the lowest of equals. Pixels that count nowhere (labels below 0) are no one's."""
    for labels in maps:
        own = labels.unique()
        own = own[own >= 0]
        share = F.adaptive_avg_pool2d((labels[None] == own[:, None, None]).float(), grid)
        yield share.flatten(1).argmax(0)
