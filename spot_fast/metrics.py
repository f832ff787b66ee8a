"""mBO, mIoU and FG-ARI of predicted label maps, all from one table of pixel counts per image.

For an image with predicted labels p and ground-truth labels g, `count_overlaps` gives c[k, j] = how many pixels that
count have p = k and g = j. Everything follows from c (SPOT, section 4), with areas as its row and
column sums:

    IoU[k, j] = c[k, j] / (area of k + area of j - c[k, j])
    mBO       = mean over non-empty ground-truth masks j > 0 of max_k IoU[k, j]
    mIoU      = mean over the same masks of IoU under the one-to-one matching that maximises it; unmatched masks give 0
    FG-ARI    = adjusted Rand index of c without column 0 (pixels of the ground truth's background)

Label 0 of the ground truth is background. Predictions have no background: each of the K masks counts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_kernels import linear_assignment, overlap_counts

METRICS = ("mbo_i", "mbo_c", "miou", "fg_ari")
MAX_LABEL = 255
_CHUNK = 2**21  # floats of upsampled masks held at a time


def labels_from_soft(masks: Tensor, size: int) -> Tensor:
    """The hard label map that soft masks on the patch grid stand for.

    masks [B, N, K], N = G x G in raster order → int64 [B, size, size] in 0…K-1: each mask is resized bilinearly
    (corners not aligned), then the largest wins, the first of equals. ValueError where N is no square or a mask is not
    finite.
    """
    if masks.ndim != 3 or not masks.shape[2]:
        raise ValueError(f"masks has shape {list(masks.shape)}: expected [B, N, K] with K of at least 1")
    batch, tokens, num_masks = masks.shape
    grid = math.isqrt(tokens)
    if grid * grid != tokens or not tokens:
        raise ValueError(f"masks has {tokens} tokens, which is not a square grid: expected [B, G * G, K]")
    if size < 1:
        raise ValueError(f"size is {size}: give the side of the label map in pixels, at least 1")
    if not torch.isfinite(masks).all():
        raise ValueError("masks holds NaN or infinity: the model's weights or its input are damaged")
    maps = masks.detach().float().mT.reshape(batch, num_masks, grid, grid)
    labels = torch.empty(batch, size, size, dtype=torch.int64, device=masks.device)
    step = max(1, _CHUNK // (num_masks * size * size))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        large = F.interpolate(maps[part], size=(size, size), mode="bilinear", align_corners=False)
        # max with indices is an order of magnitude faster than argmax over a strided dimension on a CPU.
        labels[part] = large.max(dim=1).indices
    return labels


def count_overlaps(pred: Tensor, num_pred: int, truth: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Pixels of each pair of labels: int64 [B, num_pred, J], J = largest ground-truth label + 1.

    pred [B, H, W] in 0…num_pred-1 and truth [B, H, W] in 0…255 (with gaps) are integer maps; a pixel where ignore
    [B, H, W] is not 0 is counted nowhere.
    """
    _check_map("pred", pred, pred.shape)
    _check_map("truth", truth, pred.shape)
    if pred.numel():
        low, high = (int(v) for v in pred.aminmax())
        if low < 0 or high >= num_pred:
            raise ValueError(f"pred has labels {low} to {high}, but num_pred is {num_pred}: expected 0 to num_pred - 1")
    num_truth = 1
    if truth.numel():
        low, high = (int(v) for v in truth.aminmax())
        if low < 0 or high > MAX_LABEL:
            raise ValueError(f"ground truth has labels {low} to {high}: renumber them to lie in 0 to {MAX_LABEL}")
        num_truth = high + 1
    valid = None
    if ignore is not None:
        _check_map("ignore", ignore, pred.shape)
        valid = (ignore == 0).flatten(1)
    return overlap_counts(pred.flatten(1), truth.flatten(1), num_pred, num_truth, valid)


def _check_map(name: str, labels: Tensor, shape: torch.Size) -> None:
    if labels.ndim != 3 or labels.shape != shape:
        raise ValueError(f"{name} has shape {list(labels.shape)}: expected [B, H, W], as pred, {list(shape)}")
    if labels.is_floating_point():
        raise ValueError(f"{name} is {labels.dtype}: expected an integer label map")


def pairwise_iou(counts: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of every predicted mask with every object: float64 [B, K, J-1], and which objects have pixels: [B, J-1].

    counts [B, K, J] from `count_overlaps`; column 0, the background, is no object but enlarges predicted masks.
    """
    overlap = counts[:, :, 1:]
    area = overlap.sum(1)
    union = counts.sum(2)[:, :, None] + area[:, None] - overlap
    return overlap.double() / union.clamp(min=1), area > 0


def best_overlap(iou: Tensor, present: Tensor) -> Tensor:
    """mBO of each image: float64 [B], NaN where no object is present. iou [B, K, J], present [B, J]."""
    best = iou.amax(1) if iou.shape[2] else iou.new_zeros(present.shape)
    return (best * present).sum(1) / present.sum(1)


def matched_iou(iou: Tensor, present: Tensor) -> Tensor:
    """mIoU of each image: float64 [B], NaN where no object is present. iou [B, K, J], present [B, J]."""
    # Absent objects have IoU 0 with everything: matching them as well changes no sum.
    columns = linear_assignment(1 - iou)
    matched = iou.gather(2, columns.clamp(min=0)[..., None])[..., 0] if iou.shape[2] else iou.new_zeros(columns.shape)
    return (matched * (columns >= 0)).sum(1) / present.sum(1)


def foreground_ari(counts: Tensor) -> Tensor:
    """Adjusted Rand index over foreground pixels of each image: float64 [B], 1 where its denominator is 0.

    counts [B, K, J] from `count_overlaps`. The last steps are Python integers: at 320 x 320 the products of pair
    counts exceed 64 bits.
    """
    objects = counts[:, :, 1:]
    both = _pairs(objects).sum((1, 2)).tolist()
    in_pred = _pairs(objects.sum(2)).sum(1).tolist()
    in_truth = _pairs(objects.sum(1)).sum(1).tolist()
    total = _pairs(objects.sum((1, 2))).tolist()
    scores = []
    for s, a, b, t in zip(both, in_pred, in_truth, total, strict=True):
        # (s - ab/t) / ((a + b)/2 - ab/t), both sides times 2t.
        denominator = t * (a + b) - 2 * a * b
        scores.append(2 * (s * t - a * b) / denominator if denominator else 1.0)
    return torch.tensor(scores, dtype=torch.float64)


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) // 2


def image_scores(
    pred: Tensor,
    num_pred: int,
    instances: Tensor,
    classes: Tensor | None = None,
    ignore: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each metric of each image as a fraction: float64 [B], NaN where it is not counted for that image.

    pred [B, H, W] in 0…num_pred-1; instances, classes and ignore [B, H, W] as in `data.base.Masks`. An image without
    masks (nothing but background, or everything ignored) has no mBO and no mIoU, but an FG-ARI of 1. mbo_c is NaN
    throughout where classes is None.
    """
    counts = count_overlaps(pred, num_pred, instances, ignore)
    iou, present = pairwise_iou(counts)
    scores = {
        "mbo_i": best_overlap(iou, present).cpu(),
        "mbo_c": torch.full((len(pred),), math.nan, dtype=torch.float64),
        "miou": matched_iou(iou, present).cpu(),
        "fg_ari": foreground_ari(counts),
    }
    if classes is not None:
        scores["mbo_c"] = best_overlap(*pairwise_iou(count_overlaps(pred, num_pred, classes, ignore))).cpu()
    return scores


class Scores:
    """Collects `image_scores` batch by batch."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(
        self,
        pred: Tensor,
        num_pred: int,
        instances: Tensor,
        classes: Tensor | None = None,
        ignore: Tensor | None = None,
    ) -> None:
        """Scores a batch; arguments and errors as `image_scores`."""
        self._batches.append(image_scores(pred, num_pred, instances, classes, ignore))

    def per_image(self) -> dict[str, Tensor]:
        """Each metric of every image in the order they were added: float64 [n], NaN where it is not counted."""
        empty = torch.empty(0, dtype=torch.float64)
        return {name: torch.cat([empty, *(batch[name] for batch in self._batches)]) for name in METRICS}

    def counted(self) -> dict[str, int]:
        """How many images each metric's mean is over."""
        return {name: int((~values.isnan()).sum()) for name, values in self.per_image().items()}

    def result(self) -> dict[str, float | None]:
        """Each metric's mean over the images that count, a fraction; None where there are none (mbo_c: no classes)."""
        means = {name: values.nanmean().item() for name, values in self.per_image().items()}
        return {name: None if math.isnan(mean) else mean for name, mean in means.items()}
