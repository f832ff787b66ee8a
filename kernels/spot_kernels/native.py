"""The native library (kernels/csrc, C++17 with a plain C interface), loaded with ctypes when it was built.

It is optional: without it the callers in this package take their scipy or PyTorch path and give the same results.
`available()` says which, `describe()` says why in one line, as does `python -m spot_kernels`.

The functions here expect what the public functions have checked: shapes, dtypes and devices.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from pathlib import Path

import torch

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PATH = Path(__file__).with_name("libspot_native" + _SUFFIX)

# Of csrc/spot_native.h: the version of the interface, and the codes that stand for a mistake of the caller.
_ABI = 5
_VALUE_ERRORS = {2: "cost holds NaN, infinity or a value beyond 1e300", 3: "a label is out of range"}


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Instruction sets of slot attention by number, the best last; 0 takes the best there is. Tests set _level to another.
_LEVELS = {"baseline": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}
_level = 0


_LABELS = {torch.uint8: 0, torch.int16: 1, torch.int64: 2}


class _Labels(ctypes.Structure):
    """spot_labels: a label map and its type."""

    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


class _Size(ctypes.Structure):
    """spot_slot_attention: sizes of a call, dtype, instruction set, threads, eps, the team of threads."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "slots", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "level", "threads")),
        ("eps", ctypes.c_float),
        ("team", ctypes.c_void_p),
    ]


class _Rows(ctypes.Structure):
    """spot_rows: an array [batch, heads, rows, width] with dense rows."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


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
        labels = ctypes.POINTER(_Labels)
        threads = [ctypes.c_int32, pointer]  # how many, and whose
        library.spot_overlap_counts.argtypes = [labels, labels, pointer, size, size, size, size, *threads, pointer]
        library.spot_mask_labels.argtypes = [pointer, size, size, size, size, ctypes.c_int32, *threads, pointer]
        library.spot_slot_attention_level.argtypes = [ctypes.c_int32]
        library.spot_slot_attention_level.restype = ctypes.c_char_p
        sizes, rows = ctypes.POINTER(_Size), ctypes.POINTER(_Rows)
        library.spot_slot_attention_forward.argtypes = [sizes, *5 * [rows], *3 * [pointer]]
        library.spot_slot_attention_backward.argtypes = [sizes, rows, *2 * [pointer], *4 * [rows], pointer, *3 * [rows]]
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


def slot_attention_levels() -> tuple[str, ...]:
    """The instruction sets that slot attention can use here; it uses the first, the best. Empty without the library."""
    library, _ = _load()
    if library is None:
        return ()
    return tuple(name for name, number in reversed(_LEVELS.items()) if library.spot_slot_attention_level(number))


def linear_assignment_wins(cost: torch.Tensor) -> bool:
    """Whether the library measured 1.3 times as fast as scipy at such a shape [B, R, C]: problems of at most 11."""
    return min(cost.shape[1:]) <= _MOST_SLOTS


def slot_attention_wins(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether slot attention here is at least 1.3 times as fast as PyTorch's, for q [B, H, K, d] and k [B, H, N, d].

    What bench/native_table.py has measured, forward and with backward: with AVX2 or more, 2 to 11 slots. With 16 and
    24 it is 1.3 to 1.5 times with backward, too near the limit, as PyTorch's products come nearer to the processor's
    speed; with one they are not products at all; without AVX2 ours are too slow.
    """
    return _FAST and q.dtype in _DTYPES and 1 < q.shape[2] <= _MOST_SLOTS and k.shape[2] > 0


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
    a, b = ((labels if labels.dtype in _LABELS else labels.long()).contiguous() for labels in (a, b))
    valid = None if valid is None else valid.contiguous()
    counts = torch.empty((len(a), num_a, num_b), dtype=torch.int64)
    maps = (_Labels(labels.data_ptr(), _LABELS[labels.dtype]) for labels in (a, b))
    _check(library.spot_overlap_counts(*maps, _pointer(valid), *a.shape, num_a, num_b, *_threads(), counts.data_ptr()))
    return counts


def mask_labels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """masks [B, G * G, K] float32, finite, K at most 256, on the CPU -> [B, size, size] uint8: the largest mask.

    Equal to `reference.mask_labels` for size > 64: below, PyTorch adds up in another order, and near-ties may differ.
    Raises RuntimeError when the library is absent or memory runs out.
    """
    library = _library()
    masks = masks.detach().contiguous()
    batch, tokens, slots = masks.shape
    labels = torch.empty((batch, size, size), dtype=torch.uint8)
    shape = batch, math.isqrt(tokens), slots, size
    _check(library.spot_mask_labels(masks.data_ptr(), *shape, _FUSED, *_threads(), labels.data_ptr()))
    return labels


def slot_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, return_attn: bool, return_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """q [B, H, K, d], k and v [B, H, N, d], float32 or bfloat16, on the CPU -> updates, attn, logits, exact, sums.

    updates [B, H, K, d] in v's dtype, attn [B, N, K] and logits [B, H, N, K] float32 or None where not asked for; for
    backward exact, the updates in float32, and sums [B, H, K] float32, Σ (a + eps) over tokens. updates and exact lie
    in memory as [B, K, H, d], the others are dense.

    Raises RuntimeError when the library is absent or memory runs out.
    """
    library = _library()
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    batch, heads, slots, _ = q.shape
    tokens = k.shape[2]
    updates, exact = _heads_last(q, q.dtype), _heads_last(q, torch.float32)
    attn = torch.empty((batch, tokens, slots)) if return_attn else None
    logits = torch.empty((batch, heads, tokens, slots)) if return_logits else None
    sums = torch.empty((batch, heads, slots))
    rows = map(_rows, (q, k, v, updates, exact))
    optional = _pointer(attn), _pointer(logits)
    _check(library.spot_slot_attention_forward(_size(q, tokens, eps), *rows, *optional, _pointer(sums)))
    return updates, attn, logits, exact, sums


def slot_attention_backward(
    grad_updates: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq [B, H, K, d], dk and dv [B, H, N, d] from those of the results (None: zero), in q's dtype.

    q, k, v as in `slot_attention_forward`, exact and sums from it; they lie in memory as [B, K or N, H, d].

    Raises RuntimeError when the library is absent or memory runs out.
    """
    library = _library()
    q, k, v, exact = _dense_rows(q), _dense_rows(k), _dense_rows(v), _dense_rows(exact)
    # the names keep what contiguous() and to() may have allocated alive during the call
    grad_updates = None if grad_updates is None else _dense_rows(grad_updates.to(q.dtype))
    grad_attn, grad_logits = (None if grad is None else grad.float().contiguous() for grad in (grad_attn, grad_logits))
    sums = sums.contiguous()
    dq, dk, dv = (_heads_last(tensor, q.dtype) for tensor in (q, k, v))
    gradients = None if grad_updates is None else _rows(grad_updates), _pointer(grad_attn), _pointer(grad_logits)
    saved = *map(_rows, (q, k, v, exact)), _pointer(sums)
    written = map(_rows, (dq, dk, dv))
    _check(library.spot_slot_attention_backward(_size(q, k.shape[2], eps), *gradients, *saved, *written))
    return dq, dk, dv


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _heads_last(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Empty [B, H, N, d] that lies in memory as [B, N, H, d]: merging heads afterwards copies nothing."""
    batch, heads, rows, width = like.shape
    return torch.empty((batch, rows, heads, width), dtype=dtype).transpose(1, 2)


def _size(q: torch.Tensor, tokens: int, eps: float) -> _Size:
    batch, heads, slots, width = q.shape
    return _Size(batch, heads, tokens, slots, width, _DTYPES[q.dtype], _level, torch.get_num_threads(), eps, _team())


def _threads() -> tuple[int, int | None]:
    """How many threads a call may use, and whose they are."""
    return torch.get_num_threads(), _team()


@functools.cache
def _team() -> int | None:
    """PyTorch's own threads: the address of GOMP_parallel in the OpenMP library that torch has loaded, if it has one.

    After an operator of PyTorch its threads keep the processors busy for a while, waiting for the next one; threads
    started beside them would have to share.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
        inside = {path for path in loaded if Path(torch.__file__).parent in Path(path).parents}
        # outside torch's own folder (a distribution's build) only where it can be no other package's
        (path,) = inside or loaded
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, ValueError, AttributeError):
        return None


def _rows(tensor: torch.Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), *tensor.stride()[:3])


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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


# Read once, so that a traced graph depends on plain values.
_MOST_SLOTS = 11
_FAST = slot_attention_levels()[:1] not in ((), ("baseline",))
# How PyTorch adds up on this processor: its build for those without FMA is called DEFAULT.
_FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
