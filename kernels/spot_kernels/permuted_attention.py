"""Causal self-attention in a given patch order and the decoder's shifted input, both in raster layout.

An order σ lists raster indices in the sequence in which tokens are predicted; rank = σ⁻¹. Tokens never move:

    permuted_causal_attention: token i sees token j iff rank[j] ≤ rank[i]; scale d^-1/2
    shift_by_order:            token σ(t) receives tokens[σ(t−1)], token σ(0) receives bos

The order is an int64 tensor on the tokens' device, [N] for all samples or [B, N] for one each.
"""

from __future__ import annotations

import torch

from spot_kernels import checks
from spot_kernels.reference import permuted_attention as reference


def permuted_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Causal self-attention in the order `order` (SPOT, section 3.3).

    Args:
        q, k, v: [B, H, N, d] in raster layout.
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].

    Returns:
        [B, H, N, d] in raster layout, q's dtype.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    checks.floating("permuted_causal_attention", q=q, k=k, v=v)
    checks.shape("permuted_causal_attention", "q", q, "[B, H, N, d]")
    checks.shape("permuted_causal_attention", "k", k, "[B, H, N, d]", q.shape)
    checks.shape("permuted_causal_attention", "v", v, "[B, H, N, d]", q.shape)
    checks.order("permuted_causal_attention", order, q.shape[0], q.shape[2], q.device)
    return reference.permuted_causal_attention(q, k, v, order)


def shift_by_order(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The decoder's input: every token receives the features of its predecessor in `order`.

    Args:
        tokens: [B, N, D] in raster layout.
        bos: what the first token of the order receives, [D] or one per sample [B, D].
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].

    Returns:
        [B, N, D] in raster layout, tokens' dtype.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    checks.shape("shift_by_order", "tokens", tokens, "[B, N, D]")
    batch, count, width = tokens.shape
    if tuple(bos.shape) not in ((width,), (batch, width)):
        raise ValueError(f"shift_by_order: bos {tuple(bos.shape)} must be [{width}] or [{batch}, {width}]")
    checks.order("shift_by_order", order, batch, count, tokens.device)
    return reference.shift_by_order(tokens, bos, order)
