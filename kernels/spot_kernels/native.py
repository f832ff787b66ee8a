"""The native library (kernels/csrc, C++17 with a plain C interface), loaded with ctypes when it was built.

It is optional: without it the callers in this package take their scipy or PyTorch path and give the same results.
`available()` says which, `describe()` says why in one line, as does `python -m spot_kernels`. SPOT_KERNELS_LIBRARY
names another build of it (one with sanitizers, say: tests/kernels/sanitize_native.sh).

Addresses are all that the library gets, and it trusts them. So every buffer is named here with the dtype and the shape
that csrc/spot_native.h takes it for, and `_dense` and `_rows`, which alone take addresses, refuse any other with a
ValueError before anything is read or written. New ones are made by `_empty`: neither the default dtype nor the default
device of the process is that of the library.
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

# Of csrc/spot_native.h: the version of the interface, and the codes that stand for a mistake of the caller.
_ABI = 5
_VALUE_ERRORS = {
    1: "a size is one that the native library does not take (negative, or too large), or a buffer is missing",
    2: "cost holds NaN, infinity or a value beyond 1e300",
    3: "a label is out of range",
}


_CPU = torch.device("cpu")
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
    if not _PATH.exists() and _NAMED:
        return None, f"no native library (SPOT_KERNELS_LIBRARY is {_NAMED}, which does not exist)"
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
    double = cost.dtype is torch.float64
    solve = library.spot_linear_assignment_f64 if double else library.spot_linear_assignment_f32
    cost = cost.detach().contiguous()
    batch, rows, columns = cost.shape
    assignment = _empty((batch, rows), torch.int64)
    costs = _dense("cost", cost, torch.float64 if double else torch.float32, (batch, rows, columns))
    _check(solve(costs, batch, rows, columns, _dense("assignment", assignment, torch.int64, (batch, rows))))
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
    shape = batch, tokens = tuple(a.shape)
    counts = _empty((batch, num_a, num_b), torch.int64)
    maps = (_Labels(_dense(name, x, x.dtype, shape), _LABELS[x.dtype]) for name, x in (("a", a), ("b", b)))
    mask = None if valid is None else _dense("valid", valid, torch.bool, shape)
    written = _dense("counts", counts, torch.int64, (batch, num_a, num_b))
    _check(library.spot_overlap_counts(*maps, mask, batch, tokens, num_a, num_b, *_threads(), written))
    return counts


def mask_labels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """masks [B, G * G, K] float32, finite, K at most 256, on the CPU -> [B, size, size] uint8: the largest mask.

    Equal to `reference.mask_labels` for size > 64: below, PyTorch adds up in another order, and near-ties may differ.
    Raises RuntimeError when the library is absent or memory runs out.
    """
    library = _library()
    masks = masks.detach().contiguous()
    batch, tokens, slots = masks.shape
    grid = math.isqrt(tokens)
    labels = _empty((batch, size, size), torch.uint8)
    read = _dense("masks", masks, torch.float32, (batch, grid * grid, slots))
    written = _dense("labels", labels, torch.uint8, (batch, size, size))
    _check(library.spot_mask_labels(read, batch, grid, slots, size, _FUSED, *_threads(), written))
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
    batch, heads, slots, width = of_slots = tuple(q.shape)
    tokens, dtype = k.shape[2], q.dtype
    of_tokens = batch, heads, tokens, width
    updates, exact = _heads_last(of_slots, dtype), _heads_last(of_slots, torch.float32)
    attn_shape, logits_shape = (batch, tokens, slots), (batch, heads, tokens, slots)
    attn = _empty(attn_shape, torch.float32) if return_attn else None
    logits = _empty(logits_shape, torch.float32) if return_logits else None
    sums = _empty((batch, heads, slots), torch.float32)
    _check(
        library.spot_slot_attention_forward(
            _size(of_slots, tokens, dtype, eps),
            _rows("q", q, dtype, of_slots),
            _rows("k", k, dtype, of_tokens),
            _rows("v", v, dtype, of_tokens),
            _rows("updates", updates, dtype, of_slots),
            _rows("exact", exact, torch.float32, of_slots),
            None if attn is None else _dense("attn", attn, torch.float32, attn_shape),
            None if logits is None else _dense("logits", logits, torch.float32, logits_shape),
            _dense("sums", sums, torch.float32, (batch, heads, slots)),
        )
    )
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
    batch, heads, slots, width = of_slots = tuple(q.shape)
    tokens, dtype = k.shape[2], q.dtype
    of_tokens = batch, heads, tokens, width
    # the names keep what contiguous() and to() may have allocated alive during the call
    grad_updates = None if grad_updates is None else _dense_rows(grad_updates.to(dtype))
    grad_attn, grad_logits = (None if grad is None else grad.float().contiguous() for grad in (grad_attn, grad_logits))
    sums = sums.contiguous()
    dq, dk, dv = _heads_last(of_slots, dtype), _heads_last(of_tokens, dtype), _heads_last(of_tokens, dtype)
    attn_shape, logits_shape = (batch, tokens, slots), (batch, heads, tokens, slots)
    _check(
        library.spot_slot_attention_backward(
            _size(of_slots, tokens, dtype, eps),
            None if grad_updates is None else _rows("grad_updates", grad_updates, dtype, of_slots),
            None if grad_attn is None else _dense("grad_attn", grad_attn, torch.float32, attn_shape),
            None if grad_logits is None else _dense("grad_logits", grad_logits, torch.float32, logits_shape),
            _rows("q", q, dtype, of_slots),
            _rows("k", k, dtype, of_tokens),
            _rows("v", v, dtype, of_tokens),
            _rows("exact", exact, torch.float32, of_slots),
            _dense("sums", sums, torch.float32, (batch, heads, slots)),
            _rows("dq", dq, dtype, of_slots),
            _rows("dk", dk, dtype, of_tokens),
            _rows("dv", dv, dtype, of_tokens),
        )
    )
    return dq, dk, dv


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _heads_last(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Empty [B, H, N, d] that lies in memory as [B, N, H, d]: merging heads afterwards copies nothing."""
    batch, heads, rows, width = shape
    return _empty((batch, rows, heads, width), dtype).transpose(1, 2)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a buffer that the library takes for a dense one of `dtype` and `shape`."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise _unfit(name, tensor, dtype, shape)
    return tensor.data_ptr()


def _rows(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> _Rows:
    """spot_rows of a buffer that the library takes for one of `dtype` and `shape`, with dense rows."""
    batch, head, row, channel = tensor.stride()
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or channel != 1 < shape[3]:
        raise _unfit(name, tensor, dtype, shape)
    return _Rows(tensor.data_ptr(), batch, head, row)


def _unfit(name: str, tensor: torch.Tensor, dtype: torch.dtype | str, shape: tuple[int, ...]) -> ValueError:
    found = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
    return ValueError(f"native library: {name} is {found}: pass {dtype} {shape} with dense rows on the CPU")


def _size(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, eps: float) -> _Size:
    if dtype not in _DTYPES:
        raise ValueError(f"native library: q is {dtype}: pass float32 or bfloat16")
    batch, heads, slots, width = shape
    return _Size(batch, heads, tokens, slots, width, _DTYPES[dtype], _level, torch.get_num_threads(), eps, _team())


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
