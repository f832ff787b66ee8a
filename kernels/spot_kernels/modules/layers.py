"""Pieces that the modules share: initialised linear layers and MLPs, splitting into heads and back, the GRU before a
LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules

from spot_kernels import dispatch
from spot_kernels.gru_norm import gru_norm

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def linear(
    inputs: int, outputs: int, *, bias: bool = True, init: str = "xavier", gain: float = 1.0, parts: int = 1
) -> nn.Linear:
    """Linear layer with zero bias and `xavier` or `kaiming` (for a ReLU behind it) uniform weights times `gain`.

    `parts` > 1: that many layers of outputs/parts rows each, initialised one by one and stored under one another.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    for weight in layer.weight.data.chunk(parts):
        if init == "kaiming":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(weight)
        weight *= gain
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(
    inputs: int, hidden: int, outputs: int, *, gain: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """Linear (kaiming), ReLU or GELU, dropout if there is any, Linear (xavier × gain).

    The layers with parameters are called 0 and 2 with dropout, too.
    """
    layers = nn.Sequential()
    layers.add_module("0", linear(inputs, hidden, init="kaiming"))
    layers.add_module("1", ACTIVATIONS[activation]())
    if dropout:
        layers.add_module("dropout", nn.Dropout(dropout))
    layers.add_module("2", linear(hidden, outputs, gain=gain))
    return layers


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, D] → [B, H, N, d], a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: torch.Tensor) -> torch.Tensor:
    """[B, H, N, d] → [B, N, D]."""
    return tokens.transpose(1, 2).flatten(2)


def check_heads(name: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{name}={heads} does not divide the width {width}: choose a divisor")


def is_exactly(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `layer` does what a plain `kind` does and nothing else, so that its parameters may be used
    without calling it: no derived type (adapters, parametrisations, shards), no hooks, no method of its own.
    """
    own = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    if type(layer) is not kind or any(own) or layer._compiled_call_impl is not None:
        return False
    if any(_hooks_of_all_modules()) or "forward" in layer.__dict__:
        return False
    # DTensor, quantised tensors and their like say what they are made of
    return not any(hasattr(parameter, "__tensor_flatten__") for parameter in layer._parameters.values())


def _hooks_of_all_modules() -> tuple[dict, ...]:
    """The hooks that PyTorch calls for every module (`register_module_forward_hook` and its like)."""
    return (
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
        modules._global_backward_hooks,
        modules._global_backward_pre_hooks,
    )


def gru_and_norm(
    gru: nn.GRUCell, norm: nn.LayerNorm, updates: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """updates [B, K, I], slots [B, K, U] → new slots and their LayerNorm: in one kernel after the GRU's products on a
    GPU, by the two layers elsewhere, and wherever one of them is more than PyTorch's own layer (`is_exactly`).
    """
    hidden = slots.flatten(0, 1)
    if dispatch.choose("gru_norm", updates) != "triton" or not _fusible(gru, norm, slots.shape[-1]):
        new = gru(updates.flatten(0, 1), hidden).view_as(slots)
        return new, norm(new)
    gates_input = F.linear(updates.flatten(0, 1), gru.weight_ih, gru.bias_ih)
    gates_hidden = F.linear(hidden, gru.weight_hh, gru.bias_hh)
    new, normed = gru_norm(gates_input, gates_hidden, hidden, norm.weight, norm.bias, norm.eps)
    return new.view_as(slots), normed.view_as(slots)


def _fusible(gru: nn.Module, norm: nn.Module, width: int) -> bool:
    if not (is_exactly(gru, nn.GRUCell) and is_exactly(norm, nn.LayerNorm)):
        return False
    return norm.normalized_shape == (width,) and norm.weight is not None and norm.bias is not None
