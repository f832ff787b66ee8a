"""Plain PyTorch causal self-attention in a given order, tokens in raster layout, and the decoder's shifted input.

    rank = σ⁻¹ (rank[σ(t)] = t);  i sees j  iff  rank[j] ≤ rank[i]
    out  = softmax over the visible j of q kᵀ / √d, times v
    shifted[σ(t)] = tokens[σ(t−1)],  shifted[σ(0)] = bos
"""

from __future__ import annotations

import torch


def order_rank(order: torch.Tensor) -> torch.Tensor:
    """Inverse permutation: order [N] or [B, N] → rank of each raster token, same shape."""
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, steps)


def permuted_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """q, k, v [B, H, N, d] raster, order [N] or [B, N] → out [B, H, N, d] raster; scale d^-1/2."""
    rank = order_rank(order)
    visible = rank.unsqueeze(-2) <= rank.unsqueeze(-1)
    if order.dim() == 2:
        visible = visible.unsqueeze(1)
    # Written out: on a CPU, PyTorch's fused attention is four times slower in its bfloat16 backward, and no faster in
    # float32 at these sizes.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    hidden = torch.zeros_like(visible, dtype=logits.dtype).masked_fill_(~visible, float("-inf"))
    weights = (logits + hidden).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def shift_by_order(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, D] raster, bos [D] or [B, D], order [N] or [B, N] → shifted [B, N, D] raster."""
    previous = torch.zeros_like(order).scatter(-1, order, order.roll(1, -1))
    if order.dim() == 1:
        shifted = tokens.index_select(1, previous)
    else:
        shifted = tokens.gather(1, previous.unsqueeze(-1).expand_as(tokens))
    first = (order_rank(order) == 0).unsqueeze(-1)
    return torch.where(first, bos.unsqueeze(-2).to(tokens.dtype), shifted)
