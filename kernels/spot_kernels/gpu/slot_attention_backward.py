"""Triton kernel of the slot-attention step, backward; slot_attention.py has the forward kernel and describes the tiles.

    da = (v · d updates − updates · d updates) / sums + d attn          over channels, for each token, head and slot
    d logits = a (da − Σ a da) + d logits                               the sum over heads × slots
    dq = Σ_n d logits k,  dk = Σ_k d logits q,  dv = Σ_k (a + eps) / sums d updates

a is computed again from q and k. The gradient of the mean needs Σ_n (a + eps) v · d updates / sums over all tokens,
which is updates · d updates: with the saved updates one pass over the tokens is enough, which reads k and v once and
writes dk and dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch, slot_attention_plan
from spot_kernels.gpu.slot_attention_passes import add_partials, joint_statistics, strides
from spot_kernels.gpu.slot_attention_tiles import (
    inner_products,
    load_tile,
    operand,
    rounded,
    row_products,
    softmax,
    tile_indices,
)


@triton.jit
def _backward_kernel(
    grad_updates,
    grad_attn,
    grad_logits,
    q,
    k,
    v,
    exact,
    sums,
    peak,
    mass,
    inner,
    dq,
    dk,
    dv,
    batch,
    heads,
    tokens,
    slots,
    width,
    span,
    eps,
    stride_ub,
    stride_uh,
    stride_uk,
    stride_ud,
    stride_ab,
    stride_an,
    stride_ak,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_lk,
    stride_qb,
    stride_qh,
    stride_qk,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    GRAD_UPDATES: tl.constexpr,
    GRAD_ATTN: tl.constexpr,
    GRAD_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid as in the forward kernel. ga, gl: gradients of a and of the logits."""
    ROWS: tl.constexpr = HEADS * SLOTS
    i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc = tile_indices(
        heads, slots, width, HEADS, SLOTS, COLUMNS, WHOLE
    )
    i_split, o_t = tl.program_id(1), tl.arange(0, TOKENS)
    p_q, o_q = q + i_b * stride_qb + i_h * stride_qh, r_head * stride_qh + r_slot * stride_qk
    # queries and gradients of updates, [ROWS, COLUMNS] each, kept for all tokens
    b_q = load_tile(p_q, o_q, c_in * stride_qd, m_rc, WIDEN)
    if GRAD_UPDATES:
        p_u, o_u = grad_updates + i_b * stride_ub + i_h * stride_uh, r_head * stride_uh + r_slot * stride_uk
        b_du = load_tile(p_u, o_u, c_in * stride_ud, m_rc, WIDEN)
        o_exact = ((i_b * slots + r_slot) * heads + i_h + r_head) * width
        if WHOLE:
            b_shared = tl.sum(b_du.to(tl.float32) * load_tile(exact, o_exact, c_in, m_rc, False), 1)
        else:
            b_shared = row_products(p_u, o_u, stride_ud, exact, o_exact, m_r, width, COLUMNS)
        # 1 / sums [ROWS], zero for padded rows
        b_rsum = 1.0 / tl.load(sums + (i_b * heads + i_h + r_head) * slots + r_slot, mask=m_r, other=float("inf"))
    # dq stays in registers; dk and dv of a token are complete within its block
    b_dq = tl.zeros([ROWS, COLUMNS], tl.float32)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    # within a block of dk and dv, 32 bits
    o_kv = o_t[:, None] * (heads * width) + o_c[None, :]
    end = tl.minimum(i_split * span + span, tokens)
    # one pass over the split's tokens, TOKENS at a time
    for start in range(i_split * span, end, TOKENS):
        # int64: the offset of a token passes 2^31 in large tensors
        first = tl.cast(start, tl.int64)
        m_t = start + o_t < end
        m_tc, m_rt = m_t[:, None] & m_c[None, :], m_r[:, None] & m_t[None, :]
        # keys [TOKENS, COLUMNS]; dk and dv are stored as [B, N, H, d]
        b_k = load_tile(p_k + first * stride_kn, o_t * stride_kn, o_c, m_tc, WIDEN)
        o_block = ((i_b * tokens + first) * heads + i_h) * width
        # gradients of the logits, [ROWS, TOKENS]
        b_gl = tl.zeros([ROWS, TOKENS], tl.float32)
        if GRAD_UPDATES or GRAD_ATTN:
            if WHOLE:
                b_l = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            else:
                b_l = inner_products(
                    p_q,
                    o_q,
                    stride_qd,
                    m_r,
                    p_k + first * stride_kn,
                    o_t * stride_kn,
                    m_t,
                    width,
                    COLUMNS,
                    PRECISION,
                    WIDEN,
                )
            o_n = i_b * tokens + start + o_t
            b_a = softmax(b_l, m_r, m_t, peak, mass, o_n, JOINT)
            # gradients of a, [ROWS, TOKENS]
            b_ga = tl.zeros([ROWS, TOKENS], tl.float32)
            if GRAD_UPDATES:
                if WHOLE:
                    # values [TOKENS, COLUMNS]
                    b_v = load_tile(p_v + first * stride_vn, o_t * stride_vn, o_c, m_tc, WIDEN)
                    b_ga = tl.dot(b_du, tl.trans(b_v), input_precision=PRECISION)
                else:
                    b_ga = inner_products(
                        p_u,
                        o_u,
                        stride_ud,
                        m_r,
                        p_v + first * stride_vn,
                        o_t * stride_vn,
                        m_t,
                        width,
                        COLUMNS,
                        PRECISION,
                        WIDEN,
                    )
                b_ga = (b_ga - b_shared[:, None]) * b_rsum[:, None]
                # dv [TOKENS, COLUMNS] from the weights of the mean
                b_w = rounded((b_a + eps) * b_rsum[:, None], ROUND)
                b_dv = tl.dot(tl.trans(b_w), operand(b_du, ROUND), input_precision=WEIGHTS)
                tl.store(dv + o_block + o_kv, b_dv.to(dv.dtype.element_ty), mask=m_tc)
            if GRAD_ATTN:
                p_a = grad_attn + i_b * stride_ab + first * stride_an
                b_ga += tl.load(p_a + r_slot[:, None] * stride_ak + o_t[None, :] * stride_an, mask=m_rt, other=0.0)
            if JOINT:
                b_inner = tl.load(inner + o_n, mask=m_t, other=0.0)
            else:
                b_inner = tl.sum(b_a * b_ga, 0)
            b_gl = b_a * (b_ga - b_inner[None, :])
        if GRAD_LOGITS:
            p_l = grad_logits + i_b * stride_lb + i_h * stride_lh + first * stride_ln
            o_l = r_head[:, None] * stride_lh + o_t[None, :] * stride_ln + r_slot[:, None] * stride_lk
            b_gl += tl.load(p_l + o_l, mask=m_rt, other=0.0)
        # zero for padded tokens, whose loaded zeros have logits and a softmax too
        b_gl = rounded(tl.where(m_t[None, :], b_gl, 0.0), ROUND)
        b_dk = tl.dot(tl.trans(b_gl), operand(b_q, ROUND), input_precision=WEIGHTS)
        tl.store(dk + o_block + o_kv, b_dk.to(dk.dtype.element_ty), mask=m_tc)
        b_dq = tl.dot(b_gl, operand(b_k, ROUND), b_dq, input_precision=WEIGHTS)

    # dq [splits, B, K, H, d]
    o_b = i_split * batch + i_b
    o_dq = ((o_b * slots + r_slot[:, None]) * heads + i_h + r_head[:, None]) * width + c_in[None, :]
    tl.store(dq + o_dq, b_dq.to(dq.dtype.element_ty), mask=m_rc)


def backward(
    grad_updates: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fills dq [B, H, K, d], dk and dv [B, H, N, d], laid out as [B, K, H, d] and [B, N, H, d]."""
    q, k, v = launch.near(q, 3), launch.rows_last(k), launch.rows_last(v)
    batch, heads, slots, width = q.shape
    tokens, device = k.shape[2], q.device
    of_slots, of_tokens = (batch, slots, heads, width), (batch, tokens, heads, width)
    exact = launch.dense("exact", exact.transpose(1, 2), torch.float32, of_slots, device).transpose(1, 2)
    sums = launch.dense("sums", sums, torch.float32, (batch, heads, slots), device)
    launch.written("dq", dq.transpose(1, 2), q.dtype, of_slots, device)
    launch.written("dk", dk.transpose(1, 2), q.dtype, of_tokens, device)
    launch.written("dv", dv.transpose(1, 2), q.dtype, of_tokens, device)
    if grad_updates is None:
        dv.zero_()
    else:
        grad_updates = launch.near(grad_updates, 3)
    products = slot_attention_plan.precisions(device, k.dtype)
    maps = grad_attn is not None or grad_logits is not None
    shape = slot_attention_plan.plan(q, k, v, products, backward=True, maps=maps)
    programs = batch * (heads if shape.heads == 1 else 1)
    parts = 1 if shape.whole else triton.cdiv(width, shape.columns)
    number, span = slot_attention_plan.splits(programs * parts, tokens, device, backward=True)
    peak = mass = inner = None
    if shape.joint and not (grad_updates is None and grad_attn is None):
        peak, mass, inner = joint_statistics(q, k, v, grad_updates, grad_attn, exact, sums, None, shape, products)
    part = dq
    if number > 1:
        part = exact.new_empty((number, batch, slots, heads, width), dtype=torch.float32)
    launch.launch(
        _backward_kernel,
        (programs, number, parts),
        grad_updates,
        grad_attn,
        grad_logits,
        q,
        k,
        v,
        exact,
        sums,
        peak,
        mass,
        inner,
        part,
        dk,
        dv,
        batch,
        heads,
        tokens,
        slots,
        width,
        span,
        eps,
        *strides(grad_updates, 4),
        *strides(grad_attn, 3),
        *strides(grad_logits, 4),
        *q.stride(),
        *k.stride()[:3],
        *v.stride()[:3],
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        HEADS=shape.heads,
        SLOTS=shape.slots,
        COLUMNS=shape.columns,
        WHOLE=shape.whole,
        TOKENS=shape.tokens,
        JOINT=shape.joint,
        GRAD_UPDATES=grad_updates is not None,
        GRAD_ATTN=grad_attn is not None,
        GRAD_LOGITS=grad_logits is not None,
        **products,
    )
    if number > 1:
        add_partials(part, None, dq, None, None)
