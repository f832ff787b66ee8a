"""Cross-attention of tokens to slots with its projections of queries and output, `folded_cross_attention`.

Every technique does the whole job: from tokens x [B, N, D], keys and values of the slots [B, K, D] and the two weights
[D, D] to the output [B, N, D]. Ours folds the weights into the slots first, by two batched products of K rows an image;
the others project the queries, attend (eager and torch.compile by the plain formula, *unfolded* by
`slot_cross_attention`), and project the output.

With n = B·N·D, m = B·K·D, w = D² elements of s bytes: forward reads x and the slots and the weights and writes the
output, (2n + 2m + 2w) s; backward reads them and the output's gradient and writes four gradients, (3n + 4m + 4w) s. The
map is 4 bytes for each token and slot each way. Operations are those of the folded form, the least that is known:
4 H·K for each token and channel over the tokens, 4 D for each slot and channel, and backward twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.modules.layers import merge_heads, split_heads
from spot_kernels.modules.permuted_decoder import fold_output, fold_queries
from spot_kernels.reference import slot_cross_attention as reference

OPERATOR, MAP = "folded_cross_attention", "folded_cross_map"
UNFOLDED = f"{OURS}, unfolded"


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
    Shape("decoder", 64, 6, 196, 7, 768, 16, False),
    Shape("decoder, map", 64, 6, 196, 7, 768, 16, True, main=False),
    Shape("ViT-S", 64, 6, 196, 7, 384, 16, False, main=False),
    Shape("MOVi-C, map", 64, 6, 196, 11, 768, 16, True, main=False),
    Shape("scenes", 32, 4, 64, 6, 128, 32, False, main=False),
)
TINY = Shape("tiny, map", 1, 2, 9, 3, 256, 1, True, main=False), Shape("tiny", 1, 2, 9, 3, 256, 1, False, main=False)
TEACHER = Shape("teacher", 64, 6, 196, 7, 768, 16, True)
TINY_TEACHER = Shape("tiny", 1, 2, 9, 3, 256, 1, True, main=False)


def work(
    batch: int, heads: int, tokens: int, slots: int, width: int, size: int, *, with_map: bool
) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes."""
    n, m, w = batch * tokens * width, batch * slots * width, width * width
    extra = 4 * batch * tokens * slots if with_map else 0
    products = 4 * n * heads * slots + 4 * m * width
    return Work((2 * n + 2 * m + 2 * w) * size + extra, products), Work(
        (3 * n + 4 * m + 4 * w) * size + extra, 2 * products
    )


def map_work(batch: int, heads: int, tokens: int, slots: int, width: int, size: int) -> Work:
    """Of the map alone, forward: a teacher's."""
    n, m, w = batch * tokens * width, batch * slots * width, width * width
    return Work((n + m + w) * size + 4 * batch * tokens * slots, 2 * n * heads * slots + 2 * m * width)


def folded(heads: int, with_map: bool):
    def function(x, k, v, query, output):
        a, v = fold_queries(k, query, heads), fold_output(v, output, heads)
        scale = (x.shape[-1] // heads) ** -0.5
        return spot_kernels.folded_cross_attention(x, a, v, scale=scale, return_map=with_map)

    return function


def unfolded(heads: int, with_map: bool, attend):
    def function(x, k, v, query, output):
        q = split_heads(F.linear(x, query), heads)
        out, mean_map = attend(q, split_heads(k, heads), split_heads(v, heads))
        return (F.linear(merge_heads(out), output), mean_map)[: 2 if with_map else 1]

    return function


def folded_map(heads: int):
    def function(x, k, query):
        scale = (x.shape[-1] // heads) ** -0.5
        return spot_kernels.folded_cross_map(x, fold_queries(k, query, heads), scale=scale)

    return function


def unfolded_map(heads: int, attend):
    def function(x, k, query):
        return attend(split_heads(F.linear(x, query), heads), split_heads(k, heads))

    return function


def build(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, names: tuple[str, ...]) -> Problem:
    """Tokens as a LayerNorm leaves them, weights as they are initialised."""
    tokens, slots, width = shape.tokens, shape.slots, shape.width

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (batch, tokens, width), (batch, slots, width), (batch, slots, width), (width, width), (width, width)
        x, k, v, query, output = randn(seed, *shapes, device=device, dtype=dtype)
        scaled = ((weight.detach() * width**-0.5).requires_grad_() for weight in (query, output))
        return x, k, v, *scaled

    def ours(*given):
        return spot_kernels.slot_cross_attention(*given, return_map=shape.with_map)

    heads, with_map = shape.heads, shape.with_map
    plain = unfolded(heads, with_map, reference.slot_cross_attention)
    techniques = {
        OURS: lambda: folded(heads, with_map),
        UNFOLDED: lambda: unfolded(heads, with_map, ours),
        EAGER: lambda: plain,
        COMPILE: compiled(plain),
    }
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def build_map(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, names: tuple[str, ...]) -> Problem:
    width = shape.width

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (batch, shape.tokens, width), (batch, shape.slots, width), (width, width)
        x, k, query = randn(seed, *shapes, device=device, dtype=dtype, grad=False)
        return x, k, query * width**-0.5

    plain = unfolded_map(shape.heads, lambda q, k: reference.slot_map(q, k).mean(1))
    techniques = {
        OURS: lambda: folded_map(shape.heads),
        UNFOLDED: lambda: unfolded_map(shape.heads, spot_kernels.slot_cross_map),
        EAGER: lambda: plain,
        COMPILE: compiled(plain),
    }
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def cases(setting: Setting) -> list[Case]:
    made = []
    for shape in TINY if setting.tiny else SHAPES:
        made += _cases(OPERATOR, shape, setting, build)
    return made + _cases(MAP, TINY_TEACHER if setting.tiny else TEACHER, setting, build_map)


def _cases(operator: str, shape: Shape, setting: Setting, build) -> list[Case]:
    """One case for each dtype."""
    batch = setting.batch(shape.batch, shape.on_cpu)
    label = sizes(shape.name, batch, shape.batch, f"{shape.heads} heads {shape.tokens} K{shape.slots} D{shape.width}")
    dims = batch, shape.heads, shape.tokens, shape.slots, shape.width
    # compiling takes from six seconds
    compare = shape.main and (setting.gpu or operator == OPERATOR)
    names = (OURS, UNFOLDED, EAGER, *[COMPILE] * compare)
    made = []
    for dtype in setting.dtypes:
        size = dtype.itemsize
        both = (map_work(*dims, size), None) if operator == MAP else work(*dims, size, with_map=shape.with_map)

        def problem(dtype: torch.dtype = dtype) -> Problem:
            return build(shape, batch, dtype, setting.device, names)

        made.append(Case(operator, label, name_of(dtype), *both, names, problem))
    return made


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
