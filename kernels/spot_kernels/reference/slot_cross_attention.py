"""Plain PyTorch cross-attention of patches to slots, with the map averaged over heads.

    p   = softmax over slots of q kᵀ / √d      [B, H, N, K]
    out = p v                                  [B, H, N, d]
    map = mean of p over heads                 [B, N, K]
"""

from __future__ import annotations

import torch


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype softmax and sums are computed in: float32, or the tensor's own where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def slot_cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, N, d], k and v [B, H, K, d] → out [B, H, N, d] in v's dtype, map [B, N, K] in float32 at least."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    p = logits.to(accumulation_dtype(q)).softmax(-1)
    return p.to(v.dtype) @ v, p.mean(1)
