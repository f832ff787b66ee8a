"""The table of a model on a validation set: decoder and slot masks, beside block masks and k-means.

Everything is measured in one pass over the pictures (the protocol of the published numbers: SPOT, section 4).
Slot noise and k-means starts are functions of (seed, picture), so a table does not depend on the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .baselines import MAX_COLUMNS, STARTS, block_mask_candidates, kmeans_labels
from .data.base import ImageSet, Masks
from .encoder import normalise
from .errors import UserError
from .metrics import METRICS, Scores, labels_from_soft
from .model import Spot

_NOISE_STREAM = 0  # keeps these draws apart from other draws of the same (seed, picture)
_TITLES = {"mbo_i": "mBO_i", "mbo_c": "mBO_c", "miou": "mIoU", "fg_ari": "FG-ARI"}


@dataclass(frozen=True)
class Row:
    """One kind of masks: `scores` are fractions (None: nothing to count), `counted` how many pictures each is over.

    masks: decoder, slots, blocks or kmeans. orders: patch orders averaged, for decoder masks. columns: of block masks.
    """

    masks: str
    scores: dict[str, float | None]
    counted: dict[str, int]
    num_masks: int
    orders: int | None = None
    columns: int | None = None

    @property
    def title(self) -> str:
        if self.masks == "decoder":
            return "decoder masks, order 0" if self.orders == 1 else f"decoder masks, all {self.orders} orders"
        if self.masks == "blocks":
            return f"block masks, {self.columns} column{'s' * (self.columns != 1)} [2]"
        return "slot masks [1]" if self.masks == "slots" else f"k-means, k = {self.num_masks} [3]"


@dataclass
class Evaluation:
    """What `evaluate` measured. skipped: label of each unreadable picture → reason. reconstruction: mean squared error
    of the prediction by the number of patch orders averaged. Seconds are per picture: everything, and metrics alone
    (all rows, with upsampling)."""

    rows: list[Row]
    images: int
    data: str
    mask_size: int
    reconstruction: dict[int, float]
    skipped: dict[str, str] = field(default_factory=dict)
    seconds_per_image: float = 0.0
    metric_seconds_per_image: float = 0.0

    def row(self, masks: str, orders: int | None = None) -> Row:
        """The row of `masks`; for "decoder", of so many patch orders."""
        return next(r for r in self.rows if r.masks == masks and r.orders == orders)


def slot_noise(seed: int, indices: Sequence[int], num_slots: int, slot_dim: int) -> Tensor:
    """Standard-normal draws [B, K, U] for the initial slots of pictures `indices`; each a function of (seed, index)."""
    draws = np.empty((len(indices), num_slots, slot_dim), np.float32)
    for draw, index in zip(draws, indices, strict=True):
        np.random.default_rng((seed, int(index), _NOISE_STREAM)).standard_normal(dtype=np.float32, out=draw)
    return torch.from_numpy(draws)


@torch.no_grad()
def evaluate(
    model: Spot,
    val_set: ImageSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    limit: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Scores `model`, on its device, on the first `limit` (0 = all) pictures of `val_set`.

    The decoder is given the slots of one slot-attention pass, in patch order 0 and in all orders averaged; k-means runs
    on the frozen target features with as many clusters as slots; block masks are the best by mBO_i of 1 to 4 columns
    with as many masks as slots. Pictures that cannot be read are skipped and named in `skipped`.

    UserError where the set has no masks, or where no picture can be read.
    """
    if not val_set.has_masks:
        raise UserError(f"{val_set.name} has no masks to compare with: evaluate on a validation set that has them "
                        "(a folder of images can be looked at with python -m spot_fast.segment)")  # fmt: skip
    if batch_size < 1 or limit < 0 or seed < 0:
        raise UserError(f"batch size {batch_size}, limit {limit} or seed {seed} is out of range: "
                        "use a batch size of at least 1, a limit and a seed of at least 0")  # fmt: skip
    count = min(len(val_set), limit or len(val_set))
    if not count:
        raise UserError(f"{val_set.name} has no validation pictures: set val_images or the data folder")
    start = time.perf_counter()
    run = _Pass(model, seed, classes=val_set.has_classes)
    skipped: dict[str, str] = {}
    with tqdm(total=count, desc="evaluate", unit="image", disable=None if progress else True) as bar:
        readable = _readable(val_set, count, skipped, bar)
        while batch := list(islice(readable, batch_size)):
            indices, images, masks = zip(*batch, strict=True)
            run.add(indices, torch.stack(images), masks)
    if not run.images:
        raise UserError(f"none of the {count} pictures of {val_set.name} can be read; the first: "
                        f"{next(iter(skipped.values()))}")  # fmt: skip
    return Evaluation(
        rows=run.rows(), images=run.images, data=val_set.name, mask_size=run.mask_size, skipped=skipped,
        reconstruction={orders: total / run.images for orders, total in run.squared_error.items()},
        seconds_per_image=(time.perf_counter() - start) / run.images,
        metric_seconds_per_image=run.metric_seconds / run.images,
    )  # fmt: skip


def _readable(
    val_set: ImageSet, count: int, skipped: dict[str, str], bar: tqdm
) -> Iterator[tuple[int, Tensor, Masks]]:
    """Index, picture uint8 [3, S, S] and masks of what can be read; the reason for the rest goes to `skipped`."""
    for index in range(count):
        try:
            yield index, val_set.val_image(index), val_set.val_masks(index)
        except UserError as error:
            skipped[val_set.label(index)] = str(error)
        bar.update()


class _Pass:
    """One pass over a validation set: the model's outputs batch by batch, scored as they come."""

    def __init__(self, model: Spot, seed: int, *, classes: bool) -> None:
        self.model, self.seed, self.classes = model, seed, classes
        self.device = next(model.slot_encoder.parameters()).device
        self.num_slots = model.slot_encoder.num_slots
        self.orders = [1] if model.num_orders == 1 else [1, model.num_orders]
        self.decoder = {orders: Scores() for orders in self.orders}
        self.slots, self.kmeans = Scores(), Scores()
        self.blocks: dict[int, Scores] = {}
        self.block_labels: dict[int, Tensor] = {}
        self.squared_error = dict.fromkeys(self.orders, 0.0)
        self.images, self.mask_size, self.metric_seconds = 0, 0, 0.0

    def add(self, indices: Sequence[int], images: Tensor, masks: Sequence[Masks]) -> None:
        model, batch = self.model, len(indices)
        features, target = model.encode(normalise(images.to(self.device)))
        noise = None
        if model.slot_encoder.init == "gaussian":
            noise = slot_noise(self.seed, indices, self.num_slots, model.slot_encoder.slot_dim).to(self.device)
        output = model(features, target, noise=noise)
        decoded = {1: (output.prediction, output.masks)}
        if model.num_orders > 1:
            decoded[model.num_orders] = model.decode_all_orders(output.slots, target)
        clusters = kmeans_labels(target, self.num_slots, self.seed, indices=torch.tensor(indices))
        for orders, (prediction, _) in decoded.items():
            self.squared_error[orders] += F.mse_loss(prediction.float(), target.float()).item() * batch
        self.images += batch

        start = time.perf_counter()
        truth = self._truth(masks)
        for orders, (_, soft) in decoded.items():
            self._score(self.decoder[orders], soft, truth)
        self._score(self.slots, output.slot_attn, truth)
        self._score(self.kmeans, F.one_hot(clusters, self.num_slots), truth)
        for columns, labels in self.block_labels.items():
            self.blocks[columns].add(labels.expand(batch, -1, -1), self.num_slots, *truth)
        self.metric_seconds += time.perf_counter() - start

    def _score(self, scores: Scores, soft: Tensor, truth: tuple) -> None:
        scores.add(labels_from_soft(soft, self.mask_size), self.num_slots, *truth)

    def _truth(self, masks: Sequence[Masks]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Instances, classes and ignore [B, M, M] on the device."""
        instances = torch.stack([m.instances for m in masks]).to(self.device)
        if not self.mask_size:
            self.mask_size = instances.shape[-1]
            for columns, labels in block_mask_candidates(self.num_slots, self.mask_size).items():
                self.blocks[columns], self.block_labels[columns] = Scores(), labels.to(self.device)
        classes = torch.stack([m.classes for m in masks]).to(self.device) if self.classes else None
        if all(m.ignore is None for m in masks):
            return instances, classes, None
        nothing = torch.zeros_like(masks[0].instances)
        ignore = torch.stack([nothing if m.ignore is None else m.ignore for m in masks])
        return instances, classes, ignore.to(self.device)

    def rows(self) -> list[Row]:
        best = max(self.blocks, key=lambda columns: self.blocks[columns].result()["mbo_i"] or 0.0)

        def row(masks: str, scores: Scores, **extra: int) -> Row:
            return Row(masks, scores.result(), scores.counted(), self.num_slots, **extra)

        return [
            *(row("decoder", self.decoder[orders], orders=orders) for orders in self.orders),
            row("slots", self.slots),
            row("blocks", self.blocks[best], columns=best),
            row("kmeans", self.kmeans),
        ]


def table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lines of metrics under a heading, columns aligned."""
    heading = ["masks", *(_TITLES[name] for name in METRICS)]
    lines = [heading, *([title, *row] for title, row in zip(titles, cells, strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"


def evaluation_table(evaluation: Evaluation) -> str:
    """The table in percent, without a heading line."""
    rows = evaluation.rows
    return table([r.title for r in rows], [[percent(r.scores[name]) for name in METRICS] for r in rows])


def mean_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, dict[str, tuple[float, float] | None]]]:
    """Title and (mean, standard deviation with n - 1) of each metric, row by row, of two or more runs alike.

    Block masks may have another number of columns in each run: their title then says so.
    """
    means = []
    for rows in zip(*(e.rows for e in evaluations), strict=True):
        titles = {r.title for r in rows}
        scores = {}
        for name in METRICS:
            values = [r.scores[name] for r in rows]
            known = None not in values
            scores[name] = (float(np.mean(values)), float(np.std(values, ddof=1))) if known else None
        means.append((titles.pop() if len(titles) == 1 else "block masks, best columns [2]", scores))
    return means


def mean_table(evaluations: Sequence[Evaluation]) -> str:
    """`mean_rows` as a table in percent: mean ± standard deviation."""

    def cell(score: tuple[float, float] | None) -> str:
        return "–" if score is None else f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}"

    means = mean_rows(evaluations)
    return table([title for title, _ in means], [[cell(scores[name]) for name in METRICS] for _, scores in means])


NOTES = (
    "[1] the slot-attention map, from before the decoder: the same for every patch order",
    f"[2] as many masks as slots, in 1 to {MAX_COLUMNS} columns, whichever has the best mBO_i",
    f"[3] per picture on the frozen features that the decoder reconstructs, at unit length; best of {STARTS} starts",
)
