"""Triton kernels of permuted_causal_attention.

    s = q kᵀ;  p = softmax over the visible of s / √d;  out = p v
    delta = Σ_d do · out;  ds = p (do vᵀ − delta);  dq = ds k / √d;  dk = dsᵀ q / √d;  dv = pᵀ do

Kernels count tokens in the order: row t of a tile is raster token σ(t), loaded and stored through the order. There the
mask is the plain causal one, so a tile of rows meets whole tiles of columns before it, masked ones on the diagonal, and
none after it. Saved for backward is the log-sum-exp of each row, in the order, float32 [B, H, 2, N]: the largest s, and
the logarithm to base 2 of the sum of exp((s − largest) / √d). One number for both would be rounded as coarsely as large
logits are, and p with it; differences of large s are exact, where their scaled values are not.

Backward is two kernels without atomics: one walks over columns for dq and leaves delta, one walks over rows for dk, dv.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.permuted_attention import empty_gradients, empty_results

_LOG2_E = 1.4426950408889634


@triton.jit
def _load(
    base,
    token,
    stride,
    m_row,
    width,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows of a [N, width] matrix at the raster positions `token`; 0 beyond the width and, if MASKED, beyond m_row."""
    o_d = tl.arange(0, BLOCK_D)
    p = base + token[:, None] * stride + o_d[None, :]
    if MASKED and EVEN_D:
        b = tl.load(p, mask=m_row[:, None], other=0.0)
    elif MASKED:
        b = tl.load(p, mask=m_row[:, None] & (o_d < width)[None, :], other=0.0)
    elif EVEN_D:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=(o_d < width)[None, :], other=0.0)
    if WIDEN:
        b = b.to(tl.float32)
    return b


@triton.jit
def narrow(b, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `b` in `dtype`, to nearest: the interpreter cuts bfloat16 off, so there the rounding is added before."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b.to(tl.int32, bitcast=True)
        b = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return b.to(dtype)


@triton.jit
def _store(base, token, stride, m_row, width, b, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p = base + token[:, None] * stride + o_d[None, :]
    tl.store(p, narrow(b, base.dtype.element_ty, WIDEN), mask=m_row[:, None] & (o_d < width)[None, :])


@triton.jit
def _load_order(order, stride, o_row, m_row, MASKED: tl.constexpr):
    """Raster positions (int64) of the tokens at places o_row of the order."""
    if MASKED:
        return tl.load(order + o_row * stride, mask=m_row, other=0)
    return tl.load(order + o_row * stride)


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
    """One tile of columns: the running maximum, sum of weights and weighted sum of v after it."""
    o_column = start + tl.arange(0, BLOCK_N)
    m_column = o_column < tokens
    token = _load_order(order, stride_order, o_column, m_column, DIAGONAL)
    # [BLOCK_N, BLOCK_D] twice
    b_k = _load(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_v = _load(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if DIAGONAL:
        b_s = tl.where(o_column[None, :] <= o_row[:, None], b_s, float("-inf"))
    # finite: the first tile of a row has a column that it sees
    b_new = tl.maximum(b_peak, tl.max(b_s, 1))
    b_p = tl.exp2((b_s - b_new[:, None]) * scale_log2)
    b_shrink = tl.exp2((b_peak - b_new) * scale_log2)
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
    """Grid: batch × heads × tiles of rows, the longest first. BLOCK_M is a multiple of BLOCK_N."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    order += batch * stride_order_b
    o_row = start + tl.arange(0, BLOCK_M)
    m_row = o_row < tokens
    token = _load_order(order, stride_order, o_row, m_row, True)
    # [BLOCK_M, BLOCK_D]
    b_q = _load(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
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
    out += batch * stride_ob + head * stride_oh
    _store(out, token, stride_on, m_row, width, b_acc / b_sum[:, None], BLOCK_D, WIDEN)
    p_lse = lse + batch_head.to(tl.int64) * 2 * tokens + o_row
    tl.store(p_lse, b_peak, mask=m_row)
    tl.store(p_lse + tokens, tl.log2(b_sum), mask=m_row)


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
    """dq after one tile of columns."""
    o_column = start + tl.arange(0, BLOCK_N)
    m_column = o_column < tokens
    token = _load_order(order, stride_order, o_column, m_column, DIAGONAL)
    # [BLOCK_N, BLOCK_D] twice
    b_k = _load(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_v = _load(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, DIAGONAL, WIDEN)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if DIAGONAL:
        b_s = tl.where(o_column[None, :] <= o_row[:, None], b_s, float("-inf"))
    b_p = tl.exp2((b_s - b_peak[:, None]) * scale_log2 - b_log[:, None])
    b_grad_s = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    if DIAGONAL:
        # the first token's only weight is 1 whatever its logit
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
    """dq, and delta for the other kernel. Grid and tiles as in `_forward`."""
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
    token = _load_order(order, stride_order, o_row, m_row, True)
    # [BLOCK_M, BLOCK_D] three times; the output is needed for delta alone
    b_q = _load(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad = _load(grad, token, stride_gn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_out = _load(out, token, stride_on, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    o_saved = batch_head.to(tl.int64) * tokens + o_row
    tl.store(delta + o_saved, b_delta, mask=m_row)
    p_lse = lse + batch_head.to(tl.int64) * 2 * tokens + o_row
    b_peak, b_log = tl.load(p_lse, mask=m_row, other=0.0), tl.load(p_lse + tokens, mask=m_row, other=0.0)
    b_grad_q = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
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
    grad_q += batch * stride_dqb + head * stride_dqh
    _store(grad_q, token, stride_dqn, m_row, width, b_grad_q * scale, BLOCK_D, WIDEN)


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
    """dk and dv after one tile of rows; scores stand as [columns, rows]."""
    o_row = start + tl.arange(0, BLOCK_M)
    # rows past the last load as zeros, and with do = delta = 0 they add nothing
    m_row = o_row < tokens
    token = _load_order(order, stride_order, o_row, m_row, True)
    # [BLOCK_M, BLOCK_D] twice, [BLOCK_M] three times
    b_q = _load(q, token, stride_qn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad = _load(grad, token, stride_gn, m_row, width, BLOCK_D, EVEN_D, True, WIDEN)
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
        # the first token's only weight is 1 whatever its logit
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
    """dk and dv. Grid: batch × heads × tiles of columns, the longest first. BLOCK_N is a multiple of BLOCK_M."""
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
    token = _load_order(order, stride_order, o_column, m_column, True)
    # [BLOCK_N, BLOCK_D] twice
    b_k = _load(k, token, stride_kn, m_column, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_v = _load(v, token, stride_vn, m_column, width, BLOCK_D, EVEN_D, True, WIDEN)
    b_grad_k = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_grad_v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
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
    # dk and dv lie alike in memory
    grad_k += batch * stride_db + head * stride_dh
    grad_v += batch * stride_db + head * stride_dh
    _store(grad_k, token, stride_dn, m_column, width, b_grad_k * scale, BLOCK_D, WIDEN)
    _store(grad_v, token, stride_dn, m_column, width, b_grad_v, BLOCK_D, WIDEN)


class _Tiles(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class _Config(NamedTuple):
    forward: _Tiles
    queries: _Tiles
    keys: _Tiles


# More tokens than this pay for taller tiles: fewer of them are cut by the diagonal, and k and v are read less often.
_FEW_TOKENS = 512
# With three stages rows are in flight for one tile and their places in the order for the next.
_HALF = {
    "sm_80": _Config(_Tiles(64, 32, 4, 3), _Tiles(64, 32, 4, 3), _Tiles(32, 32, 4, 3)),
    "sm_89": _Config(_Tiles(64, 32, 4, 3), _Tiles(64, 32, 4, 3), _Tiles(32, 32, 4, 3)),
    "sm_90": _Config(_Tiles(64, 64, 4, 3), _Tiles(64, 64, 4, 3), _Tiles(32, 64, 4, 3)),
    "sm_100": _Config(_Tiles(64, 64, 4, 3), _Tiles(64, 32, 4, 3), _Tiles(32, 64, 4, 3)),
    "gfx942": _Config(_Tiles(64, 32, 4, 2), _Tiles(64, 32, 4, 1), _Tiles(16, 64, 4, 1)),
    "interpreter": _Config(_Tiles(64, 32, 4, 1), _Tiles(64, 32, 4, 1), _Tiles(32, 64, 4, 1)),
}


# float32: by tf32; without tensor cores, where a product holds whole rows of its operands in registers, so that small
# tiles take many threads (heads wider than 64, and others); on the matrix cores of gfx942, which are exact.
_TF32 = _Config(_Tiles(32, 32, 4, 2), _Tiles(32, 32, 8, 2), _Tiles(32, 32, 4, 2))
_EXACT_WIDE = _Config(_Tiles(32, 32, 16, 1), _Tiles(16, 16, 8, 1), _Tiles(16, 32, 8, 1))
_EXACT_NARROW = _Config(_Tiles(32, 32, 8, 1), _Tiles(32, 32, 8, 1), _Tiles(32, 32, 8, 1))
_EXACT_GFX = _Config(_Tiles(32, 32, 4, 1), _Tiles(32, 32, 4, 1), _Tiles(32, 32, 4, 1))


def _config(architecture: str, dtype: torch.dtype, precision: str, block_d: int, tokens: int) -> _Config:
    """Tiles that leave nothing spilled on sm_90, by architecture, dtype, head width, and few or many tokens."""
    if architecture == "interpreter":
        return _HALF[architecture]
    if dtype == torch.float32:
        if architecture == "gfx942":
            return _EXACT_GFX
        return _TF32 if precision == "tf32" else _EXACT_WIDE if block_d > 64 else _EXACT_NARROW
    config = _HALF[architecture]
    if architecture == "sm_90" and block_d > 64:
        config = config._replace(keys=config.keys._replace(num_warps=8))
    if tokens > _FEW_TOKENS:
        rows, columns, warps, stages = config.forward
        config = config._replace(forward=_Tiles(2 * rows, columns, 2 * warps, stages))
    return config


def _shared(q: torch.Tensor, order: torch.Tensor) -> tuple[tuple[int, ...], dict, _Config]:
    """What the launches share: strides of the order, heads, tokens, width; compile-time constants; the tiles."""
    _, heads, tokens, width = q.shape
    block_d, precision = launch.power_of_2(width), launch.float32_precision(q.device)
    constants = {
        "BLOCK_D": block_d,
        "EVEN_D": block_d == width,
        "PRECISION": precision,
        "WIDEN": launch.widen(q.device),
    }
    config = _config(launch.architecture(q.device), q.dtype, precision, block_d, tokens)
    return (order.stride(0) if order.dim() == 2 else 0, order.stride(-1), heads, tokens, width), constants, config


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, N, d], order [N] or [B, N] → out [B, H, N, d], lse [B, H, 2, N] float32 for `backward`."""
    q, k, v = (launch.rows_last(tensor) for tensor in (q, k, v))
    batch, heads, tokens, width = q.shape
    out, lse = empty_results(q)
    shapes, constants, config = _shared(q, order)
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
        width**-0.5 * _LOG2_E,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [B, H, N, d] of out; q, k, v, order, out, lse as in `forward` → dq, dk, dv [B, H, N, d]."""
    grad, q, k, v, out = (launch.rows_last(tensor) for tensor in (grad, q, k, v, out))
    batch, heads, tokens, width = q.shape
    lse = launch.dense("lse", lse, torch.float32, (batch, heads, 2, tokens), q.device)
    grad_q, grad_k, grad_v = empty_gradients(q)
    delta = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    shapes, constants, config = _shared(q, order)
    strides = [stride for tensor in (grad, q, k, v) for stride in tensor.stride()[:3]]
    scales = width**-0.5, width**-0.5 * _LOG2_E
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
    return grad_q, grad_k, grad_v
