"""Plain PyTorch GRU cell without its two products, and the LayerNorm that follows it.

r, z = σ(i_r + h_r), σ(i_z + h_z)          i and h: gates from the input and from the hidden state
n    = tanh(i_n + r h_n)
h'   = (1 − z) n + z h
normed = LayerNorm(h') · weight + bias
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spot_kernels.reference.slot_cross_attention import accumulation_dtype


def gru_norm(
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gates [M, 3U], hidden [M, U], weight and bias [U] → h' in hidden's dtype, normed in the gates', both [M, U].

    Computed in float32, or in the widest dtype of the arguments; normed is that of h' before h' is rounded.
    """
    _, _, _, _, _, new = _cell(gates_input, gates_hidden, hidden)
    normed = F.layer_norm(new, new.shape[-1:], weight.to(new.dtype), bias.to(new.dtype), eps)
    return new.to(hidden.dtype), normed.to(gates_input.dtype)


def gradients(
    grad_new: torch.Tensor | None,
    grad_normed: torch.Tensor | None,
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of both gates, hidden, weight and bias, as the kernels compute them; None is a zero gradient."""
    r, z, n, h_n, h, new = _cell(gates_input, gates_hidden, hidden)
    grad = torch.zeros_like(new) if grad_new is None else grad_new.to(new.dtype)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    if grad_normed is not None:
        centred = new - new.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        x, grad_out = centred * inverse, grad_normed.to(new.dtype)
        grad_weight, grad_bias = (grad_out * x).sum(0).to(weight.dtype), grad_out.sum(0).to(weight.dtype)
        g = grad_out * weight.to(new.dtype)
        grad = grad + (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True)) * inverse
    grad_n = grad * (1 - z) * (1 - n * n)
    grad_z = grad * (h - n) * z * (1 - z)
    grad_r = grad_n * h_n * r * (1 - r)
    grad_input = torch.cat((grad_r, grad_z, grad_n), -1).to(gates_input.dtype)
    grad_hidden = torch.cat((grad_r, grad_z, grad_n * r), -1).to(gates_hidden.dtype)
    return grad_input, grad_hidden, (grad * z).to(hidden.dtype), grad_weight, grad_bias


def _cell(
    gates_input: torch.Tensor, gates_hidden: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """r, z, n, h_n, h and h', all [M, U]."""
    dtype = torch.promote_types(accumulation_dtype(gates_input), hidden.dtype)
    i_r, i_z, i_n = gates_input.to(dtype).chunk(3, -1)
    h_r, h_z, h_n = gates_hidden.to(dtype).chunk(3, -1)
    h = hidden.to(dtype)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    return r, z, n, h_n, h, (1 - z) * n + z * h
