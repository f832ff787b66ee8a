"""The GRU cell behind its two products with the LayerNorm that follows it, `gru_norm`.

With n = M·U elements, gates of s bytes and a hidden state of t: forward reads the gates of both sides and the state and
writes the new state and its LayerNorm, (6 s + t) n + (s + t) n; backward reads all of these inputs again with the
gradients of both results and writes those of gates and state, (6 s + t) n + (s + t) n + (6 s + t) n. About 30 and 60
operations an element, none of them a product.

As autocast has it: gates in bfloat16, the slots' state and the LayerNorm's weights in float32.
"""

from __future__ import annotations

import torch
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.reference import gru_norm as reference

_EPS = 1e-5


def work(rows: int, units: int, size: int) -> tuple[Work, Work]:
    """Forward and backward; size: bytes of an element of the gates, the state has 4."""
    n = rows * units
    inputs, results = (6 * size + 4) * n, (size + 4) * n
    return Work(inputs + results, 30 * n), Work(2 * inputs + results, 60 * n)


def build(rows: int, units: int, dtype: torch.dtype, device: torch.device, names: tuple[str, ...]) -> Problem:
    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        gates = randn(seed, (rows, 3 * units), (rows, 3 * units), device=device, dtype=dtype)
        state = randn(seed + 1000, (rows, units), (units,), (units,), device=device, dtype=torch.float32)
        return *gates, *state

    def ours(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return spot_kernels.gru_norm(*given, _EPS)

    def plain(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.gru_norm(*given, _EPS)

    techniques = {OURS: lambda: ours, EAGER: lambda: plain, COMPILE: compiled(plain)}
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def cases(setting: Setting) -> list[Case]:
    name, images, slots, units = ("tiny", 1, 3, 16) if setting.tiny else ("SPOT", 64, 7, 256)
    names = (OURS, EAGER, *[COMPILE] * (setting.gpu and not setting.tiny))
    return [
        Case(
            "gru_norm",
            f"{name} {images}×K{slots} U{units}",
            name_of(dtype),
            *work(images * slots, units, dtype.itemsize),
            names,
            lambda dtype=dtype: build(images * slots, units, dtype, setting.device, names),
        )
        for dtype in setting.dtypes
    ]


def test_speed(time_it):
    """Right first, then timed, with every technique."""
    time_it()
