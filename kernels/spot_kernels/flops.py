"""FLOPs of the attention operators for torch.utils.flop_counter, which cannot see inside a custom operator.

Counts the products that backend torch computes, including all N × N of permuted causal attention, so that a model's
count does not depend on the backend; a multiplication and an addition are two FLOPs. The kernels' own work differs:
they compute the logits again in the backward pass and skip invisible tokens (the operators' docstrings count it).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _product(q: _Shape, k: _Shape) -> int:
    """FLOPs of q kᵀ, q [B, H, N, d] and k [B, H, M, d], or of any other product of these sizes."""
    return 2 * math.prod(q) * k[2]


def _forward(q: _Shape, k: _Shape, *_, **__) -> int:
    """Logits and the weighted sum of v."""
    return 2 * _product(q, k)


def _slot_backward(grad_updates: _Shape | None, grad_attn, grad_logits, q: _Shape, k: _Shape, *_, **__) -> int:
    """dq and dk from the gradient of the logits; da and dv if the updates have a gradient."""
    return (2 if grad_updates is None else 4) * _product(q, k)


def _cross_backward(grad_out: _Shape | None, grad_map, q: _Shape, k: _Shape, *_, **__) -> int:
    return (2 if grad_out is None else 4) * _product(q, k)


def _folded(x: _Shape, a: _Shape, times: int) -> int:
    """FLOPs of x aᵀ, x [B, N, D] and a [B, H, K, D] with all heads' slots side by side, `times` over."""
    return times * 2 * math.prod(x) * a[1] * a[2]


_FORMULAS = {
    "slot_attention_step": _forward,
    "slot_attention_step_backward": _slot_backward,
    "slot_cross_attention": _forward,
    "slot_cross_attention_backward": _cross_backward,
    "slot_cross_map": lambda q, k, *_, **__: _product(q, k),
    "slot_cross_map_backward": lambda grad_map, q, k, *_, **__: 2 * _product(q, k),
    "linear_relu": lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    "folded_cross_attention": lambda x, a, *_, **__: _folded(x, a, 2),
    "folded_cross_attention_backward": lambda grad_out, grad_map, x, a, *_, **__: _folded(
        x, a, 2 if grad_out is None else 4
    ),
    "folded_cross_map": lambda x, a, *_, **__: _folded(x, a, 1),
    "folded_cross_map_backward": lambda grad_map, x, a, *_, **__: _folded(x, a, 2),
    "permuted_causal_attention": _forward,
    "permuted_causal_attention_backward": lambda grad, q, k, *_, **__: 4 * _product(q, k),
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.spot_kernels, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when PyTorch's counter is imported; importing it here would import Triton, too."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Registers the formulas, now or when torch.utils.flop_counter is imported. The operators must be defined."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
