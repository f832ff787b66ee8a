"""Introspection of a model: on one image its masks in every patch order, slot attention in every iteration and colours
that follow the annotations; over several images the gradient norm per patch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spot_fast.data.base import CorruptImage, ImageSet, Masks
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import Scores, count_overlaps, count_pairs, labels_from_soft, pairwise_iou
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth
from spot_fast.evaluation.scoring import slot_noise, stack_truth
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot, mean_of_orders
from spot_fast.precision import autocast, float32_products, resolve
from spot_fast.reporting.patch_gradients import patch_gradient_norms
from spot_fast.system.cpu_threads import side_by_side
from spot_kernels import linear_assignment

BACKGROUND = -1  # the background's colour number


@dataclass(frozen=True)
class Introspection:
    """A run's masks of one image, each [N, K] on the CPU, and their mBO_i (fractions; None without a truth).

    decoder is the average over all orders, by_order [P, N, K] one by one; iterations [T, N, K] is slot attention after
    1, 2, … iterations, the last of which is the run's. colours [K]: of each slot, see `slot_colours`.
    """

    decoder: Tensor
    by_order: Tensor
    iterations: Tensor
    colours: list[int]
    decoder_score: float | None
    order_scores: list[float | None]
    iteration_scores: list[float | None]

    @property
    def slots(self) -> Tensor:
        return self.iterations[-1]


def read_image(image_set: ImageSet, index: int) -> tuple[Tensor, Masks | None] | None:
    """A validation image uint8 [3, S, S] and, where the set has them, its masks under SPOT's protocol.

    None where either cannot be read.
    """
    try:
        truth = GroundTruth(PROTOCOLS["spot"], image_set).masks(index) if image_set.has_masks else None
        return image_set.val_image(index), truth
    except (CorruptImage, UserError):
        return None


@torch.no_grad()
def introspect(
    model: Spot, image: Tensor, truth: Masks | None, *, index: int, seed: int, precision: str = "float32"
) -> Introspection:
    """Masks of `model` for one image, with the slot noise that `evaluate` gives to image `index` under `seed`."""
    encoder, device = model.slot_encoder, next(model.slot_encoder.parameters()).device
    precision = resolve(precision, device)
    noise = _noise(model, seed, [index], device)
    with float32_products(precision), autocast(precision, device):
        features, target = model.encode(normalise(image[None].to(device)))
        slots, attn, _ = encoder(features, noise)
        decoded = list(model.decode_orders(slots, target, slot_attn=attn))
        iterations = [*attention_by_iteration(model, features, noise)[:-1], attn]
        by_order, decoder = [masks for _, masks in decoded], mean_of_orders(decoded)[1]
    maps = torch.cat([decoder, *by_order, *iterations]).float().cpu()
    scores, colours = [None] * len(maps), list(range(encoder.num_slots))
    if truth is not None:
        size = truth.instances.shape[-1]
        pairs = stack_truth([truth] * len(maps), torch.device("cpu"))
        labels = labels_from_soft(maps, size)
        per_map = Scores()
        per_map.add_counts(count_pairs(labels, encoder.num_slots, pairs), pairs)
        scores = [None if math.isnan(s) else s for s in per_map.per_image()["mbo_i"].tolist()]
        colours = slot_colours(labels[0], encoder.num_slots, truth.instances)
    orders = len(by_order)
    return Introspection(
        maps[0],
        maps[1 : 1 + orders],
        maps[1 + orders :],
        colours,
        scores[0],
        scores[1 : 1 + orders],
        scores[1 + orders :],
    )


def orders_of(model: Spot, device: torch.device) -> list[Tensor]:
    """Index of each patch order of `model`, as its decoder takes it: a tensor on its device."""
    return [torch.full((), order, dtype=torch.int64, device=device) for order in range(model.num_orders)]


def attention_by_iteration(model: Spot, features: Tensor, noise: Tensor | None) -> list[Tensor]:
    """Slot attention [B, N, K] of features [B, N, D] after 1, 2, … iterations, up to the run's number."""
    encoder = model.slot_encoder
    inputs, initial = encoder.mlp(encoder.norm(features)), encoder.initial_slots(len(features), noise)
    return [
        encoder.attention(inputs, initial, iterations=count + 1)[1] for count in range(encoder.attention.iterations)
    ]


def truth_colours(instances: Tensor) -> dict[int, int]:
    """Colour number of each label of a map: 0, 1, … for objects, BACKGROUND for 0."""
    present = [label for label in torch.unique(instances).tolist() if label > 0]
    return {0: BACKGROUND} | {label: number for number, label in enumerate(present)}


def slot_colours(labels: Tensor, num_slots: int, instances: Tensor) -> list[int]:
    """Colour number of each slot: that of its partner, an object or the background.

    labels and instances are label maps [M, M]. Partners are matched one to one with the largest sum of IoU; slots
    without a partner have colours that no object has. Only colours depend on this matching.
    """
    colours = truth_colours(instances)
    ids = {0: 0} | {label: 1 + number for label, number in colours.items() if label > 0}
    numbered = torch.zeros_like(instances, dtype=torch.int64)
    for label, number in ids.items():
        numbered[instances == label] = number
    ignore = (instances < 0).long()
    counts = count_overlaps(labels[None].long(), num_slots, numbered[None], ignore[None])
    iou, _ = pairwise_iou(counts)
    partners = linear_assignment(1 - iou)[0].tolist()
    of_number = {number: colours[label] for label, number in ids.items()}
    free = iter(range(len(colours) - 1, len(colours) + num_slots))
    return [of_number[p] if p >= 0 and iou[0, slot, p] > 0 else next(free) for slot, p in enumerate(partners)]


def _noise(model: Spot, seed: int, indices: Sequence[int], device: torch.device) -> Tensor | None:
    """The slot noise that `evaluate` gives to images `indices` under `seed`; None where slots are learned."""
    encoder = model.slot_encoder
    if encoder.init != "gaussian":
        return None
    return slot_noise(seed, indices, encoder.num_slots, encoder.slot_dim).to(device)


@dataclass(frozen=True)
class PatchGradients:
    """Gradient norm per patch (patch_gradients.py) of each patch order [P, N], a mean over `images` images."""

    by_order: Tensor
    images: int

    @property
    def grid(self) -> int:
        return math.isqrt(self.by_order.shape[1])


def unevenness(norms: Tensor) -> tuple[float, float]:
    """Ratio of the largest of norms [N] to the smallest, and of their standard deviation to their mean."""
    return (norms.max() / norms.min()).item(), (norms.std(correction=0) / norms.mean()).item()


def patch_gradients(
    model: Spot,
    image_set: ImageSet,
    *,
    images: int,
    seed: int,
    batch: int = 16,
    done: Callable[[], object] = lambda: None,
) -> PatchGradients | None:
    """Gradient norms of `model` on the first `images` readable images, in float32; None where none can be read.

    `done` is called for each patch, order and batch, by one thread at a time.
    """
    lock = threading.Lock()

    def locked() -> None:
        with lock:
            done()

    encoder, device = model.slot_encoder, next(model.slot_encoder.parameters()).device
    readable: list[tuple[int, Tensor]] = []
    for index in range(len(image_set)):
        if len(readable) >= images:
            break
        try:
            readable.append((index, image_set.val_image(index)))
        except CorruptImage:
            continue
    if not readable:
        return None
    total = 0
    for start in range(0, len(readable), batch):
        indices, pixels = zip(*readable[start : start + batch], strict=True)
        with torch.no_grad():
            features, target = model.encode(normalise(torch.stack(pixels).to(device)))
            slots, attn, _ = encoder(features, _noise(model, seed, indices, device))

        def norms(order: Tensor, slots: Tensor = slots, target: Tensor = target, attn: Tensor = attn) -> Tensor:
            return patch_gradient_norms(model, slots, target, order, locked, slot_attn=attn).sum(0)

        total = total + torch.stack(list(side_by_side(norms, orders_of(model, device), device))).cpu()
    return PatchGradients(total / len(readable), len(readable))
