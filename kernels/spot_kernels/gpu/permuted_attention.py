"""Triton kernel of permuted_causal_attention, forward; permuted_attention_backward.py has the backward kernels.

    s = q kᵀ;  p = softmax over the visible of s / √d;  out = p v

q, k, v and out [B, H, N, d] in raster layout, float32, bfloat16 or float16. Row t of a tile is raster token σ(t),
loaded and stored through the order. In the order's sequence the mask is the plain causal one: a tile of rows meets
whole tiles of columns before it, masked ones on the diagonal and none after it.

Saved for backward is the log-sum-exp of each row in the order's sequence, lse float32 [B, H, 2, N]: the largest s, and
the logarithm to base 2 of the sum of exp((s − largest) / √d). A single number would be rounded as coarsely as large
logits are, and p with it; differences of large s are exact, their scaled values are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.ordered_rows import load_order, load_rows, store_rows
from spot_kernels.gpu.permuted_attention_plan import common_arguments

LOG2_E = 1.4426950408889634


@triton.jit
def _forward_tile(
    b_q,
    b_acc,
    b_peak,
    b_sum,
    k,
    v,
    order,
    stride_kn,
    stride_vn,
    stride_order,
    start,
    o_row,
    tokens,
    width,
    scale_log2,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The online softmax over one more tile of columns: weighted sum of v, running maximum, sum of weights."""
    o_column = start + tl.arange(0, BLOCK_N)
    m_column = o_column < tokens
    token = load_order(order, stride_order, o_column, m_column, DIAGONAL)
    # k and v of the tile's tokens, [BLOCK_N, BLOCK_D] each
    b_k = load_rows(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_v = load_rows(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    # [BLOCK_M, BLOCK_N]; unscaled, because the maximum has to be subtracted before the scale rounds
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if DIAGONAL:
        b_s = tl.where(o_column[None, :] <= o_row[:, None], b_s, float("-inf"))
    # finite, since every row sees column 0, which is in its first tile
    b_new = tl.maximum(b_peak, tl.max(b_s, 1))
    # exp2 is one instruction; log2 e is in the scale
    b_p = tl.exp2((b_s - b_new[:, None]) * scale_log2)
    b_shrink = tl.exp2((b_peak - b_new) * scale_log2)
    # what was summed so far refers to the old maximum
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum * b_shrink + tl.sum(b_p, 1)


@triton.jit
def _forward(
    q,
    k,
    v,
    order,
    out,
    lse,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_order_b,
    stride_order,
    heads,
    tokens,
    width,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid: batch × heads × tiles of BLOCK_M rows, a multiple of BLOCK_N.

    The last rows see most columns, so their tiles start first and the short ones fill up the end.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    # int64: the offset of a sample passes 2^31 in large batches
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    order += batch * stride_order_b
    o_row = start + tl.arange(0, BLOCK_M)
    m_row = o_row < tokens
    token = load_order(order, stride_order, o_row, m_row, True)
    # queries of the rows, [BLOCK_M, BLOCK_D], kept for all columns
    b_q = load_rows(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # columns before the tile's first row: visible to all rows and complete, so nothing is masked
    for column in range(0, start, BLOCK_N):
        b_acc, b_peak, b_sum = _forward_tile(
            b_q,
            b_acc,
            b_peak,
            b_sum,
            k,
            v,
            order,
            stride_kn,
            stride_vn,
            stride_order,
            column,
            o_row,
            tokens,
            width,
            scale_log2,
            BLOCK_N,
            BLOCK_D,
            EVEN_D,
            False,
            PRECISION,
            WIDEN,
        )
    # columns on the diagonal; those after it are visible to no row
    for column in range(start, tl.minimum(start + BLOCK_M, tokens), BLOCK_N):
        b_acc, b_peak, b_sum = _forward_tile(
            b_q,
            b_acc,
            b_peak,
            b_sum,
            k,
            v,
            order,
            stride_kn,
            stride_vn,
            stride_order,
            column,
            o_row,
            tokens,
            width,
            scale_log2,
            BLOCK_N,
            BLOCK_D,
            EVEN_D,
            True,
            PRECISION,
            WIDEN,
        )
    # [BLOCK_M, BLOCK_D], to the raster positions that q came from
    out += batch * stride_ob + head * stride_oh
    store_rows(out, token, stride_on, m_row, width, b_acc / b_sum[:, None], BLOCK_D, WIDEN)
    # [BLOCK_M] each, in the order's sequence: backward reads them row by row
    p_lse = lse + batch_head.to(tl.int64) * 2 * tokens + o_row
    tl.store(p_lse, b_peak, mask=m_row)
    tl.store(p_lse + tokens, tl.log2(b_sum), mask=m_row)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Fills out [B, H, N, d], laid out as [B, N, H, d], and lse [B, H, 2, N] float32 (contiguous).

    q, k, v [B, H, N, d], order [N] or [B, N].
    """
    q, k, v = (launch.rows_last(tensor) for tensor in (q, k, v))
    batch, heads, tokens, width = q.shape
    launch.written("lse", lse, torch.float32, (batch, heads, 2, tokens), q.device)
    launch.written("out", out.transpose(1, 2), q.dtype, (batch, tokens, heads, width), q.device)
    shapes, constants, config = common_arguments(q, order)
    tiles = config.forward
    launch.launch(
        _forward,
        (batch * heads * triton.cdiv(tokens, tiles.block_m),),
        q,
        k,
        v,
        order,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *shapes,
        width**-0.5 * LOG2_E,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
