"""Overlap counts of two label maps, and the whole of mask matching in one launch.

    counts[t, s] = Σ_n [teacher_n = t] [student_n = s]     one-hot rows times one-hot columns on the tensor cores
    IoU[t, s]    = counts / (Σ_s counts + Σ_t counts − counts),  cost = 1 − IoU, 1000 for a teacher mask without a token

One program an image counts, writes the costs, solves the assignment (gpu/linear_assignment.py) and renames the labels.
Counts are sums of products of 0 and 1 in float32, exact up to 2^24 tokens. The division is correctly rounded and only a
subtraction follows it, so costs equal those of the CPU to the last bit.

A label out of range equals no slot: its token is counted in neither map and renamed to -1. Where the search gives up
(gpu/linear_assignment.py), the image's assignment is -1, its IoU 0, and all its tokens are renamed to -1: no counts
lead to such costs, only memory that does not hold what this kernel wrote.

The threads that computed the costs write them to memory, and other threads of the same program read them back row by
row in the search. The barrier in between is enough: it waits for every thread of the program and orders their accesses
to global memory; no other program reads what this one writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.linear_assignment import column_numbers, shortest_augmenting_paths

# Of a program of overlap_counts: the side of its tile of counts, and the fewest tokens that pay for another program.
COUNT_TILE, LEAST_TOKENS = 64, 2048


class Config(NamedTuple):
    """Of assign_masks_kernel: side of the tile of slots, columns of the search, tokens in a block, warps."""

    slots: int
    columns: int
    tokens: int
    warps: int


def config(num_slots: int) -> Config:
    """The same on every chip: a program counts for a short time, then searches one step after the other.

    Four warps count faster than one, and search as fast up to 32 columns, which every warp holds. 64 columns spread
    over two warps, which exchange through shared memory in every step; one warp could hold them, but not 64 × 64
    counts.
    """
    slots = launch.power_of_2(num_slots)
    tokens = {16: 256, 32: 128, 64: 64}[slots]
    return Config(slots, launch.power_of_2(num_slots, 8), tokens, 4)


@triton.jit
def _load_labels(pointers, mask, number):
    """int32 labels; -1 where masked or outside 0…number-1, compared before 64 bits become 32."""
    b_label = tl.load(pointers, mask=mask, other=0).to(tl.int64)
    return tl.where(mask & (b_label >= 0) & (b_label < number), b_label, -1).to(tl.int32)


@triton.jit
def _count(
    a_ptr,
    b_ptr,
    valid_ptr,
    stride_a,
    stride_b,
    stride_valid,
    first,
    last,
    num_a,
    num_b,
    o_a,
    o_b,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """float32 [len(o_a), len(o_b)]: tokens from `first` to `last` with label o_a in a and o_b in b; exact to 2^24."""
    counts = tl.zeros([o_a.shape[0], o_b.shape[0]], tl.float32)
    # blocks of TOKENS tokens, each read once: [A, B] counts stay in registers
    for n in range(first, last, TOKENS):
        o_n = n + tl.arange(0, TOKENS)
        m_n = o_n < last
        o_n = o_n.to(tl.int64)
        if MASKED:
            m_n = m_n & (tl.load(valid_ptr + o_n * stride_valid, mask=m_n, other=0) != 0)
        b_a = _load_labels(a_ptr + o_n * stride_a, m_n, num_a)
        b_b = _load_labels(b_ptr + o_n * stride_b, m_n, num_b)
        # one-hot [A, TOKENS] and [TOKENS, B]: exact in float16, and the product accumulates in float32
        b_hot_a = (b_a[None, :] == o_a[:, None]).to(tl.float16)
        b_hot_b = (b_b[:, None] == o_b[None, :]).to(tl.float16)
        counts = tl.dot(b_hot_a, b_hot_b, counts)
    return counts


@triton.jit
def overlap_counts_kernel(
    a_ptr,
    b_ptr,
    valid_ptr,
    out_ptr,
    stride_ab,
    stride_an,
    stride_bb,
    stride_bn,
    stride_vb,
    stride_vn,
    tokens,
    tokens_each,
    parts,
    num_a,
    num_b,
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Grid: batch × parts of `tokens_each` tokens, tiles of a, tiles of b. out [B, parts, num_a, num_b] int32."""
    pid = tl.program_id(0)
    i_b, part = (pid // parts).to(tl.int64), pid % parts
    o_a = tl.program_id(1) * TILE_A + tl.arange(0, TILE_A)
    o_b = tl.program_id(2) * TILE_B + tl.arange(0, TILE_B)
    first = part * tokens_each
    if MASKED:
        valid_ptr += i_b * stride_vb
    b_counts = _count(
        a_ptr + i_b * stride_ab,
        b_ptr + i_b * stride_bb,
        valid_ptr,
        stride_an,
        stride_bn,
        stride_vn,
        first,
        tl.minimum(first + tokens_each, tokens),
        num_a,
        num_b,
        o_a,
        o_b,
        TOKENS=TOKENS,
        MASKED=MASKED,
    )
    # [TILE_A, TILE_B]
    p_out = out_ptr + (pid.to(tl.int64) * num_a + o_a[:, None]) * num_b + o_b[None, :]
    tl.store(p_out, b_counts.to(tl.int32), mask=(o_a < num_a)[:, None] & (o_b < num_b)[None, :])


@triton.jit
def assign_masks_kernel(
    student_ptr,
    teacher_ptr,
    cost_ptr,
    iou_ptr,
    assignment_ptr,
    assigned_iou_ptr,
    renamed_ptr,
    stride_sb,
    stride_sn,
    stride_tb,
    stride_tn,
    tokens,
    slots,
    EMPTY_COST: tl.constexpr,
    RENAME: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: batch. Writes cost [B, K, K] and assignment [B, K]; renamed [B, N], or both iou [B, K, K] and [B, K]."""
    i_b = tl.program_id(0).to(tl.int64)
    student_ptr += i_b * stride_sb
    teacher_ptr += i_b * stride_tb
    cost_ptr += i_b * slots * slots
    assignment_ptr += i_b * slots
    o_k = tl.arange(0, SLOTS)
    b_both = _count(
        teacher_ptr,
        student_ptr,
        None,
        stride_tn,
        stride_sn,
        0,
        0,
        tokens,
        slots,
        slots,
        o_k,
        o_k,
        TOKENS=TOKENS,
        MASKED=False,
    )
    b_in_teacher, b_in_student = tl.sum(b_both, 1)[:, None], tl.sum(b_both, 0)[None, :]
    # in this order of operations nothing exceeds the number of tokens, so every step is exact
    b_iou = tl.div_rn(b_both, tl.maximum(b_in_teacher - b_both + b_in_student, 1.0))
    b_cost = tl.where(b_in_teacher == 0.0, EMPTY_COST, 1.0 - b_iou)
    # [SLOTS, SLOTS]
    o_pair = o_k[:, None] * slots + o_k[None, :]
    m_pair = (o_k < slots)[:, None] & (o_k < slots)[None, :]
    tl.store(cost_ptr + o_pair, b_cost, mask=m_pair)
    if not RENAME:
        iou_ptr += i_b * slots * slots
        tl.store(iou_ptr + o_pair, b_iou, mask=m_pair)
    # all costs are in memory before any thread reads one in the search
    tl.debug_barrier()

    # square and finite, so a row holds every column; if costs were not finite, it is -1 everywhere
    teacher_of = shortest_augmenting_paths(cost_ptr, slots, 1, slots, slots, COLUMNS=COLUMNS)
    o_c = column_numbers(COLUMNS)
    m_c = (o_c < slots) & (teacher_of >= 0)
    m_none = (o_c < slots) & (teacher_of < 0)
    tl.store(assignment_ptr + teacher_of, o_c.to(tl.int64), mask=m_c)
    tl.store(assignment_ptr + o_c, tl.full([COLUMNS], -1, tl.int64), mask=m_none)
    if RENAME:
        # the assignment is in memory before any thread looks a label up in it
        tl.debug_barrier()
        renamed_ptr += i_b * tokens
        # a second walk over the teacher's labels, which are in the cache by now
        for n in range(0, tokens, TOKENS):
            o_n = n + tl.arange(0, TOKENS)
            m_n = o_n < tokens
            b_teacher = _load_labels(teacher_ptr + o_n.to(tl.int64) * stride_tn, m_n, slots)
            b_student = tl.load(assignment_ptr + b_teacher, mask=b_teacher >= 0, other=-1)
            tl.store(renamed_ptr + o_n, b_student, mask=m_n)
    else:
        b_assigned = tl.load(iou_ptr + teacher_of * slots + o_c, mask=m_c)
        tl.store(assigned_iou_ptr + i_b * slots + teacher_of, b_assigned, mask=m_c)
        tl.store(assigned_iou_ptr + i_b * slots + o_c, tl.zeros([COLUMNS], tl.float32), mask=m_none)


def overlap_counts(
    a: torch.Tensor,
    b: torch.Tensor,
    num_a: int,
    num_b: int,
    valid: torch.Tensor | None,
    most_tokens: int,
    counts: torch.Tensor,
) -> None:
    """Fills counts [B, num_a, num_b] int64; a, b [B, N] integer, valid [B, N] bool or None, any strides.

    Tokens are split over programs until the chip is full, and so that none counts more than `most_tokens`, up to which
    float32 is exact; the parts are added afterwards.
    """
    batch, tokens = a.shape
    launch.written("counts", counts, torch.int64, (batch, num_a, num_b), a.device)
    tile_a, tile_b = (min(launch.power_of_2(number), COUNT_TILE) for number in (num_a, num_b))
    tiles = triton.cdiv(num_a, tile_a), triton.cdiv(num_b, tile_b)
    wanted = 2 * launch.multiprocessors(a.device) // max(1, batch * tiles[0] * tiles[1])
    parts = max(1, min(wanted, triton.cdiv(tokens, LEAST_TOKENS)), triton.cdiv(tokens, most_tokens))
    partial = a.new_empty((batch, parts, num_a, num_b), dtype=torch.int32)
    launch.launch(
        overlap_counts_kernel,
        (batch * parts, *tiles),
        a,
        b,
        valid,
        partial,
        *a.stride(),
        *b.stride(),
        *((0, 0) if valid is None else valid.stride()),
        tokens,
        triton.cdiv(tokens, parts),
        parts,
        num_a,
        num_b,
        TILE_A=tile_a,
        TILE_B=tile_b,
        TOKENS=64,
        MASKED=valid is not None,
        num_warps=4,
        num_stages=2,
    )
    torch.sum(partial, 1, out=counts)


def assign_masks(
    student: torch.Tensor,
    teacher: torch.Tensor,
    empty_cost: float,
    assignment: torch.Tensor,
    assigned_iou: torch.Tensor,
    cost: torch.Tensor,
) -> None:
    """Fills assignment [B, K] int64, its IoU [B, K] and cost [B, K, K] float32; student and teacher [B, N]."""
    batch, num_slots = assignment.shape
    launch.written("assigned_iou", assigned_iou, torch.float32, (batch, num_slots), student.device)
    _launch(student, teacher, empty_cost, cost, torch.empty_like(cost), assignment, assigned_iou, None)


def match_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int, empty_cost: float, renamed: torch.Tensor
) -> None:
    """Fills renamed [B, N] int64: the student slot of each token's teacher label; student, teacher [B, N]."""
    batch = len(student)
    launch.written("renamed", renamed, torch.int64, student.shape, student.device)
    assignment = student.new_empty((batch, num_slots), dtype=torch.int64)
    cost = student.new_empty((batch, num_slots, num_slots), dtype=torch.float32)
    _launch(student, teacher, empty_cost, cost, None, assignment, None, renamed)


def _launch(student, teacher, empty_cost, cost, iou, assignment, assigned_iou, renamed) -> None:
    batch, num_slots = assignment.shape
    launch.written("assignment", assignment, torch.int64, (batch, num_slots), student.device)
    launch.written("cost", cost, torch.float32, (batch, num_slots, num_slots), student.device)
    chosen = config(num_slots)
    launch.launch(
        assign_masks_kernel,
        (batch,),
        student,
        teacher,
        cost,
        iou,
        assignment,
        assigned_iou,
        renamed,
        *student.stride(),
        *teacher.stride(),
        student.shape[1],
        num_slots,
        EMPTY_COST=empty_cost,
        RENAME=renamed is not None,
        SLOTS=chosen.slots,
        COLUMNS=chosen.columns,
        TOKENS=chosen.tokens,
        num_warps=chosen.warps,
        num_stages=2,
    )
