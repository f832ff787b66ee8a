"""Triton kernels of permuted_causal_attention, backward; permuted_attention.py has the forward kernel.

    delta = Σ_d do · out;  ds = p (do vᵀ − delta);  dq = ds k / √d;  dk = dsᵀ q / √d;  dv = pᵀ do

p is computed again from q, k and the saved log-sum-exp. Two kernels without atomics, so results repeat bit for bit: one
takes a tile of rows, walks over its columns for dq and stores delta; the other takes a tile of columns and walks over
its rows for dk and dv. Rows and columns are tokens in the order's sequence, as in the forward kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.ordered_rows import load_order, load_rows, store_rows
from spot_kernels.gpu.permuted_attention import LOG2_E
from spot_kernels.gpu.permuted_attention_plan import common_arguments


@triton.jit
def _query_tile(
    b_q,
    b_grad,
    b_peak,
    b_log,
    b_delta,
    b_grad_q,
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
    """dq [BLOCK_M, BLOCK_D] of the rows after one more tile of columns."""
    o_column = start + tl.arange(0, BLOCK_N)
    m_column = o_column < tokens
    token = load_order(order, stride_order, o_column, m_column, DIAGONAL)
    # k and v of the tile's tokens, [BLOCK_N, BLOCK_D] each
    b_k = load_rows(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_v = load_rows(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    # scores and weights [BLOCK_M, BLOCK_N], as in the forward kernel but with the final maximum and sum
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if DIAGONAL:
        b_s = tl.where(o_column[None, :] <= o_row[:, None], b_s, float("-inf"))
    b_p = tl.exp2((b_s - b_peak[:, None]) * scale_log2 - b_log[:, None])
    b_grad_s = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    if DIAGONAL:
        # the first token's only weight is 1 whatever its logit: exactly zero, not the rounding of do vᵀ − delta
        b_grad_s = tl.where(o_row[:, None] > 0, b_grad_s, 0.0)
    return tl.dot(b_grad_s.to(b_k.dtype), b_k, b_grad_q, input_precision=PRECISION)


@triton.jit
def _backward_queries(
    grad,
    q,
    k,
    v,
    order,
    out,
    lse,
    delta,
    grad_q,
    stride_gb,
    stride_gh,
    stride_gn,
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
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_order_b,
    stride_order,
    heads,
    tokens,
    width,
    scale,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dq, and delta [B, H, N] for the other kernel. Grid and tiles as in the forward kernel, longest rows first."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    grad += batch * stride_gb + head * stride_gh
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    out += batch * stride_ob + head * stride_oh
    order += batch * stride_order_b
    o_row = start + tl.arange(0, BLOCK_M)
    m_row = o_row < tokens
    token = load_order(order, stride_order, o_row, m_row, True)
    # q, do and out of the rows, [BLOCK_M, BLOCK_D] each; out is needed for delta alone
    b_q = load_rows(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad = load_rows(grad, token, stride_gn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_out = load_rows(out, token, stride_on, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    # [BLOCK_M], in the order's sequence
    o_saved = batch_head.to(tl.int64) * tokens + o_row
    tl.store(delta + o_saved, b_delta, mask=m_row)
    p_lse = lse + batch_head.to(tl.int64) * 2 * tokens + o_row
    b_peak, b_log = tl.load(p_lse, mask=m_row, other=0.0), tl.load(p_lse + tokens, mask=m_row, other=0.0)
    b_grad_q = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    # columns before the tile's first row: visible to all rows and complete, so nothing is masked
    for column in range(0, start, BLOCK_N):
        b_grad_q = _query_tile(
            b_q,
            b_grad,
            b_peak,
            b_log,
            b_delta,
            b_grad_q,
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
    # columns on the diagonal
    for column in range(start, tl.minimum(start + BLOCK_M, tokens), BLOCK_N):
        b_grad_q = _query_tile(
            b_q,
            b_grad,
            b_peak,
            b_log,
            b_delta,
            b_grad_q,
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
    # [BLOCK_M, BLOCK_D]; the scale comes once at the end, in float32
    grad_q += batch * stride_dqb + head * stride_dqh
    store_rows(grad_q, token, stride_dqn, m_row, width, b_grad_q * scale, BLOCK_D, WIDEN)


@triton.jit
def _key_tile(
    b_k,
    b_v,
    b_grad_k,
    b_grad_v,
    grad,
    q,
    order,
    lse,
    delta,
    stride_gn,
    stride_qn,
    stride_order,
    start,
    o_column,
    tokens,
    width,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dk and dv [BLOCK_N, BLOCK_D] of the columns after one more tile of rows.

    Scores are [columns, rows] = [BLOCK_N, BLOCK_M]: then no tile of scores has to be transposed.
    """
    o_row = start + tl.arange(0, BLOCK_M)
    # rows past the last are loaded as zeros, and with do = delta = 0 they add nothing
    m_row = o_row < tokens
    token = load_order(order, stride_order, o_row, m_row, True)
    # q and do of the rows, [BLOCK_M, BLOCK_D] each; what was saved of them, [BLOCK_M] each
    b_q = load_rows(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad = load_rows(grad, token, stride_gn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_peak = tl.load(lse + o_row, mask=m_row, other=0.0)
    b_log = tl.load(lse + tokens + o_row, mask=m_row, other=0.0)
    b_delta = tl.load(delta + o_row, mask=m_row, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if DIAGONAL:
        b_s = tl.where(o_column[:, None] <= o_row[None, :], b_s, float("-inf"))
    b_p = tl.exp2((b_s - b_peak[None, :]) * scale_log2 - b_log[None, :])
    b_grad_v = tl.dot(b_p.to(b_grad.dtype), b_grad, b_grad_v, input_precision=PRECISION)
    b_grad_s = b_p * (tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION) - b_delta[None, :])
    if DIAGONAL:
        # the first token's only weight is 1 whatever its logit: exactly zero, not the rounding of do vᵀ − delta
        b_grad_s = tl.where(o_row[None, :] > 0, b_grad_s, 0.0)
    return tl.dot(b_grad_s.to(b_q.dtype), b_q, b_grad_k, input_precision=PRECISION), b_grad_v


@triton.jit
def _backward_keys(
    grad,
    q,
    k,
    v,
    order,
    lse,
    delta,
    grad_k,
    grad_v,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_db,
    stride_dh,
    stride_dn,
    stride_order_b,
    stride_order,
    heads,
    tokens,
    width,
    scale,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dk and dv. Grid: batch × heads × tiles of BLOCK_N columns, a multiple of BLOCK_M.

    The first columns are seen by most rows: their tiles start first.
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    batch_head = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * BLOCK_N
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    grad += batch * stride_gb + head * stride_gh
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    order += batch * stride_order_b
    lse += batch_head.to(tl.int64) * 2 * tokens
    delta += batch_head.to(tl.int64) * tokens
    o_column = start + tl.arange(0, BLOCK_N)
    m_column = o_column < tokens
    token = load_order(order, stride_order, o_column, m_column, True)
    # k and v of the columns, [BLOCK_N, BLOCK_D] each, kept for all rows
    b_k = load_rows(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_v = load_rows(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad_k = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_grad_v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    # rows on the diagonal; those before it see no column of this tile
    for row in range(start, tl.minimum(start + BLOCK_N, tokens), BLOCK_M):
        b_grad_k, b_grad_v = _key_tile(
            b_k,
            b_v,
            b_grad_k,
            b_grad_v,
            grad,
            q,
            order,
            lse,
            delta,
            stride_gn,
            stride_qn,
            stride_order,
            row,
            o_column,
            tokens,
            width,
            scale_log2,
            BLOCK_M,
            BLOCK_D,
            EVEN_D,
            True,
            PRECISION,
            WIDEN,
        )
    # rows after the tile's last column see all of it
    for row in range(start + BLOCK_N, tokens, BLOCK_M):
        b_grad_k, b_grad_v = _key_tile(
            b_k,
            b_v,
            b_grad_k,
            b_grad_v,
            grad,
            q,
            order,
            lse,
            delta,
            stride_gn,
            stride_qn,
            stride_order,
            row,
            o_column,
            tokens,
            width,
            scale_log2,
            BLOCK_M,
            BLOCK_D,
            EVEN_D,
            False,
            PRECISION,
            WIDEN,
        )
    # dk and dv have the same layout
    grad_k += batch * stride_db + head * stride_dh
    grad_v += batch * stride_db + head * stride_dh
    store_rows(grad_k, token, stride_dn, m_column, width, b_grad_k * scale, BLOCK_D, WIDEN)
    store_rows(grad_v, token, stride_dn, m_column, width, b_grad_v, BLOCK_D, WIDEN)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    """Fills the gradients of q, k and v [B, H, N, d], laid out as [B, N, H, d], from grad [B, H, N, d] of out.

    q, k, v, order, out and lse as in the forward launcher.
    """
    grad, q, k, v, out = (launch.rows_last(tensor) for tensor in (grad, q, k, v, out))
    batch, heads, tokens, width = q.shape
    lse = launch.dense("lse", lse, torch.float32, (batch, heads, 2, tokens), q.device)
    for name, result in (("grad_q", grad_q), ("grad_k", grad_k), ("grad_v", grad_v)):
        launch.written(name, result.transpose(1, 2), q.dtype, (batch, tokens, heads, width), q.device)
    delta = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    shapes, constants, config = common_arguments(q, order)
    strides = [stride for tensor in (grad, q, k, v) for stride in tensor.stride()[:3]]
    scales = width**-0.5, width**-0.5 * LOG2_E
    tiles = config.queries
    launch.launch(
        _backward_queries,
        (batch * heads * triton.cdiv(tokens, tiles.block_m),),
        grad,
        q,
        k,
        v,
        order,
        out,
        lse,
        delta,
        grad_q,
        *strides,
        *out.stride()[:3],
        *grad_q.stride()[:3],
        *shapes,
        *scales,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
    tiles = config.keys
    launch.launch(
        _backward_keys,
        (batch * heads * triton.cdiv(tokens, tiles.block_n),),
        grad,
        q,
        k,
        v,
        order,
        lse,
        delta,
        grad_k,
        grad_v,
        *strides,
        *grad_k.stride()[:3],
        *shapes,
        *scales,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
