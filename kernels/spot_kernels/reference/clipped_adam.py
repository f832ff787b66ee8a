"""Plain PyTorch clipping by the infinity norm and Adam on flat tensors; any floating dtype.

g  = gradient · min(1, limit / (norm + 1e-6))
m  = β1 m + (1 − β1) g;  v = β2 v + (1 − β2) g²;  t = step + 1
w -= rate / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

UNIT = 1024  # elements with one owner, as in spot_kernels.clipped_adam


def infinity_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest absolute value of all tensors, float32 []; NaN if one is in them."""
    return torch.stack([bound.float() for tensor in tensors for bound in tensor.aminmax()]).abs().max()


def clipped_adam(
    weights: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    rate: torch.Tensor,
    owners: torch.Tensor,
    corrections: torch.Tensor,
    copy: torch.Tensor | None,
    norm: torch.Tensor | None,
    bad: torch.Tensor | None,
    present: torch.Tensor | None,
    places: torch.Tensor | None,
    limit: float,
    betas: Sequence[float],
    eps: float,
) -> None:
    """weights, moments [T]; steps, present [P]; owners [⌈T / UNIT⌉]; corrections [2, L]. In place, but for steps."""
    owner = owners.long().repeat_interleave(UNIT)[: len(weights)]
    gradient = torch.cat([part.to(weights.dtype) for part in gradients])
    if places is not None:
        units = places[:, None] + torch.arange(UNIT, device=places.device)
        gradient = gradient[units.flatten()[: len(weights)]]
    if norm is not None and limit > 0:
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)
    first, second = (torch.tensor(beta, dtype=torch.float32, device=weights.device).to(weights.dtype) for beta in betas)
    moment = first * exp_avg + (gradient - first * gradient)
    square = second * exp_avg_sq + (gradient * gradient - second * (gradient * gradient))
    count = (steps.long() + 1).clamp(max=corrections.shape[1] - 1)[owner]
    denominator = square.sqrt() / corrections[1][count] + eps
    updated = weights - rate / corrections[0][count] * moment / denominator
    go = torch.ones_like(owner, dtype=torch.bool) if present is None else present[owner] != 0
    if bad is not None:
        go = go & (bad != 1)
    for tensor, new in ((weights, updated), (exp_avg, moment), (exp_avg_sq, square)):
        tensor.copy_(torch.where(go, new, tensor))
    if copy is not None:
        copy.copy_(torch.where(go[: len(copy)], weights[: len(copy)].to(copy.dtype), copy))
