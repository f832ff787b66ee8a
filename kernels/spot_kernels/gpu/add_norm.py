"""Triton kernels of add_norm.

    s = x + delta;  n = (s − mean) / √(variance + eps);  normed = n · weight + bias
    g = dnormed · weight;  ds' = ds + (g − mean g − n mean(g n)) / √(variance + eps)
    dx = ddelta = ds';  dweight = Σ_rows dnormed n;  dbias = Σ_rows dnormed

x, delta, sum, normed and their gradients [M, D], each of its own dtype; weight, bias [D]; low int8 [M, D]: eight bits
of mantissa below those of a bfloat16 tensor. All arithmetic is float32 in registers. Saved for backward: s as it is
stored (without its low: n would gain nothing beside a dnormed of eight bits), mean and 1 / √(variance + eps) [M].

Both kernels move bytes and nothing else counts: at 12,544 × 768 with a stream of 24 bits forward reads 5 and writes 5
bytes a value, backward reads 6 and writes 2, 96 and 77 MB. A row fits one tile. Backward programs walk over rows with
their part of dweight and dbias in registers; a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.part_sums import sum_parts


@triton.jit
def _split(b):
    """float32 → bfloat16, and the missing part in units of 2^-8 of its last bit, int8."""
    b_bits = b.to(tl.int32, bitcast=True)
    # To the nearest, ties to even, on the bits: the interpreter's conversion truncates. NaN must not be rounded away.
    b_round = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
    b_round = tl.where(b == b, b_round, b_bits)
    b_low = (b_bits - b_round + 128) >> 8
    b_low = tl.minimum(tl.maximum(b_low, -128), 127).to(tl.int8)
    return b_round.to(tl.float32, bitcast=True).to(tl.bfloat16), b_low


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _forward(
    x,
    low,
    delta,
    weight,
    bias,
    total,
    normed,
    new_low,
    mean,
    inverse,
    inner,
    stride_xo,
    stride_xi,
    stride_d,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LOW: tl.constexpr,
    WITH_DELTA: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    LOW_OF: tl.constexpr,
):
    """Grid: blocks of ROWS rows. Row r of x is at (r // inner, r % inner); low, delta and results are contiguous.

    LOW_OF: 0 none, 1 the sum, 2 normed.
    """
    o_row, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_row, m_d = o_row < rows, o_d < width
    m = m_row[:, None] & m_d[None, :]
    # int64: the offset of a row passes 2^31 in large batches
    o_x = (o_row // inner).to(tl.int64) * stride_xo + (o_row % inner).to(tl.int64) * stride_xi
    o_row = o_row.to(tl.int64)
    o = o_row[:, None] * width + o_d[None, :]
    # Eight bytes of a low at a time, though a load has room for sixteen: in threads with eight values of each tensor
    # no tile has to change its layout.
    o_low = tl.max_contiguous(o, (1, 8))
    # x, low and delta [ROWS, BLOCK_D]
    b_s = tl.load(x + o_x[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if WITH_LOW:
        # bits of floats of one sign count on across exponents, so eight more bits are an addition
        b_more = tl.load(low + o_low, mask=m, other=0).to(tl.int32) << 8
        b_s = (b_s.to(tl.int32, bitcast=True) + b_more).to(tl.float32, bitcast=True)
    if WITH_DELTA:
        b_s += tl.load(delta + o_row[:, None] * stride_d + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if LOW_OF == 1:
            b_high, b_low = _split(b_s)
            tl.store(total + o, b_high, mask=m)
            tl.store(new_low + o_low, b_low, mask=m)
        else:
            # what is normalised is what is stored and what backward reads
            b_high = b_s.to(total.dtype.element_ty)
            tl.store(total + o, b_high, mask=m)
            b_s = b_high.to(tl.float32)
    # two passes over registers, mean before variance: E[s²] − E[s]² would cancel. Padding must not enter the variance
    b_mean = tl.sum(b_s, 1) / width
    b_c = tl.where(m, b_s - b_mean[:, None], 0.0)
    b_inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_c * b_c, 1) / width + eps))
    tl.store(mean + o_row, b_mean, mask=m_row)
    tl.store(inverse + o_row, b_inverse, mask=m_row)
    b_n = b_c * b_inverse[:, None]
    if WITH_WEIGHT:
        # weight and bias [BLOCK_D]
        b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_b = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_n = b_n * b_w[None, :] + b_b[None, :]
    if LOW_OF == 2:
        b_high, b_low = _split(b_n)
        tl.store(normed + o, b_high, mask=m)
        tl.store(new_low + o_low, b_low, mask=m)
    else:
        tl.store(normed + o, b_n.to(normed.dtype.element_ty), mask=m)


@triton.jit
def _backward(
    grad_sum,
    grad_normed,
    total,
    mean,
    inverse,
    weight,
    grad_x,
    grad_delta,
    parts,
    inner,
    stride_to,
    stride_ti,
    stride_s,
    stride_n,
    rows,
    width,
    blocks_each,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_SUM: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_DELTA: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
):
    """Grid: `blocks_each` blocks of ROWS rows a program. parts [2, programs, D]: dweight and dbias of each program."""
    program, o_d = tl.program_id(0), tl.arange(0, BLOCK_D)
    m_d = o_d < width
    if WITH_WEIGHT:
        # weight [BLOCK_D], kept for all rows
        b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if FOR_WEIGHT:
        b_grad_w = tl.zeros((BLOCK_D,), dtype=tl.float32)
        b_grad_b = tl.zeros((BLOCK_D,), dtype=tl.float32)
    # several blocks a program, so that there are few parts of dweight and dbias to add
    for i in tl.range(0, blocks_each, num_stages=STAGES):
        o_row = (program * blocks_each + i) * ROWS + tl.arange(0, ROWS)
        m_row = o_row < rows
        m = m_row[:, None] & m_d[None, :]
        o_t = (o_row // inner).to(tl.int64) * stride_to + (o_row % inner).to(tl.int64) * stride_ti
        o_row = o_row.to(tl.int64)
        # sum and dnormed [ROWS, BLOCK_D], statistics [ROWS]
        b_s = tl.load(total + o_t[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_o = tl.load(grad_normed + o_row[:, None] * stride_n + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(mean + o_row, mask=m_row, other=0.0)
        b_inverse = tl.load(inverse + o_row, mask=m_row, other=0.0)
        b_n = tl.where(m, (b_s - b_mean[:, None]) * b_inverse[:, None], 0.0)
        if FOR_WEIGHT:
            # the rows of a tile lie in one thread: these sums cost no exchange
            b_grad_w += tl.sum(b_o * b_n, 0)
            b_grad_b += tl.sum(b_o, 0)
        if FOR_X or FOR_DELTA:
            b_g = b_o
            if WITH_WEIGHT:
                b_g = b_o * b_w[None, :]
            # both sums of a row in one exchange between the warps
            b_even, b_along = tl.reduce((b_g, b_g * b_n), 1, _add_two)
            b_grad = (b_g - (b_even / width)[:, None] - b_n * (b_along / width)[:, None]) * b_inverse[:, None]
            if WITH_SUM:
                b_grad += tl.load(grad_sum + o_row[:, None] * stride_s + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            o = o_row[:, None] * width + o_d[None, :]
            if FOR_X:
                tl.store(grad_x + o, b_grad.to(grad_x.dtype.element_ty), mask=m)
            if FOR_DELTA:
                tl.store(grad_delta + o, b_grad.to(grad_delta.dtype.element_ty), mask=m)
    if FOR_WEIGHT:
        # [BLOCK_D] twice: no atomics, another kernel adds the parts
        p_parts = parts + program * width + o_d
        tl.store(p_parts, b_grad_w, mask=m_d)
        tl.store(p_parts + tl.num_programs(0) * width, b_grad_b, mask=m_d)


class _Config(NamedTuple):
    rows: int
    num_warps: int


class _BackwardConfig(NamedTuple):
    """programs: for each multiprocessor, at most."""

    rows: int
    num_warps: int
    programs: int
    num_stages: int


def _forward_config(block_d: int) -> _Config:
    """Eight values of a row a thread, so that a load is 16 bytes of bfloat16; 32 in all, to have more on the way."""
    num_warps = max(1, min(16, block_d // 256))
    return _Config(max(1, min(16, 1024 * num_warps // block_d)), num_warps)


def _backward_config(block_d: int) -> _BackwardConfig:
    """Few warps a program and the next two blocks on their way: timed on an H200 at 12,544 × 768, where more warps and
    programs without loads ahead were slower by half (`bench/sweep.py --only add_norm` tries them)."""
    return _BackwardConfig(2, max(1, min(16, block_d // 512)), 4, 3)


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """A tensor [..., D], inner, stride_o, stride_i: row r is at (r // inner) · stride_o + (r % inner) · stride_i.

    So the patches of [B, prefix + N, D] need no copy; other layouts than two strides of rows get one.
    """
    tensor = tensor if tensor.dim() > 2 else tensor.reshape(1, -1, tensor.shape[-1])
    tensor = launch.rows_last(tensor.reshape(-1, *tensor.shape[-2:]))
    outer, inner = tensor.shape[:2]
    return tensor, max(1, inner), 0 if outer == 1 else tensor.stride(0), tensor.stride(1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """[..., D] as [M, D], a view wherever its rows are one stride apart."""
    return launch.rows_last(tensor.reshape(-1, tensor.shape[-1]))


def forward(
    x: torch.Tensor,
    low: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    low_of: str | None,
    total: torch.Tensor,
    normed: torch.Tensor,
    new_low: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> None:
    """Fills the results of `add_norm.empty_results`: total unless delta is None, new_low unless low_of is."""
    shape, rows, width, device = x.shape, mean.shape[0], x.shape[-1], x.device
    if delta is not None:
        launch.written("total", total, torch.bfloat16 if low_of == "sum" else x.dtype, shape, device)
    if low_of is not None:
        launch.written("new_low", new_low, torch.int8, shape, device)
    launch.written("normed", normed, normed.dtype, shape, device)
    launch.written("mean", mean, torch.float32, (rows,), device)
    launch.written("inverse", inverse, torch.float32, (rows,), device)
    x, inner, stride_o, stride_i = _rows(x)
    delta = None if delta is None else _flat(delta)
    block_d = launch.power_of_2(width)
    config = _forward_config(block_d)
    launch.launch(
        _forward,
        (triton.cdiv(rows, config.rows),),
        x,
        None if low is None else low.contiguous(),
        delta,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        total,
        normed,
        new_low,
        mean,
        inverse,
        inner,
        stride_o,
        stride_i,
        0 if delta is None else delta.stride(0),
        rows,
        width,
        eps,
        num_warps=config.num_warps,
        num_stages=1,
        ROWS=config.rows,
        BLOCK_D=block_d,
        WITH_LOW=low is not None,
        WITH_DELTA=delta is not None,
        WITH_WEIGHT=weight is not None,
        LOW_OF=(None, "sum", "normed").index(low_of),
    )


def backward(
    grad_sum: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_delta: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
) -> None:
    """Fills the gradients of `add_norm.empty_gradients` that are not empty, from those of total (None: zero) and
    normed."""
    shape, rows, width, device = total.shape, mean.shape[0], total.shape[-1], total.device
    for_x, for_delta, for_weight = (tuple(t.shape) != (0,) for t in (grad_x, grad_delta, grad_weight))
    for name, grad, wanted, expected in (
        ("grad_x", grad_x, for_x, shape),
        ("grad_delta", grad_delta, for_delta, shape),
        ("grad_weight", grad_weight, for_weight, (width,)),
        ("grad_bias", grad_bias, for_weight, (width,)),
    ):
        if wanted:
            launch.written(name, grad, grad.dtype, expected, device)
    mean, inverse = (launch.dense("statistics", t, torch.float32, (rows,), device) for t in (mean, inverse))
    total, inner, stride_o, stride_i = _rows(total)
    grad_sum, grad_normed = (None if g is None else _flat(g) for g in (grad_sum, grad_normed))
    block_d = launch.power_of_2(width)
    config = _backward_config(block_d)
    blocks = triton.cdiv(rows, config.rows)
    # more programs would hide more latency, but each writes a part that the second kernel has to read
    blocks_each = max(1, triton.cdiv(blocks, config.programs * launch.multiprocessors(device)))
    programs = triton.cdiv(blocks, blocks_each)
    parts = torch.empty((2, programs, width), device=device, dtype=torch.float32) if for_weight else None
    launch.launch(
        _backward,
        (programs,),
        grad_sum,
        grad_normed,
        total,
        mean,
        inverse,
        None if weight is None else weight.contiguous(),
        grad_x,
        grad_delta,
        parts,
        inner,
        stride_o,
        stride_i,
        0 if grad_sum is None else grad_sum.stride(0),
        grad_normed.stride(0),
        rows,
        width,
        blocks_each,
        num_warps=config.num_warps,
        num_stages=1,
        ROWS=config.rows,
        BLOCK_D=block_d,
        STAGES=config.num_stages,
        WITH_SUM=grad_sum is not None,
        WITH_WEIGHT=weight is not None,
        FOR_X=for_x,
        FOR_DELTA=for_delta,
        FOR_WEIGHT=for_weight,
    )
    if for_weight:
        sum_parts(parts, grad_weight, grad_bias)
