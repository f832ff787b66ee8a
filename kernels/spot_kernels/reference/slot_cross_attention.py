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
    p = slot_map(q, k)
    return p.to(v.dtype) @ v, p.mean(1)


def slot_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """p [B, H, N, K] in float32 at least."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.to(accumulation_dtype(q)).softmax(-1)


def gradients(
    grad_out: torch.Tensor | None, grad_map: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv as the kernels compute them; None is a zero gradient."""
    scale = q.shape[-1] ** -0.5
    p = slot_map(q, k)
    grad_p, grad_v = torch.zeros_like(p), torch.zeros_like(v)
    if grad_out is not None:
        grad_p = (grad_out @ v.transpose(-1, -2)).to(p.dtype)
        grad_v = p.to(v.dtype).transpose(-1, -2) @ grad_out
    if grad_map is not None:
        grad_p = grad_p + grad_map.unsqueeze(1) / q.shape[1]
    weighted = p * grad_p
    grad_s = ((weighted - p * weighted.sum(-1, keepdim=True)) * scale).to(q.dtype)
    return grad_s @ k, grad_s.transpose(-1, -2) @ q, grad_v
