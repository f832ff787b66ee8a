"""Triton kernels of shift_by_order.

    out[σ(t)] = tokens[σ(t−1)], out[σ(0)] = bos
    dtokens[σ(t)] = dout[σ(t+1)], dtokens[σ(N−1)] = 0;  dbos = dout[σ(0)], summed over the samples where they share it

Both directions are the same copy of rows, one step along the order or against it. tokens, out [B, N, D] and bos [D] or
[B, D] are float32, bfloat16 or float16. Only the order is saved for backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.ordered_rows import narrow

# Elements and columns of a tile that is copied; samples and columns of a tile that is summed for dbos.
_TILE, _COLUMNS = 4096, 256
_BOS_SAMPLES, _BOS_COLUMNS = 32, 64


@triton.jit
def _shift(
    source,
    edge,
    order,
    target,
    stride_sb,
    stride_sn,
    stride_sd,
    stride_eb,
    stride_ed,
    stride_order_b,
    stride_order,
    tokens,
    width,
    STEP: tl.constexpr,
    WITH_EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """target[σ(t)] = source[σ(t + STEP)]; where t + STEP is not in the order, `edge` or 0. target is contiguous.

    Grid: batch × tiles of BLOCK_N positions t in the order, tiles of BLOCK_D columns.
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    # int64: the offset of a sample passes 2^31 in large batches
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < tokens, o_d < width
    m_source = m_t & (o_t + STEP >= 0) & (o_t + STEP < tokens)
    order += batch * stride_order_b
    # [BLOCK_N] raster positions each
    to = tl.load(order + o_t * stride_order, mask=m_t, other=0)
    # read again rather than moved between threads: the neighbours lie in the same cache lines
    origin = tl.load(order + (o_t + STEP) * stride_order, mask=m_source, other=0)
    o_d = o_d.to(tl.int64)
    # rows of the neighbours, [BLOCK_N, BLOCK_D]
    p_source = source + batch * stride_sb + origin[:, None] * stride_sn + o_d[None, :] * stride_sd
    b = tl.load(p_source, mask=m_source[:, None] & m_d[None, :], other=0.0)
    if WITH_EDGE:
        # [BLOCK_D], for the one row without a neighbour
        b_edge = tl.load(edge + batch * stride_eb + o_d * stride_ed, mask=m_d, other=0.0)
        b = tl.where(m_source[:, None], b, narrow(b_edge.to(tl.float32), b.dtype, WIDEN)[None, :])
    # [BLOCK_N, BLOCK_D]
    p_target = target + (batch * tokens + to[:, None]) * width + o_d[None, :]
    tl.store(p_target, b, mask=m_t[:, None] & m_d[None, :])


@triton.jit
def _bos_gradient(
    grad,
    order,
    grad_bos,
    stride_gb,
    stride_gn,
    stride_gd,
    stride_order_b,
    width,
    each,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """grad_bos[i] = the sum over samples i · each … i · each + each − 1 of grad[σ(0)], in a fixed order and float32.

    Grid: rows of grad_bos, which is contiguous, tiles of BLOCK_D columns.
    """
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    o_d = o_d.to(tl.int64)
    b_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    # one program adds all samples of its row, BLOCK_B at a time: no atomics, the same bits every time
    for start in range(0, each, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        m_b = o_b < each
        o_b = i * each + o_b
        first = tl.load(order + o_b * stride_order_b, mask=m_b, other=0)
        # the row of the order's first token in each sample, [BLOCK_B, BLOCK_D]
        p_grad = grad + (o_b * stride_gb + first * stride_gn)[:, None] + o_d[None, :] * stride_gd
        b_sum += tl.sum(tl.load(p_grad, mask=m_b[:, None] & m_d[None, :], other=0.0).to(tl.float32), 0)
    tl.store(grad_bos + i * width + o_d, narrow(b_sum, grad_bos.dtype.element_ty, WIDEN), mask=m_d)


def _copy(
    source: torch.Tensor, edge: torch.Tensor | None, order: torch.Tensor, target: torch.Tensor, step: int
) -> None:
    """Launches `_shift`: source and target [B, N, D]; edge [D], [B, D], or None for zeros."""
    batch, tokens, width = source.shape
    launch.written("target", target, source.dtype, source.shape, source.device)
    block_d = min(launch.power_of_2(width), _COLUMNS)
    block_n = min(launch.power_of_2(tokens), _TILE // block_d)
    strides = (0, 0) if edge is None else (edge.stride(0) if edge.dim() == 2 else 0, edge.stride(-1))
    launch.launch(
        _shift,
        (batch * triton.cdiv(tokens, block_n), triton.cdiv(width, block_d)),
        source,
        edge,
        order,
        target,
        *source.stride(),
        *strides,
        _batch_stride(order),
        order.stride(-1),
        tokens,
        width,
        STEP=step,
        WITH_EDGE=edge is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        WIDEN=launch.widen(source.device),
        num_warps=4,
        num_stages=1,
    )


def _batch_stride(order: torch.Tensor) -> int:
    return order.stride(0) if order.dim() == 2 else 0


def forward(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out [B, N, D]; tokens [B, N, D], bos [D] or [B, D], order [N] or [B, N], N at least 1."""
    _copy(tokens, bos, order, out, -1)


def backward(
    grad: torch.Tensor, order: torch.Tensor, grad_tokens: torch.Tensor | None, grad_bos: torch.Tensor | None
) -> None:
    """Fills grad_tokens [B, N, D] and grad_bos [D] or [B, D], where they are given, from grad [B, N, D] of out."""
    if grad_tokens is not None:
        _copy(grad, None, order, grad_tokens, 1)
    if grad_bos is not None:
        batch, _, width = grad.shape
        rows, each = (1, batch) if grad_bos.dim() == 1 else (batch, 1)
        shape = (width,) if grad_bos.dim() == 1 else (batch, width)
        launch.written("grad_bos", grad_bos, grad_bos.dtype, shape, grad.device)
        launch.launch(
            _bos_gradient,
            (rows, triton.cdiv(width, _BOS_COLUMNS)),
            grad,
            order,
            grad_bos,
            *grad.stride(),
            _batch_stride(order),
            width,
            each,
            BLOCK_B=min(launch.power_of_2(each, 1), _BOS_SAMPLES),
            BLOCK_D=_BOS_COLUMNS,
            WIDEN=launch.widen(grad.device),
            num_warps=4,
            num_stages=1,
        )
