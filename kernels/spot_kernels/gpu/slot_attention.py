"""Triton kernel of the slot-attention step, forward; slot_attention_backward.py has the backward kernel.

    a = softmax over heads × slots of k qᵀ;  sums = Σ_n (a + eps);  updates = Σ_n (a + eps) v / sums

q and updates [B, H, K, d]; k, v [B, H, N, d]; float32, bfloat16 or float16. Saved for backward, beside the inputs:
exact, the updates in float32, and sums [B, H, K]. attn [B, N, K] and logits [B, H, N, K] are written only when asked
for.

A program takes one sample and one head, or all heads at once, and walks over its tokens, so that k and v are read once.
Queries and updates are tiles of ROWS rows (head, slot) and COLUMNS columns (head, channel), padded to powers of two.
Padded rows have logits of minus infinity and padded tokens a weight of zero, so that neither counts.

All heads share one softmax. Where the heads of a token lie side by side in memory (as a projection leaves them) and
heads × slots by heads × d fit a tile, all heads form one block-diagonal tile and run like a single head: the products
cost more arithmetic, which a kernel that waits for memory has to spare. Otherwise each head has its own programs, after
`slot_attention_passes` has computed what the heads share.

Where rows of d channels do not fit a tile, a program computes one part of the columns of its results; it still needs
whole logits, and sums them up part by part.

With few samples and many tokens the tokens are split over programs. Each writes a partial sum in float32, and a second
launch adds them in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch, slot_attention_plan
from spot_kernels.gpu.slot_attention_passes import add_partials, joint_statistics
from spot_kernels.gpu.slot_attention_tiles import inner_products, load_tile, operand, rounded, softmax, tile_indices


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
    """Grid: samples (× heads, unless a tile holds them all), splits of `span` tokens, parts of the columns."""
    ROWS: tl.constexpr = HEADS * SLOTS
    i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc = tile_indices(
        heads, slots, width, HEADS, SLOTS, COLUMNS, WHOLE
    )
    i_split, o_t = tl.program_id(1), tl.arange(0, TOKENS)
    # the programs of all parts of the columns compute the same logits and sums: the first part writes them
    m_once = m_r & (r_slot < tl.where(tl.program_id(2) == 0, slots, 0))
    p_q, o_q = q + i_b * stride_qb + i_h * stride_qh, r_head * stride_qh + r_slot * stride_qk
    if WHOLE:
        # queries [ROWS, COLUMNS], kept for all tokens
        b_q = load_tile(p_q, o_q, c_in * stride_qd, m_rc, WIDEN)
    # one sum for each position in a block: the reduction over a block is left for the end
    b_sums = tl.zeros([ROWS, TOKENS], tl.float32)
    b_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    end = tl.minimum(i_split * span + span, tokens)
    # one pass over the split's tokens, TOKENS at a time
    for start in range(i_split * span, end, TOKENS):
        # int64: the offset of a token passes 2^31 in large tensors
        first = tl.cast(start, tl.int64)
        m_t = start + o_t < end
        m_tc = m_t[:, None] & m_c[None, :]
        # logits [ROWS, TOKENS]
        if WHOLE:
            # keys [TOKENS, COLUMNS]
            b_k = load_tile(p_k + first * stride_kn, o_t * stride_kn, o_c, m_tc, WIDEN)
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
        if LOGITS:
            o_l = ((i_b * heads + i_h + r_head[:, None]) * tokens + start + o_t[None, :]) * slots + r_slot[:, None]
            tl.store(logits + o_l, b_l, mask=m_once[:, None] & m_t[None, :])
        b_a = softmax(b_l, m_r, m_t, peak, mass, i_b * tokens + start + o_t, JOINT)
        if ATTN:
            # summed over the heads of the tile, [SLOTS, TOKENS]
            b_attn = b_a
            if HEADS > 1:
                b_attn = tl.sum(tl.reshape(b_a, [HEADS, SLOTS, TOKENS]), 0)
            o_s = tl.arange(0, SLOTS)
            o_attn = (i_b * tokens + start + o_t[None, :]) * slots + o_s[:, None]
            m_s = o_s < tl.where(tl.program_id(2) == 0, slots, 0)
            tl.store(attn + o_attn, b_attn, mask=m_s[:, None] & m_t[None, :])
        b_w = rounded(tl.where(m_t[None, :], b_a + eps, 0.0), ROUND)
        # values [TOKENS, COLUMNS]
        b_v = load_tile(p_v + first * stride_vn, o_t * stride_vn, o_c, m_tc, WIDEN)
        # sums of the rounded weights, those the product uses, so that rounding does not bias the mean
        b_sums += b_w.to(tl.float32)
        b_acc = tl.dot(b_w, operand(b_v, ROUND), b_acc, input_precision=WEIGHTS)

    b_sum = tl.sum(b_sums, 1)
    # sums [splits, B, H, K]; exact [splits, B, K, H, d], not yet divided by the sums if SPLIT; updates [B, K, H, d]
    o_b = i_split * batch + i_b
    tl.store(sums + (o_b * heads + i_h + r_head) * slots + r_slot, b_sum, mask=m_once)
    o_u = ((o_b * slots + r_slot[:, None]) * heads + i_h + r_head[:, None]) * width + c_in[None, :]
    if not SPLIT:
        b_acc = b_acc / b_sum[:, None]
        tl.store(updates + o_u, b_acc.to(updates.dtype.element_ty), mask=m_rc)
    tl.store(exact + o_u, b_acc, mask=m_rc)


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
    products = slot_attention_plan.precisions(device, k.dtype)
    shape = slot_attention_plan.plan(q, k, v, products, backward=False)
    programs = batch * (heads if shape.heads == 1 else 1)
    parts = 1 if shape.whole else triton.cdiv(width, shape.columns)
    number, span = slot_attention_plan.splits(programs * parts, tokens, device, backward=False)
    peak = mass = None
    if shape.joint:
        peak, mass, _ = joint_statistics(q, k, v, None, None, exact, sums, attn, shape, products)
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
        add_partials(part, part_sums, updates, exact, sums)
