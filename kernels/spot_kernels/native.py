"""The native library (kernels/csrc, C++17 with a plain C interface), loaded with ctypes when it was built.

It is optional: without it scipy or PyTorch run and give the same results. `available()` returns whether it can be used,
`describe()` why not, as does `python -m spot_kernels`. SPOT_KERNELS_LIBRARY names another build of it, such as one with
sanitizers (tests/kernels/sanitize_native.sh).

The library gets addresses and trusts them. Therefore only `_address` takes addresses, and it refuses with a ValueError
any buffer without the dtype and shape that csrc/spot_native.h expects, before anything is read or written. `_empty`
makes new buffers, because the process may have another default dtype or device.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from pathlib import Path

import torch

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_NAMED = os.environ.get("SPOT_KERNELS_LIBRARY", "")
_PATH = Path(_NAMED) if _NAMED else Path(__file__).with_name("libspot_native" + _SUFFIX)

# From csrc/spot_native.h: the version of the interface, the codes for mistakes of the caller, the types of labels.
_ABI = 7
_VALUE_ERRORS = {
    1: "a size is one that the native library does not take (negative, or too large), or a buffer is missing",
    2: "cost holds NaN, infinity or a value beyond 1e300",
    3: "a label is out of range",
}
_LABELS = {torch.uint8: 0, torch.int16: 1, torch.int64: 2}


class _Labels(ctypes.Structure):
    """spot_labels: a label map and its type."""

    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and one line that describes it."""
    if not _PATH.exists() and _NAMED:
        return None, f"no native library (SPOT_KERNELS_LIBRARY is {_NAMED}, which does not exist)"
    if not _PATH.exists():
        return None, f"no native library ({_PATH.name} was not built: not installed, or without a C++ compiler)"
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.spot_native_abi()
        if version != _ABI:
            return None, f"no native library ({_PATH} has version {version} and not {_ABI}: install again)"
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        labels = ctypes.POINTER(_Labels)
        flag = threads = ctypes.c_int32
        library.spot_linear_assignment_f32.argtypes = [pointer, pointer, size, size, size, threads, pointer]
        library.spot_linear_assignment_f64.argtypes = [pointer, pointer, size, size, size, threads, pointer]
        library.spot_overlap_counts.argtypes = [labels, labels, pointer, size, size, size, size, threads, pointer]
        library.spot_mask_labels.argtypes = [pointer, size, size, size, size, flag, threads, pointer]
    except (OSError, AttributeError) as error:
        return None, f"no native library ({_PATH} does not load: {error})"
    return library, f"native library {_PATH}"


def available() -> bool:
    """Whether the native library exists, loads and has this version."""
    return _load()[0] is not None


def describe() -> str:
    """One line for people: the path of the native library, or why it cannot be used and what runs instead."""
    library, line = _load()
    return line if library is not None else f"{line}; scipy and PyTorch are used"


def linear_assignment(cost: torch.Tensor, num_columns: torch.Tensor | None = None) -> torch.Tensor:
    """cost [B, R, C] float32 or float64, on the CPU -> [B, R] int64: the column of each row, -1 for a row without one.

    num_columns: int64 [B], the columns that each problem has; costs after them are not read. Raises ValueError for a
    cost that is not finite or beyond ±1e300, or a number out of range; RuntimeError without the library or memory.
    """
    library = _library()
    double = cost.dtype is torch.float64
    solve = library.spot_linear_assignment_f64 if double else library.spot_linear_assignment_f32
    cost = cost.detach().contiguous()
    num_columns = None if num_columns is None else num_columns.contiguous()
    batch, rows, columns = cost.shape
    assignment = _empty((batch, rows), torch.int64)
    costs = _address("cost", cost, torch.float64 if double else torch.float32, (batch, rows, columns))
    counts = None if num_columns is None else _address("num_columns", num_columns, torch.int64, (batch,))
    written = _address("assignment", assignment, torch.int64, (batch, rows))
    _check(solve(costs, counts, batch, rows, columns, torch.get_num_threads(), written))
    return assignment


def overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """a, b [B, N] integer labels, valid [B, N] bool or None, on the CPU -> counts [B, num_a, num_b] int64.

    Raises ValueError for a label out of range, RuntimeError without the library.
    """
    library = _library()
    # named, so that what contiguous() and long() may have allocated lives during the call
    a, b = ((labels if labels.dtype in _LABELS else labels.long()).contiguous() for labels in (a, b))
    valid = None if valid is None else valid.contiguous()
    shape = batch, tokens = tuple(a.shape)
    counts = _empty((batch, num_a, num_b), torch.int64)
    maps = (_Labels(_address(name, x, x.dtype, shape), _LABELS[x.dtype]) for name, x in (("a", a), ("b", b)))
    threads = torch.get_num_threads()
    mask = None if valid is None else _address("valid", valid, torch.bool, shape)
    written = _address("counts", counts, torch.int64, (batch, num_a, num_b))
    _check(library.spot_overlap_counts(*maps, mask, batch, tokens, num_a, num_b, threads, written))
    return counts


def mask_labels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """masks [B, G * G, K] float32, finite, K at most 256, on the CPU -> [B, size, size] uint8: the largest mask.

    Equal to `reference.mask_labels` for size > 64; below, PyTorch sums in another order, and near-ties may differ.
    Raises RuntimeError without the library or memory.
    """
    library = _library()
    masks = masks.detach().contiguous()
    batch, tokens, slots = masks.shape
    grid = math.isqrt(tokens)
    labels = _empty((batch, size, size), torch.uint8)
    read = _address("masks", masks, torch.float32, (batch, grid * grid, slots))
    written = _address("labels", labels, torch.uint8, (batch, size, size))
    _check(library.spot_mask_labels(read, batch, grid, slots, size, _FUSED, torch.get_num_threads(), written))
    return labels


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous CPU tensor of `dtype` and `shape`."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        actual = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"native library: {name} is {actual}: pass a contiguous {dtype} {shape} on the CPU")
    return tensor.data_ptr()


def _library() -> ctypes.CDLL:
    library, line = _load()
    if library is None:
        raise RuntimeError(line)
    return library


def _check(status: int) -> None:
    if status in _VALUE_ERRORS:
        raise ValueError(_VALUE_ERRORS[status])
    if status:
        raise RuntimeError(f"the native library failed with code {status} (csrc/spot_native.h)")


# Whether PyTorch fuses multiplications and additions on this processor; its build for those without FMA is DEFAULT.
_FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
