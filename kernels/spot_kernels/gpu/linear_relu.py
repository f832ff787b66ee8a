"""A linear layer with a ReLU: the product with its epilogue, and the Triton kernels of the backward pass.

    out = relu(x Wᵀ + b)
    ds = dout where out > 0, else 0;  db = Σ_rows ds

x [M, I], weight W [O, I], bias b and db [O], out, dout and ds [M, O]; float32, bfloat16 or float16. Forward is one
product of cuBLASLt, which adds the bias and takes the ReLU before it rounds and writes. Saved for backward: x, W and
out, from which the products dx = ds W and dW = dsᵀ x follow outside.

Backward is bound by memory: 231 MB for SPOT's FFN (12,544 tokens × 3,072 in bfloat16), 55 µs at 4.2 TB/s. A program
walks down its rows of a few columns with their sums in registers; a second kernel adds the programs' sums in a fixed
order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.ordered_rows import narrow

# Programs and columns of a tile that adds the programs' sums.
_SUM_PARTS, _SUM_COLUMNS = 64, 32


@triton.jit
def _backward(
    grad,
    out,
    grad_sum,
    parts,
    stride_g,
    stride_o,
    rows,
    columns,
    blocks_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: parts of `blocks_each` blocks of ROWS rows, tiles of COLUMNS columns. parts [parts, O]: their sums."""
    i_part, o_c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < columns
    # one sum for each row of a block: added up once, at the end
    b_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for i in range(blocks_each):
        o_r = (i_part * blocks_each + i) * ROWS + tl.arange(0, ROWS)
        m = (o_r < rows)[:, None] & m_c[None, :]
        # int64: the offset of a row passes 2^31 in large batches
        o_r = o_r.to(tl.int64)
        # dout and out [ROWS, COLUMNS]: not read again, so that ds, which is, may stay in the cache
        p_g, p_o = grad + o_r[:, None] * stride_g + o_c[None, :], out + o_r[:, None] * stride_o + o_c[None, :]
        b_g = tl.load(p_g, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_o = tl.load(p_o, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)
        # a NaN in out passes the gradient on, as PyTorch's ReLU does
        b_g = tl.where(b_o <= 0.0, 0.0, b_g)
        tl.store(grad_sum + o_r[:, None] * columns + o_c[None, :], b_g.to(grad_sum.dtype.element_ty), mask=m)
        b_sum += b_g
    # [COLUMNS]; no atomics, another kernel adds the parts
    tl.store(parts + i_part * columns + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def _sum_parts(parts, grad_bias, number, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDEN: tl.constexpr):
    """grad_bias [O] from parts [number, O]. Grid: blocks of columns."""
    o_p, o_c = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    # [BLOCK_P, BLOCK_C] parts at a time, always in the same order
    for start in range(0, number, BLOCK_P):
        m = (start + o_p < number)[:, None] & m_c[None, :]
        b_sum += tl.load(parts + (start + o_p)[:, None] * columns + o_c[None, :], mask=m, other=0.0)
    tl.store(grad_bias + o_c, narrow(tl.sum(b_sum, 0), grad_bias.dtype.element_ty, WIDEN), mask=m_c)


class _Config(NamedTuple):
    """rows, columns: of a tile. programs: wanted on each multiprocessor."""

    rows: int
    columns: int
    programs: int
    num_warps: int


def _backward_config(columns: int) -> _Config:
    """16 values of both inputs a thread; timed on an H200 at 12,544 × 3,072 (`bench/sweep.py --only linear_relu`)."""
    width = min(launch.power_of_2(columns), 128)
    return _Config(4096 // width, width, 2, 8)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out [M, O]; x [M, I], weight [O, I], bias [O].

    PyTorch takes the epilogue for a contiguous bias and more than one row and column of everything; in the few other
    cases it computes the same in two steps.
    """
    launch.written("out", out, x.dtype, (x.shape[0], weight.shape[0]), x.device)
    torch.ops.aten._addmm_activation.out(bias.contiguous(), x, weight.t(), out=out)


def backward(grad: torch.Tensor, out: torch.Tensor, grad_sum: torch.Tensor, grad_bias: torch.Tensor) -> None:
    """Fills grad_sum [M, O] and grad_bias [O] from grad and out [M, O]."""
    grad, out = launch.rows_last(grad), launch.rows_last(out)
    rows, columns = out.shape
    launch.written("grad_sum", grad_sum, out.dtype, (rows, columns), out.device)
    launch.written("grad_bias", grad_bias, out.dtype, (columns,), out.device)
    config = _backward_config(columns)
    tiles, blocks = triton.cdiv(columns, config.columns), triton.cdiv(rows, config.rows)
    # fewer programs leave fewer parts to add, more of them hide more latency
    wanted = max(1, config.programs * launch.multiprocessors(out.device) // max(tiles, 1))
    blocks_each = max(1, triton.cdiv(blocks, wanted))
    number = triton.cdiv(blocks, blocks_each)
    parts = torch.empty((number, columns), device=out.device, dtype=torch.float32)
    launch.launch(
        _backward,
        (number, tiles),
        grad,
        out,
        grad_sum,
        parts,
        grad.stride(0),
        out.stride(0),
        rows,
        columns,
        blocks_each,
        num_warps=config.num_warps,
        num_stages=1,
        ROWS=config.rows,
        COLUMNS=config.columns,
    )
    launch.launch(
        _sum_parts,
        (triton.cdiv(columns, _SUM_COLUMNS),),
        parts,
        grad_bias,
        number,
        columns,
        num_warps=4,
        num_stages=1,
        BLOCK_P=_SUM_PARTS,
        BLOCK_C=_SUM_COLUMNS,
        WIDEN=launch.widen(out.device),
    )
