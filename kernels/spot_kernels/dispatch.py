"""Which implementation of an operator runs: `triton`, `native` or `torch`.

    triton  the fused GPU kernels (`spot_kernels.gpu`); CUDA and ROCm tensors, and CPU tensors under TRITON_INTERPRET=1
    native  the C++ library (`spot_kernels.native`); CPU tensors
    torch   the plain PyTorch reference; any device and dtype, differentiable as often as one likes

`auto`, the default, takes the kernels for GPU tensors, the library for CPU tensors, and PyTorch for whatever those two
do not cover (float64 on a GPU, more than 64 slots, operators without a native path, a missing library; whatever is
differentiated forward, by torch.func or under its vmap; tensors without data, on the meta device).
`SPOT_KERNELS_BACKEND` sets another default for the process, `use_backend` one for a block of code in the thread that
runs it; `chosen_backend` says what would run. A backend asked for by name that cannot run is a ValueError, with two
exceptions. `native` leaves what has no native path to PyTorch, and `triton` operators that have no kernel, so that
either can be set once for a whole program. On the meta device, where nothing is computed, every name means PyTorch.

The choice is made when an operator is called (under torch.compile: when it is traced, guarded against changes) and
travels with the call: backward runs on the backend of its forward.
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
# Operator → backend → the dtypes it takes (of q, of the tokens, of the cost, of the labels).
SUPPORT: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "slot_attention_step": {"triton": (torch.float32, *_HALF), "native": (torch.float32, torch.bfloat16)},
    "permuted_causal_attention": {"triton": (torch.float32, *_HALF)},
    "shift_by_order": {"triton": (torch.float32, *_HALF)},
    "slot_cross_attention": {"triton": (torch.float32, *_HALF)},
    "slot_cross_map": {"triton": (torch.float32, *_HALF)},
    "gru_norm": {"triton": (torch.float32, *_HALF)},
    "linear_assignment": {
        "triton": (torch.float64, torch.float32, *_HALF),
        "native": (torch.float64, torch.float32, *_HALF),
    },
    "assign_masks": {"triton": _LABELS, "native": _LABELS},
    "match_masks": {"triton": _LABELS, "native": _LABELS},
    "overlap_counts": {"triton": _LABELS, "native": _LABELS},
    "mask_labels": {"native": (torch.float64, torch.float32, *_HALF)},
}

# Nothing is differentiated through their results, which are constants to any transform.
_CONSTANT = ("linear_assignment", "assign_masks", "match_masks", "overlap_counts", "mask_labels")
_TRANSFORMED = "the call is inside a transform of torch.func or forward-mode differentiation"


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} {name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return name


# Read once, so that a traced graph depends on plain values.
_DEFAULT = _check_name(os.environ.get("SPOT_KERNELS_BACKEND", "") or "auto", "SPOT_KERNELS_BACKEND")


class _Choice(threading.local):
    """The backend asked for in this thread.

    torch.compile guards the attribute because `__init__` makes it in every thread: a class attribute would be traced
    without a guard, and a ContextVar cannot be traced at all.
    """

    def __init__(self) -> None:
        self.requested = _DEFAULT


_choice = _Choice()
NATIVE = native.available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Operators that this thread calls in the block run on the backend `name`: auto, triton, native or torch.

    Other threads are not concerned, those started in the block included (DataParallel's replicas, say). Neither is what
    autograd's own threads compute anew: gradient checkpointing on a GPU runs a forward pass there. Set
    SPOT_KERNELS_BACKEND for a choice that holds everywhere.
    """
    _check_name(name, "use_backend:")
    before, _choice.requested = _choice.requested, name
    try:
        yield
    finally:
        _choice.requested = before


def chosen_backend(operator: str, tensor: torch.Tensor) -> str:
    """The backend that `operator` would run on for `tensor`, one of triton, native, torch.

    operator: an operator's name, such as "slot_attention_step". tensor: its first argument; device and dtype matter,
    the shape does not (an operator called outside the kernels' limits, such as 65 slots, takes PyTorch, and so do
    shapes for which the library is not faster on the CPU).

    Raises ValueError for an unknown operator, and where the backend that was asked for cannot run.
    """
    if operator not in SUPPORT:
        raise ValueError(f"operator {operator!r} is unknown: use one of {', '.join(SUPPORT)}")
    return choose(operator, tensor)


def choose(operator: str, tensor: torch.Tensor, limit: str = "", *, native_wins: bool = True) -> str:
    """As `chosen_backend` for one call.

    limit: what the kernels do not take about it, in a few words; empty: nothing. native_wins: whether the library is
    faster than PyTorch at its shape; where it is not, `auto` leaves it alone.
    """
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
            raise ValueError(f"{operator}: backend native was asked for, but there is {native.describe()}")
        if kind != "cpu":
            raise ValueError(f"{operator}: backend native was asked for, but the tensors are on {kind}: use auto")
    elif kind == "cuda":
        return "triton" if TRITON and not limit and dtype in support.get("triton", ()) else "torch"
    elif not native_wins:
        return "torch"
    return "native" if kind == "cpu" and NATIVE and dtype in support.get("native", ()) else "torch"


def _transformed() -> bool:
    """Whether torch.func transforms the call, or a level of forward-mode differentiation is open.

    The kernels are autograd functions for one backward pass: they have no derivative forward (it would be zero without
    a word) and no rule for a batch of calls.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _check_triton(operator: str, kind: str, dtype: torch.dtype, limit: str) -> None:
    said = f"{operator}: backend triton was asked for, but"
    if not TRITON:
        raise ValueError(f"{said} triton is not installed: pip install triton")
    if kind != "cuda" and not (kind == "cpu" and INTERPRETED):
        raise ValueError(f"{said} the tensors are on {kind}: move them to a GPU or set TRITON_INTERPRET=1 at start")
    dtypes = SUPPORT[operator].get("triton", ())
    if dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        raise ValueError(f"{said} its kernels do not take {dtype}: use {names}, or backend torch")
    if limit:
        raise ValueError(f"{said} {limit}: use backend torch")
