"""Plain PyTorch cross-attention with the projections of queries and output folded into the slots.

p   = softmax over slots of scale · x aᵀ, per head   [B, H, K, N]
out = Σ over heads and slots of p v                  [B, N, D]
map = mean of p over heads                           [B, N, K]
"""

from __future__ import annotations

import torch

from spot_kernels.reference.slot_cross_attention import accumulation_dtype


def folded_cross_attention(
    x: torch.Tensor, a: torch.Tensor, v: torch.Tensor, scale: float, return_map: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B, N, D], a and v [B, H, K, D] → out [B, N, D] in x's dtype, map [B, N, K] in float32 at least, or None."""
    p = probabilities(x, a, scale)
    return combine(p, v), mean_map(p) if return_map else None


def probabilities(x: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """p [B, H, K, N] in float32 at least: with tokens last, the softmax over few slots is vectorised over tokens."""
    logits = a.flatten(1, 2) @ x.transpose(1, 2)
    return (logits.unflatten(1, a.shape[1:3]).to(accumulation_dtype(x)) * scale).softmax(2)


def combine(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out [B, N, D] of p [B, H, K, N] and v [B, H, K, D]."""
    return _tokens_first(p.to(v.dtype)) @ v.flatten(1, 2)


def mean_map(p: torch.Tensor) -> torch.Tensor:
    """[B, H, K, N] → [B, N, K]."""
    return p.mean(1).transpose(1, 2).contiguous()


def gradients(
    grad_out: torch.Tensor | None,
    grad_map: torch.Tensor | None,
    x: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, da, dv as the kernels compute them from p [B, H, K, N]; None is a zero gradient."""
    grad_p, grad_v = torch.zeros_like(p), torch.zeros_like(v)
    if grad_out is not None:
        grad_p = (v.flatten(1, 2) @ grad_out.transpose(1, 2)).view_as(p).to(p.dtype)
        grad_v = (p.to(v.dtype).flatten(1, 2) @ grad_out).view_as(v)
    if grad_map is not None:
        grad_p = grad_p + grad_map.transpose(1, 2).unsqueeze(1) / a.shape[1]
    weighted = p * grad_p
    grad_s = ((weighted - p * weighted.sum(2, keepdim=True)) * scale).to(x.dtype)
    return _tokens_first(grad_s) @ a.flatten(1, 2), (grad_s.flatten(1, 2) @ x).view_as(a), grad_v


def _tokens_first(p: torch.Tensor) -> torch.Tensor:
    """[B, H, K, N] → [B, N, H·K], a view."""
    return p.flatten(1, 2).transpose(1, 2)
