"""One iteration's attention, `slot_attention_step`: softmax over slots, weighted mean over tokens.

With n = B·H·N·d and m = B·H·K·d elements of s bytes: forward reads q, k, v and writes the updates, (2n + 2m) s;
backward reads q, k, v, the updates and their gradient and writes three gradients, (4n + 4m) s. Two products forward,
five backward (the logits once more): 4 and 10 operations for each token, slot and channel. attn and logits, where they
are asked for, are 4 bytes for each of their elements each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.reference import slot_attention as reference

OPERATOR = "slot_attention_step"


@dataclass(frozen=True)
class Shape:
    """batch: on a GPU; on_cpu: on a CPU, where 0 leaves the shape out. main: with the torch.compile baseline."""

    name: str
    batch: int
    tokens: int
    slots: int
    width: int
    on_cpu: int
    main: bool = True
    maps: bool = False


SHAPES = (
    Shape("SPOT", 64, 196, 7, 256, 64),
    Shape("SPOT, attn and logits", 64, 196, 7, 256, 64, maps=True),
    Shape("COCO high resolution", 16, 1024, 7, 256, 16),
    Shape("MOVi-E", 64, 196, 24, 256, 64),
    Shape("image-level", 8, 16384, 11, 64, 8),
)
SCALING = (
    *(Shape("N", 8, n, 7, 256, b, main=False) for n, b in ((196, 8), (1024, 8), (4096, 2), (16384, 1))),
    *(Shape("K", 64, 196, slots, 256, 16, main=False) for slots in (1, 4, 11, 16, 32, 64)),
)


def work(
    batch: int, tokens: int, slots: int, width: int, size: int, *, heads: int = 1, maps: bool = False
) -> tuple[Work, Work]:
    """Forward and backward of elements of `size` bytes; width: of a head."""
    n, m = batch * heads * tokens * width, batch * heads * slots * width
    extra = 4 * batch * tokens * slots * (1 + heads) if maps else 0
    products = batch * heads * tokens * slots * width
    return Work((2 * n + 2 * m) * size + extra, 4 * products), Work((4 * n + 4 * m) * size + extra, 10 * products)


def build(shape: Sequence[int], dtype: torch.dtype, device: torch.device, maps: bool, *, compare: bool) -> Problem:
    batch, tokens, slots, width = shape

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (batch, 1, slots, width), (batch, 1, tokens, width), (batch, 1, tokens, width)
        q, k, v = randn(seed, *shapes, device=device, dtype=dtype)
        return q, (k.detach() * width**-0.5).requires_grad_(), v

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return spot_kernels.slot_attention_step(q, k, v, return_attn=maps, return_logits=maps)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.slot_attention_step(q, k, v, 1e-8)[: 3 if maps else 1]

    techniques = {OURS: lambda: ours, EAGER: lambda: plain} | ({COMPILE: compiled(plain)} if compare else {})
    return Problem(inputs, techniques, plain)


def with_compile(setting: Setting, name: str, dtype: torch.dtype) -> bool:
    """Compiling takes from six seconds: on a GPU float32 at one shape, on a CPU two shapes."""
    if setting.gpu:
        return dtype != torch.float32 or name == "SPOT"
    return name in ("SPOT", "image-level")


def cases(setting: Setting) -> list[Case]:
    made = []
    shapes = (Shape("tiny", 1, 9, 3, 16, 1, main=False), Shape("tiny maps", 1, 9, 3, 16, 1, main=False, maps=True))
    for shape in shapes if setting.tiny else SHAPES + SCALING:
        dtypes = (torch.float32, torch.bfloat16) if shape.main else setting.dtypes[:1]
        for dtype in dtypes:
            batch = setting.batch(shape.batch, shape.on_cpu)
            rest = f"{shape.tokens} K{shape.slots} d{shape.width}"
            dims = batch, shape.tokens, shape.slots, shape.width
            compare = shape.main and with_compile(setting, shape.name, dtype)
            made.append(
                Case(
                    OPERATOR,
                    sizes(shape.name, batch, shape.batch, rest),
                    name_of(dtype),
                    *work(*dims, dtype.itemsize, maps=shape.maps),
                    (OURS, EAGER, *[COMPILE] * compare),
                    lambda dims=dims, dtype=dtype, shape=shape, compare=compare: build(
                        dims, dtype, setting.device, shape.maps, compare=compare
                    ),
                )
            )
    return made


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
