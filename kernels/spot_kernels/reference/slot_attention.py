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
    exact, attn, logits, _ = step_for_backward(q, k, v, eps)
    return exact.to(v.dtype), attn, logits


def step_for_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The updates before rounding to v's dtype, attn, logits, and Σ_tokens (a + eps) [B, H, K]."""
    logits, a = _softmax(q, k)
    attn = a.squeeze(1) if a.shape[1] == 1 else a.sum(1)
    a = a + eps
    # Normalising the small result instead of w saves two passes over N × K.
    sums = a.sum(2)
    return (a.transpose(-1, -2) @ v.to(a.dtype)) / sums.unsqueeze(-1), attn, logits, sums


def gradients(
    grad_updates: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv as the kernels compute them, with exact and sums of `step_for_backward`; None is a zero gradient."""
    _, a = _softmax(q, k)
    grad_a, grad_v = torch.zeros_like(a), torch.zeros_like(v)
    if grad_updates is not None:
        grad = grad_updates.to(a.dtype)
        along = (grad * exact).sum(-1).unsqueeze(2)
        grad_a = (v.to(a.dtype) @ grad.transpose(-1, -2) - along) / sums.unsqueeze(2)
        grad_v = ((a + eps) / sums.unsqueeze(2)) @ grad
    if grad_attn is not None:
        grad_a = grad_a + grad_attn.unsqueeze(1)
    grad_logit = a * (grad_a - (a * grad_a).sum((1, 3), keepdim=True))
    if grad_logits is not None:
        grad_logit = grad_logit + grad_logits
    grad_logit = grad_logit.to(q.dtype)
    return grad_logit.transpose(-1, -2) @ k, grad_logit @ q, grad_v


def _softmax(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits and a [B, H, N, K], float32 at least."""
    logits = (k @ q.transpose(-1, -2)).to(accumulation_dtype(k))
    batch, heads, tokens, slots = logits.shape
    if heads == 1:
        return logits, logits.softmax(-1)
    joint = logits.transpose(1, 2).reshape(batch, tokens, heads * slots).softmax(-1)
    return logits, joint.view(batch, tokens, heads, slots).transpose(1, 2)
