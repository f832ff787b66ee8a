"""The native library (kernels/csrc, C++17 with a plain C interface), loaded with ctypes when it was built.

It is optional: without it the callers in this package take their scipy or PyTorch path and give the same results.
`available()` says which, `describe()` says why in one line, as does `python -m spot_kernels`.

The functions here expect what the public functions have checked: shapes, dtypes and devices.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PATH = Path(__file__).with_name("libspot_native" + _SUFFIX)

# Of csrc/spot_native.h: the version of the interface, and the codes that stand for a mistake of the caller.
_ABI = 1
_VALUE_ERRORS = {2: "cost holds NaN, infinity or a value beyond 1e300", 3: "a label is out of range"}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and one line about it."""
    if not _PATH.exists():
        return None, f"no native library ({_PATH.name} was not built: not installed, or without a C++ compiler)"
    try:
        library = ctypes.CDLL(str(_PATH))
        found = library.spot_native_abi()
        if found != _ABI:
            return None, f"no native library ({_PATH} has version {found} and not {_ABI}: install again)"
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.spot_linear_assignment_f32.argtypes = [pointer, size, size, size, pointer]
        library.spot_linear_assignment_f64.argtypes = [pointer, size, size, size, pointer]
        library.spot_overlap_counts.argtypes = [pointer, pointer, pointer, size, size, size, size, pointer]
    except (OSError, AttributeError) as error:
        return None, f"no native library ({_PATH} does not load: {error})"
    return library, f"native library {_PATH}"


def available() -> bool:
    """Whether the native library is present, loads and is of this version."""
    return _load()[0] is not None


def describe() -> str:
    """One line for people: where the native library is, or why there is none and what runs instead."""
    library, line = _load()
    return line if library is not None else f"{line}; scipy and PyTorch are used"


def linear_assignment(cost: torch.Tensor) -> torch.Tensor:
    """cost [B, R, C] float32 or float64, on the CPU -> [B, R] int64: the column of each row, -1 for a row without one.

    Raises ValueError for a cost that is not finite or beyond ±1e300, RuntimeError when the library is absent or memory
    runs out.
    """
    library = _library()
    solve = {torch.float32: library.spot_linear_assignment_f32, torch.float64: library.spot_linear_assignment_f64}
    cost = cost.detach().contiguous()
    batch, rows, columns = cost.shape
    assignment = torch.empty((batch, rows), dtype=torch.int64)
    _check(solve[cost.dtype](cost.data_ptr(), batch, rows, columns, assignment.data_ptr()))
    return assignment


def overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """a, b [B, N] integer labels, valid [B, N] bool or None, on the CPU -> counts [B, num_a, num_b] int64.

    Raises ValueError for a label out of range, RuntimeError when the library is absent.
    """
    library = _library()
    # the names keep what contiguous() and long() may have allocated alive during the call
    a, b = a.long().contiguous(), b.long().contiguous()
    valid = None if valid is None else valid.contiguous()
    counts = torch.empty((len(a), num_a, num_b), dtype=torch.int64)
    pointers = a.data_ptr(), b.data_ptr(), None if valid is None else valid.data_ptr()
    _check(library.spot_overlap_counts(*pointers, *a.shape, num_a, num_b, counts.data_ptr()))
    return counts


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
