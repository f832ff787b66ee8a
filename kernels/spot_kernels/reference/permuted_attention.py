"""Plain PyTorch causal self-attention in a given order, tokens in raster layout.

rank = σ⁻¹ (rank[σ(t)] = t);  i sees j  iff  rank[j] ≤ rank[i]
out  = softmax over the visible j of q kᵀ / √d, times v
"""

from __future__ import annotations

import torch


def order_rank(order: torch.Tensor) -> torch.Tensor:
    """Inverse permutation: order [N] or [B, N] → rank of each raster token, same shape."""
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, steps)


def permuted_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """q, k, v [B, H, N, d] raster, order [N] or [B, N] → out [B, H, N, d] raster; scale d^-1/2."""
    return _weights(q, k, order).to(v.dtype) @ v


def _weights(q: torch.Tensor, k: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The softmax over visible tokens [B, H, N, N], float32 at least."""
    rank = order_rank(order)
    visible = rank.unsqueeze(-2) <= rank.unsqueeze(-1)
    if order.dim() == 2:
        visible = visible.unsqueeze(1)
    # Written out, because PyTorch's fused attention on a CPU is four times slower in its bfloat16 backward pass, and no
    # faster in float32 at these sizes.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    hidden = torch.zeros_like(visible, dtype=logits.dtype).masked_fill_(~visible, float("-inf"))
    return (logits + hidden).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `permuted_causal_attention`, written out; grad [B, H, N, d]."""
    p = _weights(q, k, order)
    weighted = p * (grad @ v.transpose(-1, -2))
    grad_s = ((weighted - p * weighted.sum(-1, keepdim=True)) * q.shape[-1] ** -0.5).to(q.dtype)
    return grad_s @ k, grad_s.transpose(-1, -2) @ q, p.to(grad.dtype).transpose(-1, -2) @ grad
