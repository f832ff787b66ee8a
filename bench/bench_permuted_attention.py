"""Causal self-attention in a patch order, `permuted_causal_attention`.

With n = B·H·N·d elements of s bytes: forward reads q, k, v and writes the result, 4n s, and a log-sum-exp of 4 bytes a
row; backward reads q, k, v, the result, its gradient and the log-sum-exp and writes three gradients, 8n s. Of N² pairs
N (N + 1) / 2 are visible; two products forward, five backward.

The baselines know the order as well: SDPA on rows gathered by it and scattered back, FlexAttention with a block mask
made from it beforehand (which is not timed, though training would need a new one for every order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness.kernel_bench import Case, Function, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, FLEX, OURS, SDPA

import spot_kernels
from spot_kernels.reference import permuted_attention as reference

OPERATOR = "permuted_causal_attention"


@dataclass(frozen=True)
class Shape:
    """batch: on a GPU; on_cpu: on a CPU, where 0 leaves the shape out."""

    name: str
    batch: int
    heads: int
    tokens: int
    width: int
    on_cpu: int
    main: bool = True


SHAPES = (
    Shape("decoder", 64, 6, 196, 128, 8),
    Shape("high resolution", 16, 6, 1024, 128, 1),
    Shape("narrow heads", 64, 6, 196, 64, 8, main=False),
    Shape("N", 2, 6, 4096, 128, 0, main=False),
)


def work(batch: int, heads: int, tokens: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes."""
    n = batch * heads * tokens * width
    sums = 4 * batch * heads * tokens
    products = batch * heads * width * tokens * (tokens + 1) // 2
    order = 8 * tokens
    return Work(4 * n * size + sums + order, 4 * products), Work(8 * n * size + sums + order, 10 * products)


def columns(tokens: int, device: torch.device) -> torch.Tensor:
    """Column after column of a square grid: the order [N] that takes neighbouring rows of memory furthest apart."""
    side = math.isqrt(tokens)
    return torch.arange(tokens, device=device).view(side, side).t().flatten()


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused attention on rows in the order, and its rows back in raster."""
    q, k, v = (t.index_select(2, order) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.index_select(2, reference.order_rank(order))


def flex(tokens: int, device: torch.device) -> Function:
    """FlexAttention with the columns' block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rank = reference.order_rank(columns(tokens, device))
    mask = create_block_mask(lambda b, h, i, j: rank[j] <= rank[i], None, None, tokens, tokens, device=device)
    attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v, order: attention(q, k, v, block_mask=mask)


def build(shape: tuple[int, int, int, int], dtype: torch.dtype, setting: Setting, names: tuple[str, ...]) -> Problem:
    tokens, device = shape[2], setting.device

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        return *randn(seed, shape, shape, shape, device=device, dtype=dtype), columns(tokens, device)

    plain = reference.permuted_causal_attention
    techniques = {
        OURS: lambda: spot_kernels.permuted_causal_attention,
        EAGER: lambda: plain,
        COMPILE: compiled(plain),
        SDPA: lambda: gathered,
        FLEX: lambda: flex(tokens, device),
    }
    return Problem(inputs, {name: techniques[name] for name in names}, plain)


def cases(setting: Setting) -> list[Case]:
    made = []
    for shape in (Shape("tiny", 1, 2, 36, 32, 1, main=False),) if setting.tiny else SHAPES:
        batch = setting.batch(shape.batch, shape.on_cpu)
        if not batch:
            continue
        dims = batch, shape.heads, shape.tokens, shape.width
        # compiling takes from six seconds
        compare = shape.main and (setting.gpu or shape.name == "decoder")
        names = (OURS, EAGER, *[COMPILE] * compare, SDPA, *[FLEX] * (setting.gpu and not setting.tiny))
        label = sizes(shape.name, batch, shape.batch, f"{shape.heads} heads {shape.tokens} d{shape.width}")
        for dtype in setting.dtypes:
            made.append(
                Case(
                    OPERATOR,
                    label,
                    name_of(dtype),
                    *work(*dims, dtype.itemsize),
                    names,
                    lambda dims=dims, dtype=dtype, names=names: build(dims, dtype, setting, names),
                )
            )
    return made


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
