"""Scores a model on a validation set: decoder and slot masks, beside block masks and k-means.

One pass over the images scores every protocol. Slot noise and k-means starts are functions of (seed, image), so scores
do not depend on the batch size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spot_fast.data.base import FullLabels, ImageSet, Masks
from spot_fast.data.loading.loader import MAX_CORRUPT
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.errors import UserError
from spot_fast.evaluation.baselines import block_mask_candidates, block_masks, kmeans_labels
from spot_fast.evaluation.metrics import Pairs, Scores, count_pairs, labels_from_soft, pair_labels, scores_of_counts
from spot_fast.evaluation.protocols import GroundTruth, Protocol, chosen
from spot_fast.evaluation.recall import by_detections, mask_scores
from spot_fast.model.adaptive_slots import joined
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot, mean_of_orders
from spot_fast.precision import autocast, float32_products, resolve
from spot_fast.random_streams import Stream, generator
from spot_fast.system.cpu_threads import side_by_side, threads_apart
from spot_fast.system.devices import send

WORKERS = min(8, os.cpu_count() or 1)
_AHEAD = 64  # images read beyond the one in use
# Tokens that go through the model together on a CPU: what one layer writes for more does not fit its caches.
_TOKENS_AT_ONCE = 1152


@dataclass(frozen=True)
class Row:
    """Scores of one kind of masks.

    masks: decoder, slots, blocks (the best of several layouts), layout (a given one) or kmeans. scores: fractions, None
    where nothing counts. counted: number of images in each score. orders: number of patch orders averaged, for decoder
    masks. columns: of block masks. sizes: mBO_i and number of the instances in each of metrics.SIZE_BINS. recall: AR@1,
    AR@10 and AR@100, class-agnostic (recall.py), None where masks have no ranking. per_image: the metrics, NaN where
    not counted, "objects" and "used" (predicted masks with pixels), of each image of `Evaluation.labels`.
    """

    masks: str
    scores: dict[str, float | None]
    counted: dict[str, int]
    num_masks: int
    orders: int | None = None
    columns: int | None = None
    sizes: list[tuple[float | None, int]] = field(default_factory=list)
    recall: dict[str, float | None] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def used(self) -> float:
        """Predicted masks with pixels, mean over the images."""
        return self.per_image["used"].double().mean().item()

    @property
    def title(self) -> str:
        if self.masks == "decoder":
            return "decoder masks, order 0" if self.orders == 1 else f"decoder masks, all {self.orders} orders"
        columns = f"{self.columns} column{'s' * (self.columns != 1)}"
        if self.masks == "blocks":
            return f"block masks, {columns} [2]"
        if self.masks == "layout":
            return "1 block mask [4]" if self.num_masks == 1 else f"{self.num_masks} block masks, {columns} [4]"
        return "slot masks [1]" if self.masks == "slots" else f"k-means, k = {self.num_masks} [3]"


@dataclass(frozen=True)
class Table:
    """All rows under one protocol. unlabelled: labels of the images without an object. panoptic: P-ARI and PQ are of
    panoptic annotations; otherwise there is no P-ARI, and PQ is of the objects and the background."""

    protocol: str
    mask_size: int
    rows: list[Row]
    unlabelled: list[str] = field(default_factory=list)
    panoptic: bool = False

    def row(self, masks: str, orders: int | None = None) -> Row:
        """The row of `masks`, averaged over so many patch orders."""
        return next(r for r in self.rows if r.masks == masks and r.orders == orders)


@dataclass
class Evaluation:
    """Result of `evaluate`.

    tables: one for each protocol. images: their number. data: name of the set. reconstruction: mean squared error of
    the prediction by the number of patch orders averaged. labels, indices: of the images, in order. skipped: label of
    each image that cannot be scored → reason. notes: other data left out. Seconds per image: in all, and for metrics
    alone (all rows and protocols, with upsampling).
    """

    tables: list[Table]
    images: int
    data: str
    reconstruction: dict[int, float]
    labels: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds_per_image: float = 0.0
    metric_seconds_per_image: float = 0.0

    def table(self, protocol: str) -> Table:
        return next(t for t in self.tables if t.protocol == protocol)

    def row(self, masks: str, orders: int | None = None) -> Row:
        """A row of the first table."""
        return self.tables[0].row(masks, orders)


def slot_noise(seed: int, indices: Sequence[int], num_slots: int, slot_dim: int) -> Tensor:
    """Standard-normal draws [B, K, U] for the initial slots of images `indices`, functions of (seed, index)."""
    draws = np.empty((len(indices), num_slots, slot_dim), np.float32)
    for draw, index in zip(draws, indices, strict=True):
        generator(Stream.EVALUATION_SLOTS, seed, index).standard_normal(dtype=np.float32, out=draw)
    return torch.from_numpy(draws)


@torch.no_grad()
def evaluate(
    model: Spot,
    val_set: ImageSet,
    *,
    protocols: str | Sequence[str] = "spot",
    layouts: Sequence[tuple[int, int]] = (),
    batch_size: int = 32,
    seed: int = 0,
    limit: int = 0,
    workers: int = WORKERS,
    precision: str = "float32",
    progress: bool = True,
    title: str = "evaluate",
    between_batches: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Scores `model`, on its device, on the first `limit` (0 = all) images of `val_set`.

    Decoder masks are those of one slot-attention pass, in patch order 0 and averaged over all orders. k-means runs on
    the frozen target features with as many clusters as slots. Block masks are the best by mBO_i of 1 to 4 columns with
    as many masks as slots, and each of `layouts` (columns, masks). `workers` threads read ahead (0: none). precision:
    of the model alone. title: of the progress bar. Images that cannot be read, or whose masks cannot, go to
    `Evaluation.skipped`. On a CPU PyTorch's threads score several batches at once, each with one thread.

    UserError if the set has no masks, no image can be read, more than one image and more than 1 % cannot be read, or a
    protocol is unknown.
    """
    if not val_set.has_masks:
        raise UserError(
            f"{val_set.name} has no masks to compare with: evaluate on a validation set that has them "
            "(python -m spot_fast.segment segments a folder of images)"
        )
    if batch_size < 1 or limit < 0 or seed < 0 or workers < 0:
        raise UserError(
            f"batch size {batch_size}, limit {limit}, seed {seed} or workers {workers} is out of range: "
            "use a batch size of at least 1, a limit, a seed and workers of at least 0"
        )
    count = min(len(val_set), limit or len(val_set))
    if not count:
        raise UserError(f"{val_set.name} has no validation images: set val_images or the data folder")
    start = time.perf_counter()
    truths = [GroundTruth(protocol, val_set, panoptic=True) for protocol in chosen(protocols)]
    run = _Pass(model, seed, [truth.protocol for truth in truths], layouts, precision)
    run.panoptic = truths[0].panoptic

    def load(index: int) -> tuple[int, Tensor, list[Masks]]:
        read: dict[bool, FullLabels] = {}
        # int16 if it fits: stacking and copying to the device move a quarter of the bytes.
        return index, val_set.val_image(index), [_small(truth.masks(index, read)) for truth in truths]

    skipped: dict[str, str] = {}
    # Every thread gets a batch, also of few images.
    at_once = threads_apart(run.device)
    batch_size = min(batch_size, -(-count // at_once))
    with tqdm(total=count, desc=title, unit="image", disable=None if progress else True) as bar:
        readable = read_images(load, val_set, range(count), workers, skipped, bar.update)

        def batches() -> Iterator[list[tuple]]:
            while batch := list(islice(readable, batch_size)):
                between_batches()
                _require_few(skipped, count, val_set)
                yield batch

        for scored in side_by_side(run.measure, batches(), run.device):
            run.collect(scored, [val_set.label(index) for index in scored.indices])
    if not run.labels:
        raise UserError(
            f"none of the {count} images of {val_set.name} can be read; the first: {next(iter(skipped.values()))}"
        )
    _require_few(skipped, count, val_set)
    images = len(run.labels)
    return Evaluation(
        tables=run.tables(),
        images=images,
        data=val_set.name,
        labels=run.labels,
        indices=run.indices,
        skipped=skipped,
        notes=list(val_set.notes),
        reconstruction={
            orders: total / images for orders, total in zip(run.orders, run.squared_error.tolist(), strict=True)
        },
        seconds_per_image=(time.perf_counter() - start) / images,
        metric_seconds_per_image=run.metric_seconds / at_once / images,
    )


def read_images(
    load: Callable[[int], tuple],
    image_set: ImageSet,
    indices: Sequence[int],
    workers: int,
    skipped: dict[str, str],
    done: Callable[[], object] = lambda: None,
) -> Iterator[tuple]:
    """`load` of each index, in order, read ahead by threads; an image's error goes to `skipped` by its label.

    Such errors are UserError and those that odd files make libraries raise. done is called after every image. Pillow
    and NumPy release the interpreter lock for most of the time.
    """
    with closing(read_ahead(load, indices, depth=_AHEAD, workers=workers, name="evaluate")) as futures:
        for index, future in zip(indices, futures, strict=True):
            try:
                item = future.result()
            except (ValueError, ArithmeticError, OSError, MemoryError) as error:
                label = image_set.label(index)
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                skipped[f"{label} ({index})" if label in skipped else label] = reason
            else:
                yield item
            done()


def _require_few(skipped: dict[str, str], count: int, val_set: ImageSet) -> None:
    """UserError if so many images were skipped that the scores would not be the set's."""
    if len(skipped) > max(1, MAX_CORRUPT * count):
        first = "; ".join(f"{label}: {reason}" for label, reason in list(skipped.items())[:3])
        raise UserError(
            f"{len(skipped)} of the {count} images of {val_set.name} cannot be scored, more than "
            f"{MAX_CORRUPT:.0%}: {first}; python -m spot_fast.data check PATH --decode finds all"
        )


def _small(masks: Masks) -> Masks:
    """The maps as int16, unless their labels need more."""

    def small(labels: Tensor | None) -> Tensor | None:
        return labels if labels is None or labels.max() >= 2**15 else labels.to(torch.int16)

    return Masks(small(masks.instances), small(masks.classes), panoptic=small(masks.panoptic))


@dataclass(frozen=True)
class _Batch:
    """What `_Pass.measure` finds of a batch.

    squared_error: of each of `_Pass.orders`, a sum over the images. scores: of each protocol, `scores_of_counts` by
    kind of masks. sizes: of each protocol's label maps. objects: of each protocol, whether an image has any.
    """

    indices: list[int]
    squared_error: Tensor
    scores: list[dict[tuple, dict[str, Tensor]]]
    sizes: list[int]
    objects: list[list[bool]]
    metric_seconds: float


class _Pass:
    """One pass over a validation set: the model's outputs batch by batch, scored as they come."""

    def __init__(
        self, model: Spot, seed: int, protocols: Sequence[Protocol], layouts: Sequence[tuple[int, int]], precision: str
    ) -> None:
        self.model, self.seed, self.protocols = model, seed, protocols
        self.device = next(model.slot_encoder.parameters()).device
        self.precision = resolve(precision, self.device)
        self.num_slots = model.slot_encoder.num_slots
        self.orders = [1] if model.num_orders == 1 else [1, model.num_orders]
        self.squared_error = torch.zeros(len(self.orders), dtype=torch.float64, device=self.device)
        self.labels: list[str] = []
        self.indices: list[int] = []
        self.metric_seconds = 0.0
        # Order in which a batch's soft masks are stacked; k-means labels are one-hot vectors among them.
        self.soft = [*(("decoder", orders) for orders in self.orders), ("slots", None), ("kmeans", None)]
        self.layouts = list(layouts)
        self.blocks: dict[int, list[tuple[tuple, int, Tensor]]] = {}  # mask size → key, masks, label map
        self.scores: list[dict[tuple, Scores]] = [{} for _ in protocols]
        self.sizes = [0] * len(protocols)
        self.unlabelled: list[list[str]] = [[] for _ in protocols]
        self.panoptic = False

    @torch.no_grad()
    def measure(self, batch: Sequence[tuple[int, Tensor, Sequence[Masks]]]) -> _Batch:
        """Scores a batch of (index, image, masks of every protocol); may run in several threads at once."""
        indices, images, masks = (list(part) for part in zip(*batch, strict=True))
        step = max(1, _TOKENS_AT_ONCE // self.model.encoder.num_tokens) if self.device.type == "cpu" else len(batch)
        parts = [self._forward(indices[at : at + step], images[at : at + step]) for at in range(0, len(batch), step)]
        squared_error = torch.stack([error for error, _ in parts]).sum(0)

        start = time.perf_counter()
        soft = torch.cat([soft for _, soft in parts], 1)
        # k-means' members and blocks are hard: each is as sure as the others.
        ranked = {key: mask_scores(s).cpu() for key, s in zip(self.soft, soft, strict=True) if key[0] != "kmeans"}
        predicted: dict[int, Tensor] = {}  # label maps of all kinds by mask size, shared by protocols
        scores, sizes, objects = [], [], []
        for index, protocol in enumerate(self.protocols):
            truth = stack_truth([m[index] for m in masks], self.device)
            objects.append((truth.instances > 0).any(1).tolist())
            size = truth.labels.shape[-1]
            sizes.append(size)
            if size not in predicted:
                predicted[size] = labels_from_soft(soft.flatten(0, 1), size).unflatten(0, soft.shape[:2])
            counts = [
                (key, count_pairs(p, self.num_slots, truth)) for key, p in zip(self.soft, predicted[size], strict=True)
            ]
            counts += [
                (key, count_pairs(block.expand(len(indices), -1, -1), number, truth))
                for key, number, block in self._blocks(size)
            ]
            # All counts in one copy, which waits for the device once.
            flat = torch.cat([c.flatten() for _, c in counts]).cpu().split([c.numel() for _, c in counts])
            scores.append(
                {
                    key: scores_of_counts(part.view(c.shape), truth, protocol.rules, ranked.get(key))
                    for (key, c), part in zip(counts, flat, strict=True)
                }
            )
        return _Batch(indices, squared_error, scores, sizes, objects, time.perf_counter() - start)

    def _forward(self, indices: list[int], images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Squared errors [orders], sums over the images, and soft masks [kinds, B, N, K] of `soft`."""
        model, noise = self.model, None
        if model.slot_encoder.init == "gaussian":
            noise = send(slot_noise(self.seed, indices, self.num_slots, model.slot_encoder.slot_dim), self.device)
        with float32_products(self.precision), autocast(self.precision, self.device):
            features, target = model.encode(normalise(send(torch.stack(images), self.device)))
            slots, slot_attn, _ = model.slot_encoder(features, noise)
            orders = model.decode_orders(slots, target, slot_attn=slot_attn)
            first = next(orders)
            decoded = {1: first}
            if model.num_orders > 1:
                decoded[model.num_orders] = mean_of_orders(chain([first], orders))
        clusters = kmeans_labels(target, self.num_slots, self.seed, indices=torch.tensor(indices))
        errors = [F.mse_loss(decoded[orders][0].float(), target.float()) for orders in self.orders]
        members = F.one_hot(clusters, self.num_slots).float()
        soft = [*(decoded[orders][1] for orders in self.orders), slot_attn]
        groups = model.groups(slot_attn, target)
        # Clusters are joined as slots are, so that the comparison remains one.
        soft = [*(joined(m.float(), groups) for m in soft), joined(members, model.groups(members, target))]
        # Errors stay on the device: nothing waits for them.
        return torch.stack(errors).double() * len(indices), torch.stack(soft)

    def collect(self, batch: _Batch, labels: Sequence[str]) -> None:
        """Adds what `measure` found; labels: of the batch's images."""
        self.squared_error += batch.squared_error
        self.metric_seconds += batch.metric_seconds
        self.sizes = batch.sizes
        for index, protocol in enumerate(self.protocols):
            self.unlabelled[index] += [n for n, has in zip(labels, batch.objects[index], strict=True) if not has]
            for key, scores in batch.scores[index].items():
                self.scores[index].setdefault(key, Scores(protocol.rules)).add_scores(scores)
        self.labels += labels
        self.indices += batch.indices

    def _blocks(self, size: int) -> list[tuple[tuple, int, Tensor]]:
        if size not in self.blocks:
            number, candidates = self.num_slots, block_mask_candidates(self.num_slots, size)
            blocks = [(("blocks", columns), number, labels) for columns, labels in candidates.items()]
            blocks += [(("layout", *layout), layout[1], block_masks(*layout, size)) for layout in self.layouts]
            self.blocks[size] = [(key, k, send(labels.to(torch.uint8), self.device)) for key, k, labels in blocks]
        return self.blocks[size]

    def tables(self) -> list[Table]:
        return [
            Table(protocol.name, size, self._rows(scores), unlabelled, self.panoptic)
            for protocol, size, scores, unlabelled in zip(
                self.protocols, self.sizes, self.scores, self.unlabelled, strict=True
            )
        ]

    def _rows(self, scores: dict[tuple, Scores]) -> list[Row]:
        candidates = [key for key in scores if key[0] == "blocks"]
        best = max(candidates, key=lambda key: scores[key].result()["mbo_i"] or 0.0)

        def row(key: tuple, masks: int = self.num_slots, **extra: int | None) -> Row:
            of_masks = scores[key]
            return Row(
                key[0],
                of_masks.result(),
                of_masks.counted(),
                masks,
                sizes=of_masks.by_size(),
                recall=by_detections(of_masks.recall()),
                per_image=of_masks.per_image() | {"objects": of_masks.objects(), "used": of_masks.used()},
                **extra,
            )

        return [
            *(row(("decoder", orders), orders=orders) for orders in self.orders),
            row(("slots", None)),
            row(best, columns=best[1]),
            row(("kmeans", None)),
            *(row(("layout", columns, masks), masks, columns=columns) for columns, masks in self.layouts),
        ]


def stack_truth(masks: Sequence[Masks], device: torch.device) -> Pairs:
    """The ground truth of a batch on the device, from `GroundTruth.masks` of each image."""

    def stacked(name: str) -> Tensor | None:
        maps = [getattr(m, name) for m in masks]
        return None if maps[0] is None else send(torch.stack(maps), device)

    return pair_labels(stacked("instances"), stacked("classes"), panoptic=stacked("panoptic"))
