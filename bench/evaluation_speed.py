"""What the metrics cost beside a per-mask implementation, on the same images, and that both give the same scores.

    python bench/evaluation_speed.py [--images 64] [--size 320] [--masks 7] [--grid 14] [--rounds 5] [--threads 1]

Both start from soft masks on the patch grid, for decoder and slot masks, and end with mBO_i, mBO_c, mIoU and FG-ARI of
every image. Ours is what `spot_fast.evaluate` runs: label maps in one pass, one table of counts for instances and
classes. The other one does what published code does: every mask resized to a full map of floats, argmax, one-hot maps
of predictions and of ground truth, and an IoU for each pair of maps, image by image.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from harness.machine import commit, cpu_name
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spot_fast.evaluation.metrics import SPOT_METRICS, count_pairs, labels_from_soft, pair_labels, scores_of_counts
from spot_kernels import chosen_backend

MOST_OBJECTS = 15


@dataclass(frozen=True)
class Images:
    """soft: of each kind of masks [B, N, K]; instances, classes and ignore uint8 [B, size, size]."""

    soft: tuple[Tensor, Tensor]
    instances: Tensor
    classes: Tensor
    ignore: Tensor


@dataclass(frozen=True)
class Result:
    """Milliseconds an image for both kinds of masks, medians; difference: the largest of any score of any image."""

    ours_ms: float
    per_mask_ms: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.per_mask_ms / self.ours_ms


def generated(images: int, *, size: int, masks: int, grid: int, seed: int = 0) -> Images:
    """Blobs in place of objects, 1 to 15 an image with a background, of 80 classes; 3 % of the pixels are ignored."""
    rng = np.random.default_rng(seed)
    soft = tuple(
        torch.from_numpy(rng.standard_normal((images, grid * grid, masks), np.float32)).mul(3).softmax(-1)
        for _ in range(2)
    )
    maps = []
    for _ in range(images):
        objects = int(rng.integers(1, MOST_OBJECTS + 1))
        instances = labels_from_soft(torch.from_numpy(rng.random((1, 64, objects + 1), np.float32)), size)[0]
        of = torch.tensor([0, *rng.integers(1, 81, objects)], dtype=torch.uint8)
        maps.append((instances, of[instances.long()]))
    hidden = labels_from_soft(torch.from_numpy(rng.random((images, 256, 30), np.float32)), size) == 0
    return Images(soft, *(torch.stack(m) for m in zip(*maps, strict=True)), hidden.to(torch.uint8))


def ours(given: Images, batch_size: int = 32) -> Tensor:
    """float64 [kinds, B, metrics], NaN where a metric does not count."""
    batches = []
    for start in range(0, len(given.instances), batch_size):
        part = slice(start, start + batch_size)
        truth = pair_labels(given.instances[part], given.classes[part], given.ignore[part])
        kinds = []
        for soft in given.soft:
            labels = labels_from_soft(soft[part], given.instances.shape[-1])
            scores = scores_of_counts(count_pairs(labels, soft.shape[2], truth).cpu(), truth)
            kinds.append(torch.stack([scores[name] for name in SPOT_METRICS], 1))
        batches.append(torch.stack(kinds))
    return torch.cat(batches, 1)


def per_mask(given: Images) -> Tensor:
    """The same by one-hot maps, mask by mask and image by image."""
    kinds = []
    for soft in given.soft:
        scores = []
        for masks, instances, classes, ignore in zip(soft, given.instances, given.classes, given.ignore, strict=True):
            scores.append(_per_mask_scores(masks, instances, classes, ignore == 0))
        kinds.append(torch.tensor(scores, dtype=torch.float64))
    return torch.stack(kinds)


def _per_mask_scores(masks: Tensor, instances: Tensor, classes: Tensor, keep: Tensor) -> list[float]:
    grid, size = math.isqrt(len(masks)), instances.shape[-1]
    maps = masks.T.reshape(1, -1, grid, grid).contiguous()
    large = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)[0]
    pred = [mask & keep for mask in F.one_hot(large.argmax(0), len(large)).permute(2, 0, 1).bool()]
    overlaps = {}
    for name, labels in (("instances", instances), ("classes", classes)):
        truth = [mask & keep for mask in F.one_hot(labels.long()).permute(2, 0, 1).bool()[1:]]
        truth = [mask for mask in truth if mask.any()]
        overlaps[name] = np.array([[_iou(p, t) for t in truth] for p in pred]).reshape(len(pred), len(truth))
    of_instances, of_classes = overlaps["instances"], overlaps["classes"]
    if not of_instances.shape[1]:
        return [math.nan, math.nan, math.nan, 1.0]
    rows, columns = linear_sum_assignment(-of_instances)
    return [
        of_instances.max(0).mean(),
        of_classes.max(0).mean(),
        of_instances[rows, columns].sum() / of_instances.shape[1],
        _one_hot_ari(pred, instances, keep),
    ]


def _iou(a: Tensor, b: Tensor) -> float:
    return (a & b).sum().item() / max(1, (a | b).sum().item())


def _one_hot_ari(pred: Sequence[Tensor], instances: Tensor, keep: Tensor) -> float:
    truth = F.one_hot(instances.long()).flatten(0, 1).double()[:, 1:] * keep.flatten()[:, None]
    counts = truth.T @ torch.stack(list(pred)).flatten(1).double().T
    both, of_truth, of_pred, pixels = counts, counts.sum(1), counts.sum(0), counts.sum()
    s, a, b, t = ((n * (n - 1) / 2).sum() for n in (both, of_truth, of_pred, pixels))
    expected = a * b / t.clamp(min=1)
    denominator = (a + b) / 2 - expected
    return ((s - expected) / denominator).item() if denominator else 1.0


def measure(given: Images, rounds: int = 5) -> Result:
    """Medians of calls in turn; what slows the machine down slows down both."""
    images = len(given.instances)
    difference = (ours(given) - per_mask(given)).nan_to_num().abs().max().item()
    if not torch.equal(ours(given).isnan(), per_mask(given).isnan()):
        difference = math.inf
    calls: list[Callable[[Images], Tensor]] = [ours, per_mask]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(given)
            taken.append(1e3 * (time.perf_counter() - start) / images)
    return Result(*(statistics.median(taken) for taken in times), difference)


def on_device(given: Images, device: torch.device, rounds: int = 5) -> Result:
    """`measure` with ours on `device`, the whole of it: from soft masks there to scores here."""
    moved = Images(
        tuple(soft.to(device) for soft in given.soft),
        *(maps.to(device) for maps in (given.instances, given.classes, given.ignore)),
    )
    reference = ours(given)
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        found = ours(moved)
        taken.append(1e3 * (time.perf_counter() - start) / len(given.instances))
    # Two masks may tie to rounding where another processor adds up in another order.
    return Result(statistics.median(taken[1:]), math.nan, (found - reference).nan_to_num().abs().max().item())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=320, help="side of the label maps, pixels")
    parser.add_argument("--masks", type=int, default=7)
    parser.add_argument("--grid", type=int, default=14, help="side of the patch grid")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    given = generated(args.images, size=args.size, masks=args.masks, grid=args.grid)
    result = measure(given, args.rounds)
    backend = chosen_backend("mask_labels", given.soft[0])
    threads = f"{args.threads} thread{'s' * (args.threads != 1)}"
    print(f"{cpu_name()}, {threads}; torch {torch.__version__}; commit {commit()}")
    print(
        f"{args.images} images, {args.grid} × {args.grid} tokens, {args.masks} masks, label maps {args.size} × "
        f"{args.size}; decoder and slot masks together, upsampling included"
    )
    print(f"ours ({backend})  {result.ours_ms:8.2f} ms an image")
    print(f"per mask       {result.per_mask_ms:8.2f} ms an image")
    print(f"ratio          {result.ratio:8.1f}")
    print(f"largest difference of any score of any image {result.difference:.1e}")
    return 0 if result.difference < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
