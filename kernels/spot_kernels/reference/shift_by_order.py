"""Plain PyTorch shift along a patch order, tokens in raster layout.

shifted[σ(t)] = tokens[σ(t−1)],  shifted[σ(0)] = bos
"""

from __future__ import annotations

import torch

from spot_kernels.reference.permuted_attention import order_rank


def shift_by_order(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, D] raster, bos [D] or [B, D], order [N] or [B, N] → shifted [B, N, D] raster."""
    previous = torch.zeros_like(order).scatter(-1, order, order.roll(1, -1))
    if order.dim() == 1:
        shifted = tokens.index_select(1, previous)
    else:
        shifted = tokens.gather(1, previous.unsqueeze(-1).expand_as(tokens))
    first = (order_rank(order) == 0).unsqueeze(-1)
    return torch.where(first, bos.unsqueeze(-2).to(tokens.dtype), shifted)


def gradients(grad: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dtokens [B, N, D] of `shift_by_order`, and dbos [B, D] for each sample, written out; grad [B, N, D]."""
    orders = order.expand(len(grad), -1)
    following = torch.zeros_like(orders).scatter(1, orders, orders.roll(-1, 1))
    last = (order_rank(orders) == orders.shape[1] - 1).unsqueeze(-1)
    grad_tokens = grad.gather(1, following.unsqueeze(-1).expand_as(grad)).masked_fill(last, 0)
    return grad_tokens, grad.gather(1, orders[:, :1, None].expand(-1, -1, grad.shape[2])).squeeze(1)
