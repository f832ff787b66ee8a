"""Triton kernels that run before and after those of the slot-attention step, forward and backward.

Before, where heads have programs of their own: `joint_statistics` goes over all heads of a token for its largest logit,
the mass of its softmax and, in the backward pass, its inner product Σ a · da. After, where the tokens are split over
programs: `add_partials` adds their partial sums in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.slot_attention_plan import Plan
from spot_kernels.gpu.slot_attention_tiles import inner_products, row_products


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
    """What the heads of a token share, [B, N] each: the largest logit, Σ exp(logit - largest) and Σ a · da.

    Grid: samples × blocks of TOKENS tokens.
    """
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    # int64: the offset of a token passes 2^31 in large tensors
    first = tl.cast(start, tl.int64)
    o_r, o_t = tl.arange(0, SLOTS), tl.arange(0, TOKENS)
    m_r, m_t = o_r < slots, start + o_t < tokens
    m_rt = m_r[:, None] & m_t[None, :]
    o_n = i_b * tokens + start + o_t
    o_k, o_v, o_q, o_u = o_t * stride_kn, o_t * stride_vn, o_r * stride_qk, o_r * stride_uk
    b_peak = tl.full([TOKENS], float("-inf"), tl.float32)
    b_mass = tl.zeros([TOKENS], tl.float32)
    b_inner = tl.zeros([TOKENS], tl.float32)
    # online softmax over the heads: what was summed under an earlier maximum is scaled down
    for head in range(0, heads):
        i_h = tl.cast(head, tl.int64)
        p_q, p_k = q + i_b * stride_qb + i_h * stride_qh, k + i_b * stride_kb + i_h * stride_kh + first * stride_kn
        # logits of the head, [SLOTS, TOKENS]
        b_l = inner_products(p_q, o_q, stride_qd, m_r, p_k, o_k, m_t, width, COLUMNS, PRECISION, WIDEN)
        b_l = tl.where(m_r[:, None], b_l, float("-inf"))
        b_higher = tl.maximum(b_peak, tl.max(b_l, 0))
        b_p = tl.exp(b_l - b_higher[None, :])
        b_scale = tl.exp(b_peak - b_higher)
        b_mass = b_mass * b_scale + tl.sum(b_p, 0)
        b_peak = b_higher
        if INNER:
            # gradient of a, [SLOTS, TOKENS], as in the backward kernel
            b_ga = tl.zeros([SLOTS, TOKENS], tl.float32)
            if GRAD_UPDATES:
                p_u = grad_updates + i_b * stride_ub + i_h * stride_uh
                p_v = v + i_b * stride_vb + i_h * stride_vh + first * stride_vn
                o_exact = ((i_b * slots + o_r) * heads + i_h) * width
                b_shared = row_products(p_u, o_u, stride_ud, exact, o_exact, m_r, width, COLUMNS)
                b_rsum = 1.0 / tl.load(sums + (i_b * heads + i_h) * slots + o_r, mask=m_r, other=float("inf"))
                b_ga = inner_products(p_u, o_u, stride_ud, m_r, p_v, o_v, m_t, width, COLUMNS, PRECISION, WIDEN)
                b_ga = (b_ga - b_shared[:, None]) * b_rsum[:, None]
            if GRAD_ATTN:
                p_a = grad_attn + i_b * stride_ab + first * stride_an
                b_ga += tl.load(p_a + o_r[:, None] * stride_ak + o_t[None, :] * stride_an, mask=m_rt, other=0.0)
            b_inner = b_inner * b_scale + tl.sum(b_p * b_ga, 0)
    tl.store(peak + o_n, b_peak, mask=m_t)
    tl.store(mass + o_n, b_mass, mask=m_t)
    if INNER:
        tl.store(inner + o_n, b_inner / b_mass, mask=m_t)
    if ATTN:
        # a needs the final maximum and mass, so the logits are computed a second time
        b_attn = tl.zeros([SLOTS, TOKENS], tl.float32)
        for head in range(0, heads):
            i_h = tl.cast(head, tl.int64)
            p_q, p_k = q + i_b * stride_qb + i_h * stride_qh, k + i_b * stride_kb + i_h * stride_kh + first * stride_kn
            b_l = inner_products(p_q, o_q, stride_qd, m_r, p_k, o_k, m_t, width, COLUMNS, PRECISION, WIDEN)
            b_attn += tl.exp(b_l - b_peak[None, :]) / b_mass[None, :]
        tl.store(attn + o_n[None, :] * slots + o_r[:, None], b_attn, mask=m_rt)


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
    """One row (sample, slot, head) of the result from its partial sums [splits, B, K, H, d]. Grid: rows."""
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(batch, tl.int64) * heads * slots
    o_s, o_c = tl.arange(0, SPLITS), tl.arange(0, COLUMNS)
    m_c = o_c < width
    i_b, i_slot, i_h = i_row // (slots * heads), i_row // heads % slots, i_row % heads
    # sums are [B, H, K]
    i_sum = (i_b * heads + i_h) * slots + i_slot
    b_acc = tl.zeros([COLUMNS], tl.float32)
    b_sum = 0.0
    # SPLITS partial rows at a time, [SPLITS, COLUMNS], always in the same order
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


def joint_statistics(
    q, k, v, grad_updates, grad_attn, exact, sums, attn, shape: Plan, products: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """peak, mass and, if there are gradients of a, inner: [B, N] each. Fills attn if it is given.

    Uses the tiles of the launch that follows: logits summed in another order would not cancel against mass.
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
        *strides(grad_updates, 4),
        *strides(grad_attn, 3),
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


def add_partials(
    part: torch.Tensor,
    part_sums: torch.Tensor | None,
    out: torch.Tensor,
    exact: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    """Fills out, and with part_sums also exact and sums, from partial sums [splits, B, K, H, d]."""
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


def strides(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """The tensor's strides; zeros for an argument that is None, which the kernel does not read."""
    return (0,) * axes if tensor is None else tensor.stride()
