"""One iteration of slot attention: `slot_attention_step`.

For each token a softmax over heads × slots jointly, a = softmax(k qᵀ); then for each head and slot the mean of v over
tokens with weights a + eps:

    updates = Σ_n (a + eps) v / Σ_n (a + eps)

q [B, H, K, d]; k, v [B, H, N, d]; any K ≥ 1 and H ≥ 1; float64, float32, bfloat16 or float16.
"""

from __future__ import annotations

import torch

from spot_kernels import checks
from spot_kernels.reference import slot_attention as reference


def slot_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 1e-8,
    return_attn: bool = False,
    return_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Softmax over slots and weighted mean over tokens (Slot Attention, algorithm 1, lines 6-7).

    Args:
        q: slot queries [B, H, K, d].
        k: token keys [B, H, N, d], already scaled by the caller.
        v: token values [B, H, N, d].
        eps: added to the softmax before it is normalised over tokens.
        return_attn, return_logits: whether the second and third result are wanted; None stands in their place.

    Returns:
        updates [B, H, K, d] in v's dtype; attn [B, N, K], the softmax summed over heads, before eps; logits
        [B, H, N, K]. The latter two are float32, or float64 for float64 inputs.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    checks.floating("slot_attention_step", q=q, k=k, v=v)
    checks.shape("slot_attention_step", "q", q, "[B, H, K, d]")
    batch, heads, slots, width = q.shape
    checks.shape("slot_attention_step", "k", k, "[B, H, N, d]", (batch, heads, None, width))
    checks.shape("slot_attention_step", "v", v, "[B, H, N, d]", k.shape)
    if slots < 1 or heads < 1:
        raise ValueError(f"slot_attention_step: q {tuple(q.shape)} needs at least one head and one slot")
    updates, attn, logits = reference.slot_attention_step(q, k, v, eps)
    return updates, attn if return_attn else None, logits if return_logits else None
