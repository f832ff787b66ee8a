"""Cross-attention of patch tokens to slots with its head-averaged map: `slot_cross_attention`.

    p = softmax over slots of q kᵀ / √d;  out = p v;  map = mean of p over heads

q [B, H, N, d]; k, v [B, H, K, d]; any K ≥ 1; float64, float32, bfloat16 or float16.
"""

from __future__ import annotations

import torch

from spot_kernels import checks
from spot_kernels.reference import slot_cross_attention as reference


def slot_cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_map: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each token attends to all slots (SPOT, section 3.1: the last block's map is the decoder's mask).

    Args:
        q: token queries [B, H, N, d].
        k, v: slot keys and values [B, H, K, d].
        return_map: whether the second result is wanted; None stands in its place.

    Returns:
        out [B, H, N, d] in v's dtype; map [B, N, K], the softmax over slots averaged over heads, float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    checks.floating("slot_cross_attention", q=q, k=k, v=v)
    checks.shape("slot_cross_attention", "q", q, "[B, H, N, d]")
    batch, heads, _, width = q.shape
    checks.shape("slot_cross_attention", "k", k, "[B, H, K, d]", (batch, heads, None, width))
    checks.shape("slot_cross_attention", "v", v, "[B, H, K, d]", k.shape)
    if k.shape[2] < 1:
        raise ValueError(f"slot_cross_attention: k {tuple(k.shape)} needs at least one slot")
    out, mean_map = reference.slot_cross_attention(q, k, v)
    return out, mean_map if return_map else None
