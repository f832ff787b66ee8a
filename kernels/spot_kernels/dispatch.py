"""Which implementation of an operator runs: `triton`, `native` or `torch`.

    triton  the fused GPU kernels (`spot_kernels.gpu`); CUDA and ROCm tensors, and CPU tensors under TRITON_INTERPRET=1
    native  the C++ library (`spot_kernels.native`); CPU tensors
    torch   the plain PyTorch reference; any device and dtype, differentiable as often as one likes

`auto`, the default, takes the kernels for GPU tensors, the library for CPU tensors, and PyTorch for everything that
those two do not cover: float64 on a GPU, more than 64 slots, operators without a native path, a missing library,
forward-mode differentiation, torch.func's transforms, and the meta device.

`SPOT_KERNELS_BACKEND` sets another default for the process, `use_backend` for a block of code in the thread that runs
it; `chosen_backend` returns what would run. A backend requested by name that cannot run is a ValueError, with two
exceptions: `native` leaves operators without a native path to PyTorch, and `triton` those without a kernel, so that
either can be set once for a whole program. On the meta device, where nothing is computed, every name means PyTorch.

The choice is made when an operator is called (under torch.compile: when it is traced, with a guard) and travels with
the call: backward runs on the backend of its forward.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

from spot_kernels import native

BACKENDS = ("auto", "triton", "native", "torch")

_HALF = (torch.bfloat16, torch.float16)
_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Operator → backend → dtypes it takes of the operator's first tensor.
SUPPORT: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "slot_attention_step": {"triton": (torch.float32, *_HALF)},
    "permuted_causal_attention": {"triton": (torch.float32, *_HALF)},
    "shift_by_order": {"triton": (torch.float32, *_HALF)},
    "slot_cross_attention": {"triton": (torch.float32, *_HALF)},
    "slot_cross_map": {"triton": (torch.float32, *_HALF)},
    "folded_cross_attention": {"triton": (torch.float32, *_HALF)},
    "folded_cross_map": {"triton": (torch.float32, *_HALF)},
    "gru_norm": {"triton": (torch.float32, *_HALF)},
    "add_norm": {"triton": (torch.float32, *_HALF)},
    "linear_relu": {"triton": (torch.float32, *_HALF)},
    "linear_assignment": {
        "triton": (torch.float64, torch.float32, *_HALF),
        "native": (torch.float64, torch.float32, *_HALF),
    },
    "assign_masks": {"triton": _LABELS, "native": _LABELS},
    "match_masks": {"triton": _LABELS, "native": _LABELS},
    "overlap_counts": {"triton": _LABELS, "native": _LABELS},
    "mask_labels": {"native": (torch.float64, torch.float32, *_HALF)},
    "infinity_norm": {"triton": (torch.float32, *_HALF)},
    "clipped_adam": {"triton": (torch.float32,)},
}

# Operators without gradients: their results are constants to any transform.
_CONSTANT = ("linear_assignment", "assign_masks", "match_masks", "overlap_counts", "mask_labels")
# How the modules do less work than their layers spell out, with the same results up to rounding.
TECHNIQUES = {
    "folded_cross_attention": "projections of a cross-attention's queries and output are folded into the slots",
    "order_layout": "the decoder's tokens lie in the patch order, so that plain causal attention serves",
    "input_path": "the decoder's input keeps the run's precision, and its projection has a gradient by [BOS] alone",
    "residual_norm": "one kernel adds to the residual stream and normalises it",
    "joined_projections": "keys and values of one input are one product, with a scale of the keys in its weights",
    "linear_relu": "bias and ReLU in the epilogue of the product",
    "flat_parameters": "a trainer made in the block keeps weights, gradients and moments in flat buffers",
}
_TRANSFORMED = "the call is inside a transform of torch.func or forward-mode differentiation"


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} {name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return name


# Read once, so that a traced graph depends on plain values.
_DEFAULT = _check_name(os.environ.get("SPOT_KERNELS_BACKEND", "") or "auto", "SPOT_KERNELS_BACKEND")


class _Choice(threading.local):
    """The backend requested in this thread.

    torch.compile guards the attribute because `__init__` sets it in every thread: a class attribute would be traced
    without a guard, and a ContextVar cannot be traced at all.
    """

    def __init__(self) -> None:
        self.requested = _DEFAULT
        self.without: frozenset[str] = frozenset()


_choice = _Choice()
NATIVE = native.available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Operators that this thread calls in the block run on the backend `name`: auto, triton, native or torch.

    Other threads keep their backend, also those started in the block (such as DataParallel's replicas) and autograd's
    own, in which gradient checkpointing on a GPU runs its forward pass again. Set SPOT_KERNELS_BACKEND for all threads.
    """
    _check_name(name, "use_backend:")
    before, _choice.requested = _choice.requested, name
    try:
        yield
    finally:
        _choice.requested = before


@contextlib.contextmanager
def without(*techniques: str) -> Iterator[None]:
    """Modules that this thread calls in the block do without these `TECHNIQUES`, to compare results or speed.

    Raises:
        ValueError: for an unknown technique.
    """
    for name in techniques:
        if name not in TECHNIQUES:
            raise ValueError(f"technique {name!r} is unknown: use one of {', '.join(TECHNIQUES)}")
    before, _choice.without = _choice.without, _choice.without | set(techniques)
    try:
        yield
    finally:
        _choice.without = before


def uses(technique: str) -> bool:
    """Whether the modules use one of `TECHNIQUES` where it pays."""
    return technique not in _choice.without


def chosen_backend(operator: str, tensor: torch.Tensor) -> str:
    """The backend that `operator` would run on for `tensor`: triton, native or torch.

    Args:
        operator: an operator's name, such as "slot_attention_step".
        tensor: its first argument. Device and dtype matter; shapes beyond the kernels' limits, such as 65 slots, run on
            PyTorch whatever this returns.

    Raises:
        ValueError: for an unknown operator, or a requested backend that cannot run.
    """
    if operator not in SUPPORT:
        raise ValueError(f"operator {operator!r} is unknown: use one of {', '.join(SUPPORT)}")
    return choose(operator, tensor)


def choose(operator: str, tensor: torch.Tensor, limit: str = "") -> str:
    """As `chosen_backend`, for one call; limit: why the kernels do not take it, in a few words, or an empty string."""
    wanted, support = _choice.requested, SUPPORT[operator]
    kind, dtype = tensor.device.type, tensor.dtype
    if wanted == "torch" or kind == "meta":
        return "torch"
    if operator not in _CONSTANT and _transformed():
        if wanted != "triton":
            return "torch"
        limit = limit or _TRANSFORMED
    if wanted == "triton":
        if "triton" not in support:
            return "torch"
        _check_triton(operator, kind, dtype, limit)
        return "triton"
    if wanted == "native":
        if not NATIVE:
            raise ValueError(f"{operator}: backend native was requested, but there is {native.describe()}")
        if kind != "cpu":
            raise ValueError(f"{operator}: backend native was requested, but the tensors are on {kind}: use auto")
    elif kind == "cuda":
        return "triton" if TRITON and not limit and dtype in support.get("triton", ()) else "torch"
    return "native" if kind == "cpu" and NATIVE and dtype in support.get("native", ()) else "torch"


def _transformed() -> bool:
    """Whether torch.func transforms the call, or forward-mode differentiation is active.

    The kernels are autograd functions for one backward pass: they have no forward-mode derivative (it would silently be
    zero) and no batching rule.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _check_triton(operator: str, kind: str, dtype: torch.dtype, limit: str) -> None:
    refused = f"{operator}: backend triton was requested, but"
    if not TRITON:
        raise ValueError(f"{refused} triton is not installed: pip install triton")
    if kind != "cuda" and not (kind == "cpu" and INTERPRETED):
        raise ValueError(f"{refused} the tensors are on {kind}: move them to a GPU or set TRITON_INTERPRET=1 at start")
    dtypes = SUPPORT[operator].get("triton", ())
    if dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        raise ValueError(f"{refused} its kernels do not take {dtype}: use {names}, or backend torch")
    if limit:
        raise ValueError(f"{refused} {limit}: use backend torch")
