"""As many slots as an image needs (`--adaptive-slots`): slots that divide one object are joined after slot attention.

SPOT's authors name the fixed number of slots as a limitation. AdaSlot learns a gate for each slot, whose loss weighs
the reconstruction against a price of every slot kept; MetaSlot and QASA choose slots by a codebook and by a score. This
needs no weights and no training: it solves AdaSlot's trade directly, with the frozen features as what is reconstructed.
A slot's reconstruction is the mean feature of its mask, so joining two slots costs Ward's (1963) criterion,

    n_i n_j / (n_i + n_j) · ‖mean_i − mean_j‖²,    n: the mass of a mask,

and the cheapest pair is joined while its cost is at most a share of the image's feature variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spot_kernels import checks


@torch.no_grad()
def slot_groups(masks: Tensor, features: Tensor, share: float) -> Tensor:
    """The slots of each image that belong together: int64 [B, K], each slot's group as its smallest slot.

    masks [B, N, K] of slot attention; features [B, N, D], the frozen ones; share: of the variance of an image's
    features, which a slot has to explain to remain apart. Waits for nothing on the device.
    """
    # Differences of means are small beside the means: no reduced precision.
    with checks.without_autocast(masks):
        masks, features = masks.float(), features.float()
        features = features - features.mean(1, keepdim=True)
        limit = share * features.square().sum((1, 2))
        mass, sums = masks.sum(1), masks.mT @ features
        slots = masks.shape[2]
        numbers = torch.arange(slots, device=masks.device)
        groups = numbers.expand(masks.shape[0], -1)
        apart = (numbers[:, None] != numbers).expand(masks.shape[0], -1, -1)
        for _ in range(slots - 1):
            cost, pair = _ward(mass, sums).where(apart, torch.inf).flatten(1).min(1, keepdim=True)
            first, second = pair // slots, pair % slots
            kept, gone = torch.minimum(first, second), torch.maximum(first, second)
            joins = cost <= limit[:, None]
            ends = (numbers == gone) & joins
            change = ((numbers == kept) & joins).float() - ends.float()
            mass, sums = (
                mass + change * (mass * ends).sum(1, keepdim=True),
                sums + change[..., None] * (sums * ends[..., None]).sum(1, keepdim=True),
            )
            groups = torch.where((groups == gone) & joins, kept, groups)
            apart = apart & ~ends[:, None] & ~ends[..., None]
        return groups


def _ward(mass: Tensor, sums: Tensor) -> Tensor:
    """Cost of joining each pair [B, K, K] of slots with mass [B, K] and sums of features [B, K, D]."""
    means = sums / mass.clamp(min=1e-6)[..., None]
    squares = means.square().sum(-1)
    distance = (squares[:, :, None] + squares[:, None] - 2 * means @ means.mT).clamp(min=0)
    return distance * mass[:, :, None] * mass[:, None] / (mass[:, :, None] + mass[:, None]).clamp(min=1e-6)


def joined(masks: Tensor, groups: Tensor | None) -> Tensor:
    """masks [B, N, K] with those of each group added up in its smallest slot, the others 0; None: as they are."""
    if groups is None:
        return masks
    return torch.zeros_like(masks).scatter_add(2, groups[:, None].expand_as(masks), masks)
