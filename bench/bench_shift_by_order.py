"""The decoder's input, `shift_by_order`: every token receives the features of its predecessor in a patch order.

With n = B·N·D elements of s bytes: forward reads the tokens and writes them to other places, 2n s; backward reads the
gradient and writes that of the tokens, 2n s; [BOS] and the order are nothing beside them. No operations.

torch.compile and eager PyTorch gather by the order and scatter back.
"""

from __future__ import annotations

import torch
from bench_permuted_attention import columns
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.reference import shift_by_order as reference


def work(batch: int, tokens: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes."""
    moved = Work(2 * batch * tokens * width * size + 8 * tokens, 0)
    return moved, moved


def build(dims: tuple[int, int, int], dtype: torch.dtype, device: torch.device, names: tuple[str, ...]) -> Problem:
    batch, tokens, width = dims

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        (features,) = randn(seed, dims, device=device, dtype=dtype)
        (bos,) = randn(seed + 1000, (width,), device=device, dtype=torch.float32)
        return features, bos, columns(tokens, device)

    plain = reference.shift_by_order
    techniques = {OURS: lambda: spot_kernels.shift_by_order, EAGER: lambda: plain, COMPILE: compiled(plain)}
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def cases(setting: Setting) -> list[Case]:
    name, full, on_cpu, *dims = ("tiny", 1, 1, 9, 16) if setting.tiny else ("decoder", 64, 16, 196, 768)
    batch = setting.batch(full, on_cpu)
    tokens, width = dims
    names = (OURS, EAGER, *[COMPILE] * (setting.gpu and not setting.tiny))
    return [
        Case(
            "shift_by_order",
            sizes(name, batch, full, f"{tokens} D{width}"),
            name_of(dtype),
            *work(batch, tokens, width, dtype.itemsize),
            names,
            lambda dtype=dtype: build((batch, tokens, width), dtype, setting.device, names),
        )
        for dtype in setting.dtypes
    ]


def test_speed(time_it):
    """Right first, then timed, with every technique."""
    time_it()
