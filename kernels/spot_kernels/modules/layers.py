"""What the modules share: initialised linear layers and MLPs, heads, checks of options, the GRU with its LayerNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from spot_kernels import dispatch
from spot_kernels.add_norm import MAX_WIDTH, add_norm
from spot_kernels.checks import autocast_dtype
from spot_kernels.gru_norm import gru_norm
from spot_kernels.linear_relu import linear_relu
from spot_kernels.reference.add_norm import join
from spot_kernels.slot_attention import slot_attention_step

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
# An eps that keeps the mean over tokens defined if every weight of a slot has underflowed, and changes no other sum.
TINY = 1e-30


def linear(
    inputs: int, outputs: int, *, bias: bool = True, init: str = "xavier", gain: float = 1.0, parts: int = 1
) -> nn.Linear:
    """Linear layer with zero bias and `xavier` or `kaiming` (for a ReLU behind it) uniform weights times `gain`.

    parts: number of layers with outputs/parts rows each that are stored as one; each is initialised by its own shape.
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


class MLP(nn.Sequential):
    """A Sequential that begins with a linear layer and an activation.

    On a GPU a ReLU is the epilogue of the first product (`linear_relu`). Elsewhere, and if one of these two layers is
    more than PyTorch's own (`is_exactly`), all layers are called.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._begins_with_relu() or dispatch.choose("linear_relu", inputs) != "triton":
            return super().forward(inputs)
        first, _, *rest = self
        inputs = linear_relu(inputs, first.weight, first.bias)
        for layer in rest:
            inputs = layer(inputs)
        return inputs

    def _begins_with_relu(self) -> bool:
        if not dispatch.uses("linear_relu") or len(self) < 2:
            return False
        return is_exactly(self[0], nn.Linear) and self[0].bias is not None and is_exactly(self[1], nn.ReLU)


def mlp(
    inputs: int, hidden: int, outputs: int, *, gain: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> MLP:
    """Linear (kaiming), ReLU or GELU, dropout if above 0, Linear (xavier × gain).

    The layers with parameters have the names 0 and 2 with and without dropout, so that checkpoints fit both.
    """
    layers = MLP()
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


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}")


def step_with_eps_in_sum(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, *, return_attn: bool, return_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`slot_attention_step` with updates Σ a v / (Σ a + eps) over tokens, instead of Σ (a + eps) v / Σ (a + eps).

    attn or logits may be returned without being asked for: the sums are made of them.
    """
    joint = q.shape[1] > 1
    updates, attn, logits = slot_attention_step(
        q, k, v, eps=TINY, return_attn=return_attn or not joint, return_logits=return_logits or joint
    )
    weights = logits.transpose(1, 2).flatten(2).softmax(-1) if joint else attn
    sums = weights.sum(1).view(*updates.shape[:3], 1)
    return updates * (sums / (sums + eps)).to(updates.dtype), attn, logits


def gru_step(gru: nn.GRUCell, updates: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """updates [B, K, I], slots [B, K, U] → new slots [B, K, U]."""
    return gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)


def gru_and_norm(
    gru: nn.GRUCell, norm: nn.LayerNorm, updates: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """updates [B, K, I], slots [B, K, U] → new slots and their LayerNorm.

    On a GPU one kernel follows the two matrix products of the GRU. Elsewhere, and if a layer is more than PyTorch's own
    (`is_exactly`), the two layers are called.
    """
    if dispatch.choose("gru_norm", updates) != "triton" or not _fusible(gru, norm, slots.shape[-1]):
        new = gru_step(gru, updates, slots)
        return new, norm(new)
    hidden = slots.flatten(0, 1)
    gates_input = F.linear(updates.flatten(0, 1), gru.weight_ih, gru.bias_ih)
    gates_hidden = F.linear(hidden, gru.weight_hh, gru.bias_hh)
    new, normed = gru_norm(gates_input, gates_hidden, hidden, norm.weight, norm.bias, norm.eps)
    return new.view_as(slots), normed.view_as(slots)


def _fusible(gru: nn.Module, norm: nn.Module, width: int) -> bool:
    if not (is_exactly(gru, nn.GRUCell) and is_exactly(norm, nn.LayerNorm)):
        return False
    return norm.normalized_shape == (width,) and norm.weight is not None and norm.bias is not None


class Stream(NamedTuple):
    """The residual stream [..., D] between two layers.

    tokens and what the next LayerNorm has yet to add to them, in any dtypes; low: eight more bits of bfloat16 tokens,
    see `add_norm`.
    """

    tokens: torch.Tensor
    delta: torch.Tensor | None = None
    low: torch.Tensor | None = None

    def total(self) -> torch.Tensor:
        """The sum as one tensor."""
        tokens = join(self.tokens, self.low)
        return tokens if self.delta is None else tokens + self.delta


def residual_norm(
    norm: nn.LayerNorm,
    stream: Stream,
    *,
    replaces: bool = False,
    for_product: bool = True,
    kind: type[nn.LayerNorm] = nn.LayerNorm,
) -> tuple[Stream, torch.Tensor]:
    """Does the addition that a residual stream waits for → stream, and its LayerNorm [..., D].

    On a GPU one kernel does both; elsewhere, and if `norm` is more than a plain `kind` (`is_exactly`), they run one
    after the other. Under torch.autocast to bfloat16 the kernel keeps the stream in 24 bits: its error is that of
    a float32 stream, which is what autocast makes without the kernel.

    replaces: the LayerNorm's result is the stream from here on. for_product: the kernel gives the LayerNorm's result
    in autocast's dtype, as a product wants it; otherwise in that of the layer. kind: a type that computes what
    nn.LayerNorm does.
    """
    tokens, delta, low = stream
    if not _normalises(norm, kind, stream):
        total = stream.total()
        normed = norm(total)
        return Stream(normed if replaces else total), normed
    low_of, dtype = None, None
    if torch.is_autocast_enabled(tokens.device.type):
        if autocast_dtype(tokens) == torch.bfloat16 and tokens.dtype in (torch.bfloat16, torch.float32):
            low_of = "normed" if replaces else "sum"
        if not for_product or (replaces and low_of is None):
            dtype = torch.float32
    total, normed, low = add_norm(tokens, norm.weight, norm.bias, norm.eps, delta, low=low, low_of=low_of, dtype=dtype)
    return Stream(normed if replaces else total, None, low), normed


def layer_norm(norm: nn.LayerNorm, tokens: torch.Tensor) -> torch.Tensor:
    """The LayerNorm [..., D] of a layer's result that goes into a product, see `residual_norm`."""
    return residual_norm(norm, Stream(tokens))[1]


def _normalises(norm: nn.LayerNorm, kind: type[nn.LayerNorm], stream: Stream) -> bool:
    """Whether the kernel of `add_norm` runs, and does what `norm` does."""
    tokens, delta, _ = stream
    if not dispatch.uses("residual_norm") or dispatch.choose("add_norm", tokens) != "triton":
        return False
    if not is_exactly(norm, kind) or norm.normalized_shape != tokens.shape[-1:] or tokens.shape[-1] > MAX_WIDTH:
        return False
    return (norm.weight is None) == (norm.bias is None) and (delta is None or delta.shape == tokens.shape)


def is_exactly(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `layer` does what a plain `kind` does and nothing else, so that its parameters can be used
    without the call: no derived type (adapters, parametrisations, shards), no hooks, no method of its own.
    """
    own_hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    global_hooks = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    if type(layer) is not kind or any(own_hooks):
        return False
    if any(not _only_watches(hook) for hooks in global_hooks for hook in hooks.values()):
        return False
    if layer._compiled_call_impl is not None or "forward" in layer.__dict__:
        return False
    # DTensor, quantised tensors and their like wrap other tensors
    return not any(hasattr(parameter, "__tensor_flatten__") for parameter in layer._parameters.values())


def _only_watches(hook: Callable) -> bool:
    """Whether a global hook is PyTorch's own record of which module runs: its counter of FLOPs must not change them."""
    return type(getattr(hook, "__self__", None)).__module__ == "torch.utils.module_tracker"
