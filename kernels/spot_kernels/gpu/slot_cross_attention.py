"""Triton kernels of slot_cross_attention and slot_cross_map.

    s = q kᵀ / √d;  p = softmax over slots of s;  out = p v;  map = mean of p over heads
    dp = do vᵀ + dmap / H;  ds = p (dp − Σ_slots p dp);  dq = ds k / √d;  dk = dsᵀ q / √d;  dv = pᵀ do

q and out [B, H, N, d], k and v [B, H, K, d], map [B, N, K] float32; float32, bfloat16 or float16. Saved for backward:
q, k and v.

All slots (at most 64) fit one tile, so the softmax of a row is complete in one step and nothing is rescaled. Backward
computes p again from q and k, which it needs anyway, instead of reading a saved log-sum-exp. If a head is wider than a
tile, its logits are summed over tiles of channels; in the backward pass each tile is then a program of its own.

Forward: a program takes a block of tokens. With the map it walks over the heads, so that their mean stays in registers
and is written once; without it every head has its own program. Without the output (the map alone) it reads no v and
writes nothing of size N × d. Backward: a program takes one head of one sample and walks over the tokens, so q and do
are read once and dk and dv stay in registers. If there are fewer heads than multiprocessors, the tokens are split over
programs, and a second kernel adds their float32 parts in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

_LOG2_E = 1.4426950408889634
_SUM_BLOCK = 512


@triton.jit
def _softmax(b_s, m_slot, scale_log2):
    """Softmax of the scaled logits over the slots, [tokens, slots] float32; exactly 0 in padded slots."""
    b_s = tl.where(m_slot[None, :], b_s, float("-inf"))
    # subtract the maximum before scaling: differences of large logits are exact, their scaled values are not. exp2 is
    # one instruction, and log2 e is in the scale
    b_e = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * scale_log2)
    return b_e / tl.sum(b_e, 1)[:, None]


@triton.jit
def _products(
    p_a,
    p_b,
    m_a,
    m_b,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a bᵀ [BLOCK_N, BLOCK_K] over the whole width; p_a and p_b point at the rows."""
    b_s = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    # BLOCK_C channels of both at a time
    for c in range(0, width, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        # [BLOCK_N, BLOCK_C], [BLOCK_K, BLOCK_C]
        b_a = tl.load(p_a[:, None] + o_c[None, :], mask=m_a[:, None] & m_c[None, :], other=0.0)
        b_b = tl.load(p_b[:, None] + o_c[None, :], mask=m_b[:, None] & m_c[None, :], other=0.0)
        if WIDEN:
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        b_s += tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    return b_s


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    mean_map,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kk,
    stride_vb,
    stride_vh,
    stride_vk,
    stride_ob,
    stride_oh,
    stride_on,
    tokens,
    slots,
    width,
    heads_each,
    blocks,
    scale_log2,
    map_scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_MAP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: batch × blocks of BLOCK_N tokens, groups of `heads_each` heads: all heads with the map, one without."""
    pid, group = tl.program_id(0), tl.program_id(1)
    batch = (pid // blocks).to(tl.int64)
    o_n, o_k, o_d = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_n, m_k = o_n < tokens, o_k < slots
    o_n, o_k = o_n.to(tl.int64), o_k.to(tl.int64)
    # sum of p over the heads, [BLOCK_N, BLOCK_K]
    b_map = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for i in range(heads_each):
        head = (group * heads_each + i).to(tl.int64)
        p_q = q + batch * stride_qb + head * stride_qh + o_n * stride_qn
        p_k = k + batch * stride_kb + head * stride_kh + o_k * stride_kk
        if WITH_OUT:
            p_v = v + batch * stride_vb + head * stride_vh + o_k * stride_vk
            p_out = out + batch * stride_ob + head * stride_oh + o_n * stride_on
        if WHOLE:
            m_d = o_d < width
            # q [BLOCK_N, BLOCK_D] and k [BLOCK_K, BLOCK_D] of the head
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            if WIDEN:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            if WITH_OUT:
                # v [BLOCK_K, BLOCK_D], requested before the softmax to hide its latency
                b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
                if WIDEN:
                    b_v = b_v.to(tl.float32)
            b_p = _softmax(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), m_k, scale_log2)
            if WITH_OUT:
                b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
                tl.store(p_out[:, None] + o_d[None, :], b_out.to(out.dtype.element_ty), m_n[:, None] & m_d[None, :])
        else:
            b_s = _products(p_q, p_k, m_n, m_k, width, BLOCK_N, BLOCK_K, BLOCK_C, WIDEN, PRECISION)
            b_p = _softmax(b_s, m_k, scale_log2)
            if WITH_OUT:
                # p is complete: out [BLOCK_N, BLOCK_D] needs v of its own channels only
                for c in range(0, width, BLOCK_D):
                    m_d = c + o_d < width
                    # v [BLOCK_K, BLOCK_D]
                    b_v = tl.load(p_v[:, None] + (c + o_d)[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
                    if WIDEN:
                        b_v = b_v.to(tl.float32)
                    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION).to(out.dtype.element_ty)
                    tl.store(p_out[:, None] + (c + o_d)[None, :], b_out, mask=m_n[:, None] & m_d[None, :])
        if WITH_MAP:
            b_map += b_p
    if WITH_MAP:
        # [BLOCK_N, BLOCK_K]
        p_map = mean_map + batch * tokens * slots + o_n[:, None] * slots + o_k[None, :]
        tl.store(p_map, b_map * map_scale, mask=m_n[:, None] & m_k[None, :])


@triton.jit
def _backward(
    grad_out,
    grad_map,
    q,
    k,
    v,
    grad_q,
    grad_k,
    grad_v,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mn,
    stride_mk,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kk,
    stride_vb,
    stride_vh,
    stride_vk,
    heads,
    tokens,
    slots,
    width,
    blocks_each,
    part_size,
    scale,
    scale_log2,
    map_scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_MAP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: batch × heads, parts of `blocks_each` blocks of tokens, tiles of BLOCK_D channels.

    The gradients of q, k and v are laid out as [B, N or K, H, d]; grad_k and grad_v have one such copy for each part.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    batch, head = (pid // heads).to(tl.int64), (pid % heads).to(tl.int64)
    o_k, o_d = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_k, m_d = o_k < slots, o_d < width
    m_row = m_k[:, None] & m_d[None, :]
    o_k = o_k.to(tl.int64)
    p_k = k + batch * stride_kb + head * stride_kh + o_k * stride_kk
    # k and v [BLOCK_K, BLOCK_D], kept for all tokens like dk and dv
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_row, other=0.0)
    if WIDEN:
        b_k = b_k.to(tl.float32)
    b_grad_k = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    if WITH_OUT:
        p_v = v + batch * stride_vb + head * stride_vh + o_k * stride_vk
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_row, other=0.0)
        if WIDEN:
            b_v = b_v.to(tl.float32)
        b_grad_v = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    first = part * blocks_each * BLOCK_N
    # the part's tokens, BLOCK_N at a time, each read once
    for start in range(first, tl.minimum(tokens, first + blocks_each * BLOCK_N), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        m_token = m_n[:, None] & m_d[None, :]
        o_n = o_n.to(tl.int64)
        p_q = q + batch * stride_qb + head * stride_qh + o_n * stride_qn
        # q [BLOCK_N, BLOCK_D]
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_token, other=0.0)
        if WIDEN:
            b_q = b_q.to(tl.float32)
        if WHOLE:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        else:
            b_s = _products(p_q, p_k, m_n, m_k, width, BLOCK_N, BLOCK_K, BLOCK_C, WIDEN, PRECISION)
        b_p = _softmax(b_s, m_k, scale_log2)
        # dp [BLOCK_N, BLOCK_K] from the output and from the map
        b_grad_p = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        if WITH_OUT:
            p_g = grad_out + batch * stride_gb + head * stride_gh + o_n * stride_gn
            # do [BLOCK_N, BLOCK_D]
            b_g = tl.load(p_g[:, None] + o_d[None, :], mask=m_token, other=0.0)
            if WIDEN:
                b_g = b_g.to(tl.float32)
            if WHOLE:
                b_grad_p += tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
            else:
                b_grad_p += _products(p_g, p_v, m_n, m_k, width, BLOCK_N, BLOCK_K, BLOCK_C, WIDEN, PRECISION)
            # rows past the last token have p ≠ 0 but do = 0, so they add nothing
            b_grad_v += tl.dot(tl.trans(b_p.to(b_g.dtype)), b_g, input_precision=PRECISION)
        if WITH_MAP:
            # dmap [BLOCK_N, BLOCK_K], the same for all heads
            p_map = grad_map + batch * stride_mb + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk
            b_map = tl.load(p_map, mask=m_n[:, None] & m_k[None, :], other=0.0)
            b_grad_p += b_map.to(tl.float32) * map_scale
        b_grad_s = (b_p * (b_grad_p - tl.sum(b_p * b_grad_p, 1)[:, None])).to(b_q.dtype)
        b_grad_q = tl.dot(b_grad_s, b_k, input_precision=PRECISION) * scale
        # dq [BLOCK_N, BLOCK_D]: complete, since it sums over slots alone
        p_grad_q = grad_q + ((batch * tokens + o_n[:, None]) * heads + head) * width + o_d[None, :]
        tl.store(p_grad_q, b_grad_q.to(grad_q.dtype.element_ty), mask=m_token)
        b_grad_k += tl.dot(tl.trans(b_grad_s), b_q, input_precision=PRECISION)
    # dk and dv [BLOCK_K, BLOCK_D] of the part
    o_row = part.to(tl.int64) * part_size + ((batch * slots + o_k[:, None]) * heads + head) * width + o_d[None, :]
    tl.store(grad_k + o_row, (b_grad_k * scale).to(grad_k.dtype.element_ty), mask=m_row)
    if WITH_OUT:
        tl.store(grad_v + o_row, b_grad_v.to(grad_v.dtype.element_ty), mask=m_row)


@triton.jit
def _sum_parts(partial, out, size, parts, BLOCK: tl.constexpr):
    """out [size] = the sum of partial [parts, size]. Grid: blocks of BLOCK elements."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    p_partial = partial + o
    # part by part, always in the same order
    for _ in range(parts):
        b_sum += tl.load(p_partial, mask=m, other=0.0)
        p_partial += size
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=m)


class _Config(NamedTuple):
    """Tokens of a block, channels of a tile, channels of a step of a product over heads wider than a tile."""

    block_n: int
    block_d: int
    block_c: int
    num_warps: int
    num_stages: int


def _forward_config(architecture: str, dtype: torch.dtype, block_k: int, width: int, with_out: bool) -> _Config:
    block_d = launch.power_of_2(width)
    if dtype == torch.float32:
        # without tensor cores a product keeps rows of its operands in registers, so they have to be short
        return _Config(32, min(block_d, 32), 32, 4, 1)
    block_d = min(block_d, 128)
    # the map alone has few loads, and spills with stages
    stages = 1 if architecture == "gfx942" or not with_out else 3 if block_k <= 32 else 2
    return _Config(32, block_d, 64, 8 if block_k * block_d > 32 * 128 else 4, stages)


def _backward_config(architecture: str, dtype: torch.dtype, block_k: int, width: int) -> _Config:
    block_d = launch.power_of_2(width)
    if dtype == torch.float32:
        return _Config(16, min(block_d, 64), 64, 4, 1) if block_k == 16 else _Config(16, min(block_d, 64), 32, 8, 1)
    block_d = min(block_d, 128)
    # dk and dv fill 2 × block_k × block_d float32 registers of a program
    size = block_k * block_d
    if architecture == "gfx942" and size > 32 * 128:
        return _Config(16, block_d, 64, 4, 1)
    stages = 1 if architecture == "gfx942" or size > 64 * 64 else 2 if size >= 16 * 128 else 3
    return _Config(32, block_d, 64, 8 if size > 16 * 128 else 4, stages)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, out: torch.Tensor | None, mean_map: torch.Tensor | None
) -> None:
    """Fills out [B, H, N, d] and mean_map [B, N, K] float32 (contiguous) of q [B, H, N, d], k and v [B, H, K, d].

    Either result may be None; v is None without `out`.
    """
    q, k, v = launch.rows_last(q), launch.rows_last(k), None if v is None else launch.rows_last(v)
    batch, heads, tokens, width = q.shape
    slots = k.shape[2]
    if mean_map is not None:
        launch.written("map", mean_map, torch.float32, (batch, tokens, slots), q.device)
    groups = heads if mean_map is None else 1
    block_k = launch.power_of_2(slots)
    config = _forward_config(launch.architecture(q.device), q.dtype, block_k, width, out is not None)
    blocks = triton.cdiv(tokens, config.block_n)
    launch.launch(
        _forward,
        (batch * blocks, groups),
        q,
        k,
        v,
        out,
        mean_map,
        *q.stride()[:3],
        *k.stride()[:3],
        *_strides(v),
        *_strides(out),
        tokens,
        slots,
        width,
        heads // groups,
        blocks,
        width**-0.5 * _LOG2_E,
        1 / heads,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        BLOCK_D=config.block_d,
        BLOCK_C=config.block_c,
        WHOLE=width <= config.block_d,
        WITH_OUT=out is not None,
        WITH_MAP=mean_map is not None,
        WIDEN=launch.widen(q.device),
        PRECISION=launch.float32_precision(q.device),
    )


def backward(
    grad_out: torch.Tensor | None,
    grad_map: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor | None,
) -> None:
    """Fills the gradients of q, k and v, laid out as [B, N or K, H, d], from those of out and map (None: zero).

    For the map alone v, grad_out and grad_v are None.
    """
    if grad_out is None and grad_v is not None:
        grad_v.zero_()
    q, k, v = launch.rows_last(q), launch.rows_last(k), None if grad_out is None else launch.rows_last(v)
    batch, heads, tokens, width = q.shape
    slots = k.shape[2]
    launch.written("grad_q", grad_q.transpose(1, 2), q.dtype, (batch, tokens, heads, width), q.device)
    for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
        if grad is not None:
            launch.written(name, grad.transpose(1, 2), q.dtype, (batch, slots, heads, width), q.device)
    block_k = launch.power_of_2(slots)
    config = _backward_config(launch.architecture(q.device), q.dtype, block_k, width)
    blocks = max(1, triton.cdiv(tokens, config.block_n))
    wanted = launch.multiprocessors(q.device)
    # two programs a multiprocessor if tokens are split at all
    parts = 1 if batch * heads >= wanted else min(blocks, triton.cdiv(2 * wanted, max(1, batch * heads)))
    blocks_each = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, blocks_each)
    results = [grad_k] if grad_out is None else [grad_k, grad_v]
    size = grad_k.numel()
    partial = results
    if parts > 1:
        partial = list(torch.empty((len(results), parts, size), device=q.device, dtype=torch.float32))
    grad_out = None if grad_out is None else launch.rows_last(grad_out)
    launch.launch(
        _backward,
        (batch * heads, parts, triton.cdiv(width, config.block_d)),
        grad_out,
        grad_map,
        q,
        k,
        v,
        grad_q,
        partial[0],
        partial[1] if len(partial) > 1 else None,
        *_strides(grad_out),
        *_strides(grad_map),
        *q.stride()[:3],
        *k.stride()[:3],
        *_strides(v),
        heads,
        tokens,
        slots,
        width,
        blocks_each,
        size,
        width**-0.5,
        width**-0.5 * _LOG2_E,
        1 / heads,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        BLOCK_D=config.block_d,
        BLOCK_C=config.block_c,
        WHOLE=width <= config.block_d,
        WITH_OUT=grad_out is not None,
        WITH_MAP=grad_map is not None,
        WIDEN=launch.widen(q.device),
        PRECISION=launch.float32_precision(q.device),
    )
    if parts > 1:
        for part, result in zip(partial, results, strict=True):
            launch.launch(
                _sum_parts,
                (triton.cdiv(size, _SUM_BLOCK),),
                part,
                result,
                size,
                parts,
                num_warps=4,
                num_stages=1,
                BLOCK=_SUM_BLOCK,
            )


def _strides(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """The first three strides (the fourth, if any, is 1); zeros for an argument that is None."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]
