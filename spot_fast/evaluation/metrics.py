"""mBO, mIoU, ARI and panoptic quality of predicted label maps, all from one table of pixel counts per image.

A pixel of the ground truth has an instance g and a class h, in some sets a panoptic segment too. Each pair (g, h) in an
image gets a number j, and c[k, j] counts the pixels of predicted label k and pair j, in one pass. Summing columns of
the same instance, class or segment gives the contingency tables of all metrics, with areas as row and column sums:

    IoU[k, g] = c[k, g] / (area of k + area of g - c[k, g])
    mBO       = mean over non-empty ground-truth masks g > 0 of max_k IoU[k, g]
    mIoU      = mean over the same masks of IoU under the one-to-one matching that maximises it; unmatched masks give 0
    FG-ARI    = adjusted Rand index of c without column 0 (pixels of the ground truth's background)
    ARI       = adjusted Rand index of c, the background a segment
    P-ARI     = adjusted Rand index of the table of panoptic segments, things and stuff
    PQ        = panoptic quality of that table, or of c where the set has no panoptic segments (partitions.py)

The first four are SPOT's (section 4); P-ARI and PQ are what FT-DINOSAUR (arXiv 2408.09162) reports beside FG-ARI and
mBO. Label 0 of the ground truth is background; each of the K predicted masks counts. `Rules` are those of other code
bases than SPOT's (protocols.py names them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spot_fast.evaluation.partitions import adjusted_rand, panoptic_quality
from spot_fast.evaluation.recall import DETECTIONS, THRESHOLDS, average_recall, found_objects
from spot_fast.system.devices import send
from spot_kernels import linear_assignment, mask_labels, overlap_counts

SPOT_METRICS = ("mbo_i", "mbo_c", "miou", "fg_ari")
METRICS = (*SPOT_METRICS, "ari", "p_ari", "pq")
MAX_LABEL = 255  # of the ground truth; with larger labels each image is renumbered
# Labels of pixels without a single instance. VOID: counted nowhere. OVERLAP: background in the truth, and a predicted
# mask of their own.
VOID, OVERLAP = -1, -2
# Bounds of instance sizes, as fractions of the label map: SPOT, Fig. 7.
SIZE_BINS = (0.0, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 1.0)
_MOST_MASKS = 256
_MOST_CODES = 1 << 16  # possible pairs; above, only those that occur are listed


@dataclass(frozen=True)
class Rules:
    """Counting rules. The defaults are SPOT's.

    mbo_background, miou_background  the background is a ground-truth mask like any other
    classes                          there is an mBO over class masks
    empty_ari                        an image without foreground has an FG-ARI of 1 instead of none
    cosine                           mIoU uses the matching with the largest sum of overlap / √(area · area), and mIoU
                                     and mBO leave out objects without a partner
    per_object                       mBO and mIoU are means over all objects, not over the images' means
    """

    mbo_background: bool = False
    miou_background: bool = False
    classes: bool = True
    empty_ari: bool = True
    cosine: bool = False
    per_object: bool = False


SPOT_RULES = Rules()


@dataclass(frozen=True)
class Pairs:
    """Ground truth of B images as pairs of instance and class.

    labels     [B, H, W] int16 or int64 on the maps' device: the number of each pixel's pair
    instances  [B, J] int64 on the CPU: each pair's instance, VOID or OVERLAP; VOID beyond the image's last pair
    classes    [B, J] likewise; all VOID without classes
    panoptic   [B, J] likewise, of panoptic segments; None in sets without
    """

    labels: Tensor
    instances: Tensor
    classes: Tensor
    panoptic: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def labels_from_soft(masks: Tensor, size: int) -> Tensor:
    """Hard label maps of soft masks on the patch grid.

    masks [B, N, K], N = G x G in raster order, K at most 256 → uint8 [B, size, size] in 0…K-1: masks are resized
    bilinearly (corners not aligned), then the largest wins, the first of equals. ValueError if N is not a square number
    or a mask is not finite.
    """
    if masks.ndim != 3 or not 1 <= masks.shape[2] <= _MOST_MASKS:
        raise ValueError(f"masks has shape {list(masks.shape)}: expected [B, N, K] with K of 1 to {_MOST_MASKS}")
    tokens = masks.shape[1]
    if not tokens or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"masks has {tokens} tokens, which is not a square grid: expected [B, G * G, K]")
    if size < 1:
        raise ValueError(f"size is {size}: give the side of the label map in pixels, at least 1")
    if not torch.isfinite(masks).all():
        raise ValueError("masks holds NaN or infinity: the model's weights or its input are damaged")
    return mask_labels(masks.detach() if masks.is_floating_point() else masks.float(), size)


def pair_labels(
    instances: Tensor, classes: Tensor | None = None, ignore: Tensor | None = None, panoptic: Tensor | None = None
) -> Pairs:
    """Numbers the pairs of instance and class of each image; with panoptic segments, the triples.

    instances, classes and panoptic [B, H, W] are integer maps of labels from 0 on (with gaps), VOID or OVERLAP; where
    ignore [B, H, W] is not 0 the first two are VOID. With labels above 255 each image is renumbered from 1, in order:
    no score depends on the numbers. Waits for a GPU twice for each of pairs and triples. ValueError names a map that
    does not fit.
    """
    maps = [instances] if classes is None else [instances, classes]
    for labels in maps if panoptic is None else [*maps, panoptic]:
        _check_map("truth", labels, instances.shape)
    if not instances.numel():
        nothing = torch.full((len(instances), 1), VOID)
        return Pairs(instances.to(torch.int16), nothing, nothing, None if panoptic is None else nothing)
    maps, bounds = _bounded([labels.flatten(1) for labels in maps])
    (low, high), (low_class, high_class) = bounds[0], bounds[-1]
    wide = 1 if classes is None else high_class - low_class + 1
    codes = (high - low + 1) * wide + 1
    # Code 0 is a void pixel. int32 until it must be an index: on a CPU this costs as many bytes as it moves.
    code = maps[0].to(torch.int32 if codes < 2**31 else torch.int64) - (low - 1)
    if classes is not None:
        code = code.sub_(1).mul_(wide).add_(maps[1].to(code.dtype)).sub_(low_class - 1)
    if ignore is not None:
        _check_map("ignore", ignore, instances.shape)
        code.masked_fill_(ignore.flatten(1) != 0, 0)
    labels, of_code = _numbered(code.long(), codes)
    pair, void = of_code - 1, of_code < 1
    of = torch.full((2, *pair.shape), VOID)
    of[0] = (pair // wide + low).masked_fill(void, VOID)
    if classes is not None:
        of[1] = (pair % wide + low_class).masked_fill(void, VOID)
    if panoptic is None:
        return Pairs(labels.reshape(instances.shape), of[0], of[1])
    (segments,), ((low, high),) = _bounded([panoptic.flatten(1)])
    wide = high - low + 1
    labels, of_code = _numbered(labels.long().mul_(wide).add_(segments).sub_(low), of.shape[2] * wide)
    beyond = of_code < 0
    of = of.gather(2, (of_code // wide).clamp(min=0).expand(2, -1, -1)).masked_fill(beyond, VOID)
    return Pairs(labels.reshape(instances.shape), of[0], of[1], (of_code % wide + low).masked_fill(beyond, VOID))


def _bounded(maps: list[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Maps [B, P], renumbered where labels are too large, and their bounds; ValueError for labels that mean nothing."""
    bounds = _bounds(maps)
    for low, high in bounds:
        if low < OVERLAP:
            raise ValueError(
                f"ground truth has labels {low} to {high}: expected 0 for the background, 1 and above for objects"
            )
    if any(high > MAX_LABEL for _, high in bounds):
        maps = [_renumbered(labels) for labels in maps]
        bounds = _bounds(maps)
    return maps, bounds


def _numbered(code: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Each image's codes, int64 [B, P] in 0…codes-1, numbered from 0 in order.

    Returns the numbers, int16 or int64 [B, P] on the codes' device, and the code of each number, int64 [B, J] on the
    CPU, -1 beyond the image's last.
    """
    if codes > _MOST_CODES:
        listed, code = code.unique(return_inverse=True)
        listed, codes = listed.cpu(), len(listed)
    else:
        listed = torch.arange(codes)
    present = torch.zeros(len(code), codes, dtype=torch.bool, device=code.device).scatter_(1, code, True).cpu()
    number = present.cumsum(1) - 1
    most = int(present.sum(1).max())
    image, index = present.nonzero(as_tuple=True)
    of = torch.full((len(code), most), -1)
    of[image, number[image, index]] = listed[index]
    return send(number.to(torch.int16) if most < 2**15 else number, code.device).gather(1, code), of


def _bounds(maps: list[Tensor]) -> list[tuple[int, int]]:
    """(smallest, largest) label of each map."""
    bounds = torch.stack([bound.long() for labels in maps for bound in labels.aminmax()]).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _renumbered(labels: Tensor) -> Tensor:
    """int64 [B, P]: each image's labels above 0 as 1, 2, … in their order, the others as they are."""
    labels = labels.long()
    rows = []
    for image in labels:
        values, number = image.clamp(min=0).unique(return_inverse=True)
        # Objects begin at 1, also without background.
        rows.append(torch.where(image > 0, number + (values[0] > 0), image))
    return torch.stack(rows)


def count_pairs(pred: Tensor, num_pred: int, truth: Pairs) -> Tensor:
    """Pixel counts of each predicted label and pair: int64 [B, num_pred, J] on pred's device; pred [B, H, W]."""
    return overlap_counts(pred.flatten(1), truth.labels.flatten(1), num_pred, truth.instances.shape[1])


def count_overlaps(pred: Tensor, num_pred: int, truth: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Pixel counts of each pair of labels: int64 [B, num_pred, J] on the CPU, J = largest ground-truth label + 1.

    pred [B, H, W] in 0…num_pred-1; truth and ignore as instances and ignore of `pair_labels`.
    """
    _check_pred(pred, num_pred, truth)
    pairs = pair_labels(truth, None, ignore)
    return merge_columns(count_pairs(pred, num_pred, pairs).cpu(), pairs.instances)


def merge_columns(counts: Tensor, of: Tensor) -> Tensor:
    """Adds up pairs of the same label: counts [B, K, J] of pairs, of [B, J] their labels → [B, K, labels].

    VOID pairs are left out. OVERLAP pairs go to one more row, a predicted mask of their own, in column 0 (background).
    """
    labels = max(0, int(of.max()) if of.numel() else 0) + 1
    overlap = of == OVERLAP
    rows = counts.shape[1] + bool(overlap.any())
    merged = counts.new_zeros(len(counts), rows, labels + 1)
    column = of.where(of >= 0, labels)  # VOID and OVERLAP: a last column, cut off below
    merged[:, : counts.shape[1]].scatter_add_(2, column[:, None].expand(-1, counts.shape[1], -1), counts)
    if rows > counts.shape[1]:
        merged[:, -1, 0] = (counts.sum(1) * overlap).sum(1)
    return merged[:, :, :labels]


def _check_pred(pred: Tensor, num_pred: int, truth: Tensor) -> None:
    _check_map("pred", pred, pred.shape)
    _check_map("truth", truth, pred.shape)
    if pred.numel():
        low, high = (int(v) for v in pred.aminmax())
        if low < 0 or high >= num_pred:
            raise ValueError(f"pred has labels {low} to {high}, but num_pred is {num_pred}: expected 0 to num_pred - 1")


def _check_map(name: str, labels: Tensor, shape: torch.Size) -> None:
    if labels.ndim != 3 or labels.shape != shape:
        raise ValueError(f"{name} has shape {list(labels.shape)}: expected [B, H, W], as pred, {list(shape)}")
    if labels.is_floating_point():
        raise ValueError(f"{name} is {labels.dtype}: expected an integer label map")


def pairwise_iou(counts: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of every predicted with every ground-truth mask, float64 [B, K, J], and whether the latter has pixels [B, J].

    counts [B, K, J] from `count_overlaps`.
    """
    area = counts.sum(1)
    union = counts.sum(2)[:, :, None] + area[:, None] - counts
    return counts.double() / union.clamp(min=1), area > 0


def best_overlap(iou: Tensor, present: Tensor) -> Tensor:
    """mBO of each image: float64 [B], NaN where no mask is present. iou [B, K, J], present [B, J]."""
    best = iou.amax(1) if iou.shape[2] else iou.new_zeros(present.shape)
    return (best * present).sum(1) / present.sum(1)


def matched_iou(iou: Tensor, present: Tensor) -> Tensor:
    """mIoU of each image, as `best_overlap`."""
    # Absent masks have IoU 0 with every prediction: matching them too changes no sum.
    return _matched(iou, linear_assignment(1 - iou)).sum(1) / present.sum(1)


def _matched(values: Tensor, columns: Tensor) -> Tensor:
    """values [B, K, J] at columns [B, K]: [B, K], 0 for a row without a column (-1)."""
    if not values.shape[2]:
        return values.new_zeros(columns.shape)
    return values.gather(2, columns.clamp(min=0)[..., None])[..., 0] * (columns >= 0)


def foreground_ari(counts: Tensor) -> Tensor:
    """`adjusted_rand` over the foreground pixels of each image: float64 [B]; counts [B, K, J] of `count_overlaps`."""
    return adjusted_rand(counts[:, :, 1:])


def scores_of_counts(
    counts: Tensor, truth: Pairs, rules: Rules = SPOT_RULES, confidence: Tensor | None = None
) -> dict[str, Tensor]:
    """Each metric of each image as a fraction, float64 [B], NaN where it is not counted, from `count_pairs` on the CPU.

    Also int64 [B] "objects", the number of masks in mBO_i, and "used", that of predicted masks with pixels;
    "size_counts" int64 and "size_sums" float64 [B, bins], the number of instances in each of SIZE_BINS (above its lower
    bound, at most its upper; without void pixels, as a fraction of the label map), and the sum of their best IoU;
    "found" int64 [B, 3, 10] of `found_objects`, the masks ranked by `confidence` [B, K], and "foreground", how many
    objects there are.
    """
    pixels = truth.labels[0].numel() if len(truth) else 0
    table = merge_columns(counts, truth.instances)
    iou, present = pairwise_iou(table)
    first = 0 if rules.mbo_background else 1  # column of the first ground-truth mask that counts
    scores = {
        "mbo_i": best_overlap(iou[:, :, first:], present[:, first:]),
        "mbo_c": torch.full((len(counts),), math.nan, dtype=torch.float64),
        "fg_ari": foreground_ari(table),
        # Without a pixel that counts there is nothing to compare.
        "ari": adjusted_rand(table).where(present.any(1), math.nan),
        "objects": present[:, first:].sum(1),
        "used": counts.any(2).sum(1),
    }
    if rules.cosine:
        scores["mbo_i"], scores["miou"], scores["objects"] = _cosine_matched(table, iou, present)
    else:
        matched = 0 if rules.miou_background else 1
        scores["miou"] = matched_iou(iou[:, :, matched:], present[:, matched:])
    if rules.classes and bool((truth.classes >= 0).any()):
        of_classes = pairwise_iou(merge_columns(counts, truth.classes))
        scores["mbo_c"] = best_overlap(*(part[..., first:] for part in of_classes))
    if not rules.empty_ari:
        scores["fg_ari"] = scores["fg_ari"].where(present[:, 1:].any(1), math.nan)
    scores["p_ari"], scores["pq"] = _panoptic(counts, table, truth)
    scores["size_sums"], scores["size_counts"] = _by_size(iou, table.sum(1), pixels)
    masks = counts.shape[1]  # the table may have a row more
    scores["found"] = found_objects(iou[:, :masks, 1:], present[:, 1:], counts.any(2), confidence)
    scores["foreground"] = present[:, 1:].sum(1)
    return scores


def _panoptic(counts: Tensor, table: Tensor, truth: Pairs) -> tuple[Tensor, Tensor]:
    """P-ARI and PQ of each image, float64 [B].

    Without panoptic segments there is no P-ARI, and PQ is of the instances and the background as one segment more;
    pixels of several instances are then void, as no predicted mask is theirs (`merge_columns` makes one up).
    """
    if truth.panoptic is None:
        own = table[:, : counts.shape[1]]
        nothing = torch.full((len(counts),), math.nan, dtype=torch.float64)
        return nothing, panoptic_quality(own, counts.sum(2) - own.sum(2))
    segments = merge_columns(counts, truth.panoptic)
    in_all = counts.sum(2)
    rand = adjusted_rand(segments).where(segments.any(2).any(1), math.nan)
    return rand, panoptic_quality(segments, in_all - segments.sum(2))


def _cosine_matched(table: Tensor, iou: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mBO and mIoU over the objects with a partner, and their number, each [B]."""
    areas = table.sum(2)[:, :, None].double(), table.sum(1)[:, None, 1:].double()
    cosine = table[:, :, 1:] / ((areas[0] * areas[1]).sqrt() + 1e-6)
    # Absent objects cost so much that they get a partner only if no present one is left.
    columns = linear_assignment((1 - cosine).masked_fill(~present[:, None, 1:], 1e4))
    paired = _matched(present[:, None, 1:].expand_as(cosine).long(), columns)
    best = _matched(iou[:, :, 1:].amax(1, keepdim=True).expand_as(cosine), columns) if cosine.shape[2] else paired
    number = paired.sum(1)
    return (best * paired).sum(1) / number, (_matched(iou[:, :, 1:], columns) * paired).sum(1) / number, number


def _by_size(iou: Tensor, area: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """size_sums and size_counts of `scores_of_counts`."""
    bins = len(SIZE_BINS) - 1
    sums, numbers = iou.new_zeros(len(iou), bins), area.new_zeros(len(iou), bins)
    area = area[:, 1:]
    if area.shape[1]:
        size_bin = torch.bucketize(area.double() / pixels, torch.tensor(SIZE_BINS[1:-1], dtype=torch.float64))
        sums.scatter_add_(1, size_bin, iou[:, :, 1:].amax(1) * (area > 0))
        numbers.scatter_add_(1, size_bin, (area > 0).long())
    return sums, numbers


def image_scores(
    pred: Tensor,
    num_pred: int,
    instances: Tensor,
    classes: Tensor | None = None,
    ignore: Tensor | None = None,
    rules: Rules = SPOT_RULES,
    panoptic: Tensor | None = None,
) -> dict[str, Tensor]:
    """`scores_of_counts` of label maps.

    pred [B, H, W] in 0…num_pred-1; the others [B, H, W] as in `pair_labels`. An image without objects has no mBO and no
    mIoU, but an FG-ARI of 1. mbo_c is NaN without classes, p_ari without panoptic segments.
    """
    _check_pred(pred, num_pred, instances)
    truth = pair_labels(instances, classes, ignore, panoptic)
    return scores_of_counts(count_pairs(pred, num_pred, truth).cpu(), truth, rules)


class Scores:
    """Collects `scores_of_counts` batch by batch."""

    def __init__(self, rules: Rules = SPOT_RULES) -> None:
        self.rules = rules
        self._batches: list[dict[str, Tensor]] = []

    def add(
        self,
        pred: Tensor,
        num_pred: int,
        instances: Tensor,
        classes: Tensor | None = None,
        ignore: Tensor | None = None,
    ) -> None:
        """Scores a batch of label maps; arguments and errors as `image_scores`."""
        self._batches.append(image_scores(pred, num_pred, instances, classes, ignore, self.rules))

    def add_counts(self, counts: Tensor, truth: Pairs) -> None:
        """Scores a batch from its pixel counts [B, K, J] on the CPU."""
        self.add_scores(scores_of_counts(counts, truth, self.rules))

    def add_scores(self, scores: dict[str, Tensor]) -> None:
        """Takes a batch's `scores_of_counts`."""
        self._batches.append(scores)

    def _all(self, name: str, empty: Tensor) -> Tensor:
        return torch.cat([empty, *(batch[name] for batch in self._batches)])

    def per_image(self) -> dict[str, Tensor]:
        """Each metric of every image, in order: float64 [n], NaN where it is not counted."""
        return {name: self._all(name, torch.empty(0, dtype=torch.float64)) for name in METRICS}

    def objects(self) -> Tensor:
        """The number of masks in each image's mBO_i: int64 [n]."""
        return self._all("objects", torch.empty(0, dtype=torch.int64))

    def used(self) -> Tensor:
        """The number of predicted masks with pixels in each image: int64 [n]."""
        return self._all("used", torch.empty(0, dtype=torch.int64))

    def counted(self) -> dict[str, int]:
        """The number of images that each metric counts."""
        return {name: int((~values.isnan()).sum()) for name, values in self.per_image().items()}

    def result(self) -> dict[str, float | None]:
        """Each metric's mean over the counted images, or with `Rules.per_object` over all objects; None without any."""
        weights = dict.fromkeys(("mbo_i", "miou"), self.objects()) if self.rules.per_object else {}
        means = {}
        for name, values in self.per_image().items():
            weight = weights.get(name, (~values.isnan()).long())
            means[name] = ((values.nan_to_num() * weight).sum() / weight.sum()).item() if weight.any() else None
        return means

    def recall(self) -> list[float | None]:
        """AR@1, AR@10 and AR@100 over all objects; None where it has no meaning (`average_recall`)."""
        found = self._all("found", torch.empty(0, len(DETECTIONS), len(THRESHOLDS), dtype=torch.int64))
        return average_recall(found, self._all("foreground", torch.empty(0, dtype=torch.int64)))

    def by_size(self) -> list[tuple[float | None, int]]:
        """mBO_i over the instances in each of SIZE_BINS, None without instances, and their number."""
        bins = len(SIZE_BINS) - 1
        numbers = self._all("size_counts", torch.empty(0, bins, dtype=torch.int64)).sum(0).tolist()
        sums = self._all("size_sums", torch.empty(0, bins, dtype=torch.float64)).sum(0).tolist()
        return [(total / number if number else None, number) for total, number in zip(sums, numbers, strict=True)]
