"""Plain PyTorch slot-attention step: softmax over slots, then a weighted mean over tokens.

logits = k qᵀ                         [B, H, N, K]
a      = softmax of logits over heads × slots jointly, for each token
w      = (a + eps) / Σ_tokens (a + eps)
updates = wᵀ v                        [B, H, K, d]
"""

from __future__ import annotations

import torch

from spot_kernels.reference.slot_cross_attention import accumulation_dtype


def slot_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, K, d], k and v [B, H, N, d] → updates [B, H, K, d] in v's dtype, attn [B, N, K] and logits [B, H, N, K].

    The softmax and both sums are float32 at least; attn (a summed over heads, without eps) and logits keep that dtype.
    """
    logits = (k @ q.transpose(-1, -2)).to(accumulation_dtype(k))
    batch, heads, tokens, slots = logits.shape
    if heads == 1:
        a = logits.softmax(-1)
        attn = a.squeeze(1)
    else:
        joint = logits.transpose(1, 2).reshape(batch, tokens, heads * slots).softmax(-1)
        a = joint.view(batch, tokens, heads, slots).transpose(1, 2)
        attn = a.sum(1)
    a = a + eps
    # Normalising the small result instead of w saves two passes over N × K.
    sums = a.sum(2)
    updates = (a.transpose(-1, -2) @ v.to(a.dtype)) / sums.unsqueeze(-1)
    return updates.to(v.dtype), attn, logits
