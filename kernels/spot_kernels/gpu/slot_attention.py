"""Triton kernels of the slot-attention step (see `spot_kernels.slot_attention` for the formula and the shapes).

A program takes one sample and one head, or all heads at once, and walks over its tokens: k and v are read once, and
nothing of size N × K is written unless it is asked for. Queries, updates and their gradients are tiles of `ROWS` rows
(head, slot) and `COLUMNS` columns (head, channel), padded to powers of two. Padded rows have logits of minus infinity
and padded tokens a weight of zero, so that neither counts.

Several heads share one softmax. Where the heads of a token lie side by side in memory (as a projection leaves them) and
heads × slots by heads × d fit a tile, all heads are one block-diagonal tile and everything is as for a single head: the
products cost more arithmetic, which a kernel that waits for memory has to spare. Otherwise each head has its own
programs, and `_joint_kernel` has gone over the tokens before to find each one's largest logit, the mass of its softmax
and, for the backward pass, its inner product Σ a · da.

Where rows of d channels do not fit, a program computes one part of the columns of its results. It needs the logits all
the same, and sums them up part by part.

With few samples and many tokens the tokens are split over programs. Each writes a partial sum in float32 and
`_reduce_kernel` adds them in order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.slot_attention_plan import Plan, plan, precisions, splits


@triton.jit
def _rounded(weights, ROUND: tl.constexpr):
    """Weights in the precision of the product they enter, so that the sum of what was multiplied can be taken."""
    if ROUND == "bf16":
        weights = weights.to(tl.bfloat16)
    elif ROUND == "tf32":
        # The tensor core would drop these 13 bits, which shortens every weight: round to nearest instead.
        bits = weights.to(tl.int32, bitcast=True) + 0x1000
        weights = (bits & -0x2000).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def _operand(tile, ROUND: tl.constexpr):
    """A tile of the inputs as the other side of a product with weights."""
    if ROUND != "bf16":
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_rows(x, rows, columns, mask, WIDEN: tl.constexpr):
    tile = tl.load(x + rows[:, None] + columns[None, :], mask=mask, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _inner_products(
    x,
    x_rows,
    m_x,
    y,
    y_rows,
    stride_y,
    m_y,
    width,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """x yᵀ for rows that are wider than a tile."""
    product = tl.zeros([x_rows.shape[0], y_rows.shape[0]], tl.float32)
    for first in range(0, width, COLUMNS):
        o_c = first + tl.arange(0, COLUMNS)
        m_c = o_c < width
        b_x = _load_rows(x, x_rows, o_c, m_x[:, None] & m_c[None, :], WIDEN)
        b_y = _load_rows(y, y_rows, o_c * stride_y, m_y[:, None] & m_c[None, :], WIDEN)
        product = tl.dot(b_x, tl.trans(b_y), product, input_precision=PRECISION)
    return product


@triton.jit
def _row_products(x, x_rows, stride_x, y, y_rows, mask, width, COLUMNS: tl.constexpr):
    """Σ x y over the channels of each row, in float32."""
    product = tl.zeros([x_rows.shape[0]], tl.float32)
    for first in range(0, width, COLUMNS):
        o_c = first + tl.arange(0, COLUMNS)
        m_rc = mask[:, None] & (o_c < width)[None, :]
        b_x = _load_rows(x, x_rows, o_c * stride_x, m_rc, True)
        product += tl.sum(b_x * _load_rows(y, y_rows, o_c, m_rc, True), 1)
    return product


@triton.jit
def _tile(heads, slots, width, HEADS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Which sample, heads, slots and channels the rows and columns of this program's tiles stand for."""
    i_program = tl.program_id(0)
    if HEADS == 1:
        i_b, i_h, group = (i_program // heads).to(tl.int64), (i_program % heads).to(tl.int64), 1
    else:
        i_b, i_h, group = i_program.to(tl.int64), tl.cast(0, tl.int64), heads
    o_r, o_c = tl.arange(0, HEADS * SLOTS), tl.arange(0, COLUMNS)
    if not WHOLE:
        o_c += tl.program_id(2) * COLUMNS
    r_head, r_slot = o_r // SLOTS, o_r % SLOTS
    m_r, m_c = (r_head < group) & (r_slot < slots), o_c < group * width
    m_rc, c_in = m_r[:, None] & m_c[None, :], o_c
    if HEADS > 1:
        c_head = o_c // width
        m_rc, c_in = m_rc & (r_head[:, None] == c_head[None, :]), o_c - c_head * width
    return i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc


@triton.jit
def _softmax(b_l, m_r, m_t, peak, mass, o_n, JOINT: tl.constexpr):
    """a from logits [TOKENS, ROWS]: over the rows, or by what `_joint_kernel` found over all heads. Zero in padding."""
    b_l = tl.where(m_r[None, :], b_l, float("-inf"))
    if JOINT:
        b_peak = tl.load(peak + o_n, mask=m_t, other=0.0)
        b_mass = tl.load(mass + o_n, mask=m_t, other=1.0)
        b_a = tl.exp(b_l - b_peak[:, None]) / b_mass[:, None]
    else:
        b_a = tl.exp(b_l - tl.max(b_l, 1)[:, None])
        b_a = b_a / tl.sum(b_a, 1)[:, None]
    return b_a


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    peak,
    mass,
    updates,
    exact,
    sums,
    attn,
    logits,
    batch,
    heads,
    tokens,
    slots,
    width,
    span,
    eps,
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
    SPLIT: tl.constexpr,
    ATTN: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    ROWS: tl.constexpr = HEADS * SLOTS
    i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc = _tile(heads, slots, width, HEADS, SLOTS, COLUMNS, WHOLE)
    i_split, o_t = tl.program_id(1), tl.arange(0, TOKENS)
    # what all parts of the columns agree on is written by the first
    m_once = m_r & (r_slot < tl.where(tl.program_id(2) == 0, slots, 0))
    p_q, o_q = q + i_b * stride_qb + i_h * stride_qh, r_head * stride_qh + r_slot * stride_qk
    if WHOLE:
        # [ROWS, COLUMNS]
        b_q = _load_rows(p_q, o_q, c_in * stride_qd, m_rc, WIDEN)
    # of each place in a block: adding up over a block is left for the end
    b_sums = tl.zeros([TOKENS, ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    for start in range(i_split * span, tl.minimum(i_split * span + span, tokens), TOKENS):
        first = tl.cast(start, tl.int64)
        m_t = start + o_t < tokens
        m_tc = m_t[:, None] & m_c[None, :]
        # [TOKENS, ROWS]
        if WHOLE:
            b_k = _load_rows(p_k + first * stride_kn, o_t * stride_kn, o_c, m_tc, WIDEN)
            b_l = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        else:
            b_l = _inner_products(
                p_k + first * stride_kn,
                o_t * stride_kn,
                m_t,
                p_q,
                o_q,
                stride_qd,
                m_r,
                width,
                COLUMNS,
                PRECISION,
                WIDEN,
            )
        if LOGITS:
            o_l = ((i_b * heads + i_h + r_head[None, :]) * tokens + start + o_t[:, None]) * slots + r_slot[None, :]
            tl.store(logits + o_l, b_l, mask=m_t[:, None] & m_once[None, :])
        b_a = _softmax(b_l, m_r, m_t, peak, mass, i_b * tokens + start + o_t, JOINT)
        if ATTN:
            b_attn = tl.sum(tl.reshape(b_a, [TOKENS, HEADS, SLOTS]), 1)
            o_s = tl.arange(0, SLOTS)
            o_attn = (i_b * tokens + start + o_t[:, None]) * slots + o_s[None, :]
            m_s = o_s < tl.where(tl.program_id(2) == 0, slots, 0)
            tl.store(attn + o_attn, b_attn, mask=m_t[:, None] & m_s[None, :])
        b_w = _rounded(tl.where(m_t[:, None], b_a + eps, 0.0), ROUND)
        # [TOKENS, COLUMNS]
        b_v = _load_rows(p_v + first * stride_vn, o_t * stride_vn, o_c, m_tc, WIDEN)
        b_sums += b_w.to(tl.float32)
        b_acc = tl.dot(tl.trans(b_w), _operand(b_v, ROUND), b_acc, input_precision=WEIGHTS)

    b_sum = tl.sum(b_sums, 0)
    # sums [splits, B, H, K]; exact [splits, B, K, H, d]; updates [B, K, H, d]
    o_b = i_split * batch + i_b
    tl.store(sums + (o_b * heads + i_h + r_head) * slots + r_slot, b_sum, mask=m_once)
    o_u = ((o_b * slots + r_slot[:, None]) * heads + i_h + r_head[:, None]) * width + c_in[None, :]
    if not SPLIT:
        b_acc = b_acc / b_sum[:, None]
        tl.store(updates + o_u, b_acc.to(updates.dtype.element_ty), mask=m_rc)
    tl.store(exact + o_u, b_acc, mask=m_rc)


@triton.jit
def _joint_kernel(
    q,
    k,
    v,
    grad_updates,
    grad_attn,
    exact,
    sums,
    peak,
    mass,
    inner,
    attn,
    heads,
    tokens,
    slots,
    width,
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
    stride_ub,
    stride_uh,
    stride_uk,
    stride_ud,
    stride_ab,
    stride_an,
    stride_ak,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    GRAD_UPDATES: tl.constexpr,
    GRAD_ATTN: tl.constexpr,
    ATTN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """What the heads of a token share, [B, N] each: the largest logit, Σ exp(logit - largest) and Σ a · da."""
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    first = tl.cast(start, tl.int64)
    o_r, o_t = tl.arange(0, SLOTS), tl.arange(0, TOKENS)
    m_r, m_t = o_r < slots, start + o_t < tokens
    m_tr = m_t[:, None] & m_r[None, :]
    o_n = i_b * tokens + start + o_t
    o_k, o_v, o_q, o_u = o_t * stride_kn, o_t * stride_vn, o_r * stride_qk, o_r * stride_uk
    b_peak = tl.full([TOKENS], float("-inf"), tl.float32)
    b_mass = tl.zeros([TOKENS], tl.float32)
    b_inner = tl.zeros([TOKENS], tl.float32)
    for head in range(0, heads):
        i_h = tl.cast(head, tl.int64)
        p_q, p_k = q + i_b * stride_qb + i_h * stride_qh, k + i_b * stride_kb + i_h * stride_kh + first * stride_kn
        b_l = _inner_products(p_k, o_k, m_t, p_q, o_q, stride_qd, m_r, width, COLUMNS, PRECISION, WIDEN)
        b_l = tl.where(m_r[None, :], b_l, float("-inf"))
        b_higher = tl.maximum(b_peak, tl.max(b_l, 1))
        b_p = tl.exp(b_l - b_higher[:, None])
        b_scale = tl.exp(b_peak - b_higher)
        b_mass = b_mass * b_scale + tl.sum(b_p, 1)
        b_peak = b_higher
        if INNER:
            b_ga = tl.zeros([TOKENS, SLOTS], tl.float32)
            if GRAD_UPDATES:
                p_u = grad_updates + i_b * stride_ub + i_h * stride_uh
                p_v = v + i_b * stride_vb + i_h * stride_vh + first * stride_vn
                o_exact = ((i_b * slots + o_r) * heads + i_h) * width
                b_shared = _row_products(p_u, o_u, stride_ud, exact, o_exact, m_r, width, COLUMNS)
                b_rsum = 1.0 / tl.load(sums + (i_b * heads + i_h) * slots + o_r, mask=m_r, other=float("inf"))
                b_ga = _inner_products(p_v, o_v, m_t, p_u, o_u, stride_ud, m_r, width, COLUMNS, PRECISION, WIDEN)
                b_ga = (b_ga - b_shared[None, :]) * b_rsum[None, :]
            if GRAD_ATTN:
                p_a = grad_attn + i_b * stride_ab + first * stride_an
                b_ga += tl.load(p_a + o_t[:, None] * stride_an + o_r[None, :] * stride_ak, mask=m_tr, other=0.0)
            b_inner = b_inner * b_scale + tl.sum(b_p * b_ga, 1)
    tl.store(peak + o_n, b_peak, mask=m_t)
    tl.store(mass + o_n, b_mass, mask=m_t)
    if INNER:
        tl.store(inner + o_n, b_inner / b_mass, mask=m_t)
    if ATTN:
        b_attn = tl.zeros([TOKENS, SLOTS], tl.float32)
        for head in range(0, heads):
            i_h = tl.cast(head, tl.int64)
            p_q, p_k = q + i_b * stride_qb + i_h * stride_qh, k + i_b * stride_kb + i_h * stride_kh + first * stride_kn
            b_l = _inner_products(p_k, o_k, m_t, p_q, o_q, stride_qd, m_r, width, COLUMNS, PRECISION, WIDEN)
            b_attn += tl.exp(b_l - b_peak[:, None]) / b_mass[:, None]
        tl.store(attn + o_n[:, None] * slots + o_r[None, :], b_attn, mask=m_tr)


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
    """The formulas of `spot_kernels.slot_attention`; ga, gl: gradients of a and of the logits."""
    ROWS: tl.constexpr = HEADS * SLOTS
    i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc = _tile(heads, slots, width, HEADS, SLOTS, COLUMNS, WHOLE)
    i_split, o_t = tl.program_id(1), tl.arange(0, TOKENS)
    p_q, o_q = q + i_b * stride_qb + i_h * stride_qh, r_head * stride_qh + r_slot * stride_qk
    # [ROWS, COLUMNS]
    b_q = _load_rows(p_q, o_q, c_in * stride_qd, m_rc, WIDEN)
    if GRAD_UPDATES:
        p_u, o_u = grad_updates + i_b * stride_ub + i_h * stride_uh, r_head * stride_uh + r_slot * stride_uk
        b_du = _load_rows(p_u, o_u, c_in * stride_ud, m_rc, WIDEN)
        o_exact = ((i_b * slots + r_slot) * heads + i_h + r_head) * width
        if WHOLE:
            b_shared = tl.sum(b_du.to(tl.float32) * _load_rows(exact, o_exact, c_in, m_rc, False), 1)
        else:
            b_shared = _row_products(p_u, o_u, stride_ud, exact, o_exact, m_r, width, COLUMNS)
        # zero for padded rows
        b_rsum = 1.0 / tl.load(sums + (i_b * heads + i_h + r_head) * slots + r_slot, mask=m_r, other=float("inf"))
    b_dq = tl.zeros([ROWS, COLUMNS], tl.float32)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    for start in range(i_split * span, tl.minimum(i_split * span + span, tokens), TOKENS):
        first = tl.cast(start, tl.int64)
        m_t = start + o_t < tokens
        m_tc, m_tr = m_t[:, None] & m_c[None, :], m_t[:, None] & m_r[None, :]
        # [TOKENS, COLUMNS]; dk and dv are [B, N, H, d]
        b_k = _load_rows(p_k + first * stride_kn, o_t * stride_kn, o_c, m_tc, WIDEN)
        o_kv = ((i_b * tokens + start + o_t[:, None]) * heads + i_h) * width + o_c[None, :]
        # [TOKENS, ROWS]
        b_gl = tl.zeros([TOKENS, ROWS], tl.float32)
        if GRAD_UPDATES or GRAD_ATTN:
            if WHOLE:
                b_l = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            else:
                b_l = _inner_products(
                    p_k + first * stride_kn,
                    o_t * stride_kn,
                    m_t,
                    p_q,
                    o_q,
                    stride_qd,
                    m_r,
                    width,
                    COLUMNS,
                    PRECISION,
                    WIDEN,
                )
            o_n = i_b * tokens + start + o_t
            b_a = _softmax(b_l, m_r, m_t, peak, mass, o_n, JOINT)
            b_ga = tl.zeros([TOKENS, ROWS], tl.float32)
            if GRAD_UPDATES:
                if WHOLE:
                    b_v = _load_rows(p_v + first * stride_vn, o_t * stride_vn, o_c, m_tc, WIDEN)
                    b_ga = tl.dot(b_v, tl.trans(b_du), input_precision=PRECISION)
                else:
                    b_ga = _inner_products(
                        p_v + first * stride_vn,
                        o_t * stride_vn,
                        m_t,
                        p_u,
                        o_u,
                        stride_ud,
                        m_r,
                        width,
                        COLUMNS,
                        PRECISION,
                        WIDEN,
                    )
                b_ga = (b_ga - b_shared[None, :]) * b_rsum[None, :]
                b_w = _rounded((b_a + eps) * b_rsum[None, :], ROUND)
                b_dv = tl.dot(b_w, _operand(b_du, ROUND), input_precision=WEIGHTS)
                tl.store(dv + o_kv, b_dv.to(dv.dtype.element_ty), mask=m_tc)
            if GRAD_ATTN:
                p_a = grad_attn + i_b * stride_ab + first * stride_an
                b_ga += tl.load(p_a + o_t[:, None] * stride_an + r_slot[None, :] * stride_ak, mask=m_tr, other=0.0)
            if JOINT:
                b_inner = tl.load(inner + o_n, mask=m_t, other=0.0)
            else:
                b_inner = tl.sum(b_a * b_ga, 1)
            b_gl = b_a * (b_ga - b_inner[:, None])
        if GRAD_LOGITS:
            p_l = grad_logits + i_b * stride_lb + i_h * stride_lh + first * stride_ln
            o_l = r_head[None, :] * stride_lh + o_t[:, None] * stride_ln + r_slot[None, :] * stride_lk
            b_gl += tl.load(p_l + o_l, mask=m_tr, other=0.0)
        b_gl = _rounded(tl.where(m_t[:, None], b_gl, 0.0), ROUND)
        b_dk = tl.dot(b_gl, _operand(b_q, ROUND), input_precision=WEIGHTS)
        tl.store(dk + o_kv, b_dk.to(dk.dtype.element_ty), mask=m_tc)
        b_dq = tl.dot(tl.trans(b_gl), _operand(b_k, ROUND), b_dq, input_precision=WEIGHTS)

    # [splits, B, K, H, d]
    o_b = i_split * batch + i_b
    o_dq = ((o_b * slots + r_slot[:, None]) * heads + i_h + r_head[:, None]) * width + c_in[None, :]
    tl.store(dq + o_dq, b_dq.to(dq.dtype.element_ty), mask=m_rc)


@triton.jit
def _reduce_kernel(
    partial,
    partial_sums,
    out,
    exact,
    sums,
    batch,
    heads,
    slots,
    width,
    splits,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """One row (sample, slot, head) of the result from its partial sums [splits, B, K, H, d], added in order."""
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(batch, tl.int64) * heads * slots
    o_s, o_c = tl.arange(0, SPLITS), tl.arange(0, COLUMNS)
    m_c = o_c < width
    i_b, i_slot, i_h = i_row // (slots * heads), i_row // heads % slots, i_row % heads
    # sums are [B, H, K]
    i_sum = (i_b * heads + i_h) * slots + i_slot
    b_acc = tl.zeros([COLUMNS], tl.float32)
    b_sum = 0.0
    for start in range(0, splits, SPLITS):
        o_row, m_s = (start + o_s) * rows, start + o_s < splits
        p_row = partial + (o_row + i_row)[:, None] * width + o_c[None, :]
        b_acc += tl.sum(tl.load(p_row, mask=m_s[:, None] & m_c[None, :], other=0.0), 0)
        if NORMALISE:
            b_sum += tl.sum(tl.load(partial_sums + o_row + i_sum, mask=m_s, other=0.0), 0)
    if NORMALISE:
        b_acc = b_acc / b_sum
        tl.store(sums + i_sum, b_sum)
        tl.store(exact + i_row * width + o_c, b_acc, mask=m_c)
    tl.store(out + i_row * width + o_c, b_acc.to(out.dtype.element_ty), mask=m_c)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eps: float,
    updates: torch.Tensor,
    exact: torch.Tensor,
    sums: torch.Tensor,
    attn: torch.Tensor | None,
    logits: torch.Tensor | None,
) -> None:
    """Fills the results: updates and exact [B, H, K, d] laid out as [B, K, H, d], the others contiguous."""
    q, k, v = launch.near(q, 3), launch.rows_last(k), launch.rows_last(v)
    batch, heads, slots, width = q.shape
    tokens, device = k.shape[2], q.device
    launch.written("updates", updates.transpose(1, 2), q.dtype, (batch, slots, heads, width), device)
    launch.written("exact", exact.transpose(1, 2), torch.float32, (batch, slots, heads, width), device)
    launch.written("sums", sums, torch.float32, (batch, heads, slots), device)
    if attn is not None:
        launch.written("attn", attn, torch.float32, (batch, tokens, slots), device)
    if logits is not None:
        launch.written("logits", logits, torch.float32, (batch, heads, tokens, slots), device)
    products = precisions(device, k.dtype)
    shape = plan(q, k, v, products, backward=False)
    programs = batch * (heads if shape.heads == 1 else 1)
    parts = 1 if shape.whole else triton.cdiv(width, shape.columns)
    number, span = splits(programs * parts, tokens, shape.tokens, device)
    peak = mass = None
    if shape.joint:
        peak, mass, _ = _joint(q, k, v, None, None, exact, sums, attn, shape, products)
        attn = None
    part, part_sums = exact, sums
    if number > 1:
        part = exact.new_empty((number, batch, slots, heads, width), dtype=torch.float32)
        part_sums = exact.new_empty((number, batch, heads, slots), dtype=torch.float32)
    launch.launch(
        _forward_kernel,
        (programs, number, parts),
        q,
        k,
        v,
        peak,
        mass,
        updates,
        part,
        part_sums,
        attn,
        logits,
        batch,
        heads,
        tokens,
        slots,
        width,
        span,
        eps,
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
        SPLIT=number > 1,
        ATTN=attn is not None,
        LOGITS=logits is not None,
        **products,
    )
    if number > 1:
        _reduce(part, part_sums, updates, exact, sums)


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
    products = precisions(device, k.dtype)
    shape = plan(q, k, v, products, backward=True)
    programs = batch * (heads if shape.heads == 1 else 1)
    parts = 1 if shape.whole else triton.cdiv(width, shape.columns)
    number, span = splits(programs * parts, tokens, shape.tokens, device)
    peak = mass = inner = None
    if shape.joint and not (grad_updates is None and grad_attn is None):
        peak, mass, inner = _joint(q, k, v, grad_updates, grad_attn, exact, sums, None, shape, products)
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
        *_strides(grad_updates, 4),
        *_strides(grad_attn, 3),
        *_strides(grad_logits, 4),
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
        _reduce(part, None, dq, None, None)


def _joint(
    q, k, v, grad_updates, grad_attn, exact, sums, attn, shape: Plan, products: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """peak, mass and, where there are gradients of a, inner: [B, N] each. Fills attn if there is one.

    With the tiles of the launch that follows: logits that were added up in another order would not cancel against mass.
    """
    batch, heads, slots, width = q.shape
    tokens = k.shape[2]
    backward = attn is None and (grad_updates is not None or grad_attn is not None)
    peak, mass = (exact.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    inner = exact.new_empty((batch, tokens), dtype=torch.float32) if backward else None
    launch.launch(
        _joint_kernel,
        (batch, triton.cdiv(tokens, shape.tokens)),
        q,
        k,
        v,
        grad_updates,
        grad_attn,
        exact,
        sums,
        peak,
        mass,
        inner,
        attn,
        heads,
        tokens,
        slots,
        width,
        *q.stride(),
        *k.stride()[:3],
        *v.stride()[:3],
        *_strides(grad_updates, 4),
        *_strides(grad_attn, 3),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        SLOTS=shape.slots,
        COLUMNS=shape.columns,
        TOKENS=shape.tokens,
        INNER=backward,
        GRAD_UPDATES=grad_updates is not None,
        GRAD_ATTN=grad_attn is not None,
        ATTN=attn is not None,
        PRECISION=products["PRECISION"],
        WIDEN=products["WIDEN"],
    )
    return peak, mass, inner


def _reduce(
    part: torch.Tensor,
    part_sums: torch.Tensor | None,
    out: torch.Tensor,
    exact: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    number, batch, slots, heads, width = part.shape
    launch.launch(
        _reduce_kernel,
        (batch * slots * heads,),
        part,
        part_sums,
        out,
        exact,
        sums,
        batch,
        heads,
        slots,
        width,
        number,
        num_warps=4,
        num_stages=1,
        COLUMNS=launch.power_of_2(width),
        SPLITS=16,
        NORMALISE=part_sums is not None,
    )


def _strides(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if tensor is None else tensor.stride()
