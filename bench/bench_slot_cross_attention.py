"""Cross-attention of tokens to slots, `slot_cross_attention`, with and without its head-averaged map; the map alone.

With n = B·H·N·d and m = B·H·K·d elements of s bytes: forward reads q, k, v and writes the result, (2n + 2m) s; backward
reads q, k, v and the result's gradient and writes three gradients, (3n + 4m) s. The map is 4 bytes for each token and
slot each way. Two products forward, five backward: 4 and 10 operations for each token, slot, channel and head.

SDPA has no map: it is the baseline only of the blocks that need none. The map alone, `slot_cross_map`, is a teacher's:
it reads q and k, and backward, which nobody uses in training, reads them again and writes their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS, SDPA

import spot_kernels
from spot_kernels.reference import slot_cross_attention as reference

OPERATOR, MAP = "slot_cross_attention", "slot_cross_map"


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    heads: int
    tokens: int
    slots: int
    width: int
    on_cpu: int
    with_map: bool
    main: bool = True


SHAPES = (
    Shape("decoder, map", 64, 6, 196, 7, 128, 16, True),
    Shape("decoder", 64, 6, 196, 7, 128, 16, False),
    Shape("high resolution, map", 16, 6, 1024, 7, 128, 2, True, main=False),
    Shape("MOVi-E, map", 64, 6, 196, 24, 128, 16, True, main=False),
)


def work(
    batch: int, heads: int, tokens: int, slots: int, width: int, size: int, *, with_map: bool
) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes."""
    n, m = batch * heads * tokens * width, batch * heads * slots * width
    extra = 4 * batch * tokens * slots if with_map else 0
    products = batch * heads * tokens * slots * width
    return Work((2 * n + 2 * m) * size + extra, 4 * products), Work((3 * n + 4 * m) * size + extra, 10 * products)


def map_work(batch: int, heads: int, tokens: int, slots: int, width: int, size: int) -> tuple[Work, Work]:
    """Of the map alone."""
    n, m, written = batch * heads * tokens * width, batch * heads * slots * width, 4 * batch * tokens * slots
    products = batch * heads * tokens * slots * width
    return Work((n + m) * size + written, 2 * products), Work(2 * (n + m) * size + written, 6 * products)


def build_map(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device, names: tuple[str, ...]) -> Problem:
    batch, heads, tokens, slots, width = dims

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        return randn(seed, (batch, heads, tokens, width), (batch, heads, slots, width), device=device, dtype=dtype)

    def plain(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return reference.slot_map(q, k).mean(1)

    techniques = {OURS: lambda: spot_kernels.slot_cross_map, EAGER: lambda: plain, COMPILE: compiled(plain)}
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def map_cases(setting: Setting) -> list[Case]:
    name, full, on_cpu, *rest = ("tiny", 1, 1, 2, 9, 3, 16) if setting.tiny else ("teacher", 64, 16, 6, 196, 7, 128)
    batch = setting.batch(full, on_cpu)
    heads, tokens, slots, width = rest
    dims = batch, heads, tokens, slots, width
    names = (OURS, EAGER, *[COMPILE] * (setting.gpu and not setting.tiny))
    label = sizes(name, batch, full, f"{heads} heads {tokens} K{slots} d{width}")
    return [
        Case(
            MAP,
            label,
            name_of(dtype),
            *map_work(*dims, dtype.itemsize),
            names,
            lambda dtype=dtype: build_map(dims, dtype, setting.device, names),
        )
        for dtype in setting.dtypes
    ]


def build(
    dims: tuple[int, ...], dtype: torch.dtype, device: torch.device, with_map: bool, names: tuple[str, ...]
) -> Problem:
    batch, heads, tokens, slots, width = dims

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (batch, heads, tokens, width), (batch, heads, slots, width), (batch, heads, slots, width)
        return randn(seed, *shapes, device=device, dtype=dtype)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return spot_kernels.slot_cross_attention(q, k, v, return_map=with_map)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.slot_cross_attention(q, k, v)[: 2 if with_map else 1]

    techniques = {
        OURS: lambda: ours,
        EAGER: lambda: plain,
        COMPILE: compiled(plain),
        SDPA: lambda: F.scaled_dot_product_attention,
    }
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def cases(setting: Setting) -> list[Case]:
    made = []
    tiny = Shape("tiny, map", 1, 2, 9, 3, 16, 1, True, main=False), Shape("tiny", 1, 2, 9, 3, 16, 1, False, main=False)
    for shape in tiny if setting.tiny else SHAPES:
        batch = setting.batch(shape.batch, shape.on_cpu)
        dims = batch, shape.heads, shape.tokens, shape.slots, shape.width
        rest = f"{shape.heads} heads {shape.tokens} K{shape.slots} d{shape.width}"
        # compiling takes from six seconds
        compare = shape.main and (setting.gpu or shape.with_map)
        names = (OURS, EAGER, *[COMPILE] * compare, *[SDPA] * (not shape.with_map))
        for dtype in setting.dtypes:
            made.append(
                Case(
                    OPERATOR,
                    sizes(shape.name, batch, shape.batch, rest),
                    name_of(dtype),
                    *work(*dims, dtype.itemsize, with_map=shape.with_map),
                    names,
                    lambda dims=dims, dtype=dtype, shape=shape, names=names: build(
                        dims, dtype, setting.device, shape.with_map, names
                    ),
                )
            )
    return made + map_cases(setting)


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
