"""Plain PyTorch linear layer with a ReLU.

out = relu(x Wᵀ + b)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spot_kernels.reference.slot_cross_attention import accumulation_dtype


def linear_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [..., I], weight [O, I], bias [O] → [..., O]."""
    return F.relu(F.linear(x, weight, bias))


def gradients(grad: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients [M, O] of x Wᵀ + b and [O] of b, from that of out [M, O]; NaN passes, as in PyTorch's ReLU."""
    grad_sum = torch.where(out <= 0, 0.0, grad)
    return grad_sum, grad_sum.sum(0, dtype=accumulation_dtype(grad)).to(grad.dtype)
