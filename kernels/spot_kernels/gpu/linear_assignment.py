"""Optimal assignment by shortest augmenting paths: one program solves one problem, 1024 × 1024 at most.

Algorithm and rule for ties are those of csrc/linear_assignment.cpp, so the result equals the native library's, down to
the choice among equals: rows are added one at a time, a Dijkstra search over reduced costs finds the nearest free
column, the path is flipped and the duals move. The search is sequential; a program runs one step of it in parallel, on
vectors over columns. Everything that belongs to a row (its dual) is kept at the column that holds the row. The smaller
side is augmented: where there are more rows than columns, the strides are exchanged and nothing is copied.

Up to 128 columns lie in one warp; more are spread over several, which exchange through shared memory what a step
reduces or looks up. A search keeps its state in registers alone, so that no warp waits for another's stores to memory.

Computed in float64 whatever the dtype of the costs. Rounding decides near-ties: only the same operations in the same
precision as on the CPU make the same choice, and only additions occur, which no compiler contracts. Float64 also keeps
the result optimal for integer costs beyond float32's 24 bits.

A problem with NaN, infinity or a value beyond ±1e300 is not searched: all its rows get -1. In every other one sums stay
finite, each step of a search reaches one more column, and a free column is left: loops end.

That proof assumes correct memory. A search that reads anything else (NaN that another kernel wrote in the meantime, for
example) must not hang the machine either: it takes at most a step for each column, stops where no column is at a finite
distance, and gives up the whole problem, whose columns are then held by no row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

LARGEST_COST = tl.constexpr(1e300)


@triton.jit
def column_numbers(COLUMNS: tl.constexpr):
    """0…COLUMNS-1. The hint keeps loads and stores at them scalar.

    Vectorised, a lane would hold two neighbouring columns there and one elsewhere, and every step of a search would
    shuffle between the two layouts.
    """
    return tl.max_contiguous(tl.arange(0, COLUMNS), 1)


@triton.jit
def shortest_augmenting_paths(cost_ptr, stride_row, stride_column, rows, columns, COLUMNS: tl.constexpr):
    """The row that holds each column, -1 for a free one: int32 [COLUMNS], a power of two >= columns >= rows.

    cost_ptr points to finite costs [rows, columns] of any floating dtype. Where they are not finite, all may be -1; the
    search ends in rows × columns steps in any case.
    """
    # of a row's or a column's number, below its rank in an int32
    BITS: tl.constexpr = 7 if COLUMNS <= 64 else 10
    MASK: tl.constexpr = (1 << BITS) - 1
    o_c = column_numbers(COLUMNS)
    m_c = o_c < columns
    p_cost = cost_ptr + o_c.to(tl.int64) * stride_column
    row_of = tl.full([COLUMNS], -1, tl.int32)
    row_dual = tl.zeros([COLUMNS], tl.float64)
    column_dual = tl.zeros([COLUMNS], tl.float64)
    given_up = rows < 0
    # one row after the other, each by a search that leaves all rows before it assigned
    for start in range(0, rows):
        distance = tl.full([COLUMNS], float("inf"), tl.float64)
        # the column before each one on its shortest path; its own number where the path comes straight from the new row
        came_from = o_c
        through = o_c
        # index in the list of columns not yet reached (csrc/linear_assignment.cpp), -1 once reached
        index = tl.where(m_c, columns - 1 - o_c, -1)
        # column and row of each column, below its rank in the step: one reduction finds all three of the nearest column
        known = (o_c << BITS) | tl.maximum(row_of, 0)
        left = columns
        row = start
        dual = tl.zeros([COLUMNS], tl.float64)
        walked = tl.full([], 0.0, tl.float64)
        searching = not given_up
        # Dijkstra: each step reaches the nearest column and continues from the row that holds it
        while searching:
            # costs of the row, [COLUMNS]; int64 because a stride may be large
            b_cost = tl.load(p_cost + row.to(tl.int64) * stride_row, mask=m_c, other=0.0).to(tl.float64)
            # the order of these operations is the library's, because rounding decides near-ties
            through_row = walked + b_cost - dual - column_dual
            unreached = index >= 0
            closer = unreached & (through_row < distance)
            distance = tl.where(closer, through_row, distance)
            came_from = tl.where(closer, through, came_from)
            walked = tl.min(tl.where(unreached, distance, float("inf")), 0)
            # of the nearest: free columns before taken ones, the last in the list of free ones, the first of taken ones
            rank = tl.where(row_of < 0, COLUMNS + index, COLUMNS - 1 - index)
            nearest = tl.max(tl.where(unreached & (distance == walked), (rank << 2 * BITS) | known, -1), 0)
            given_up = (nearest < 0) | (walked == float("inf"))
            nearest = tl.maximum(nearest, 0)
            column = (nearest >> BITS) & MASK
            rank = nearest >> 2 * BITS
            row = tl.where(rank < COLUMNS, nearest & MASK, -1)
            # the list's last entry moves to the index of the column that leaves it
            freed = tl.where(row < 0, rank - COLUMNS, COLUMNS - 1 - rank)
            left -= 1
            index = tl.where(index == left, freed, index)
            index = tl.where(o_c == column, -1, index)
            through = column + tl.zeros([COLUMNS], tl.int32)
            dual = tl.gather(row_dual, through, 0)
            given_up |= (row >= 0) & (left <= 0)
            searching = (row >= 0) & (not given_up)

        # reduced costs stay non-negative, and zero on the assigned pairs
        moved = tl.where(m_c & (index < 0), walked - distance, 0.0)
        column_dual -= moved
        row_dual += moved
        # back from the free column to the new row. After n steps the path has at most n columns; a step beyond its
        # first column stays there
        on_path = o_c == through
        for _ in range(left + 1, columns):
            through = tl.gather(came_from, through, 0)
            on_path = on_path | (o_c == through)
        first = came_from == o_c
        row_of = tl.where(on_path, tl.where(first, start, tl.gather(row_of, came_from, 0)), row_of)
        row_dual = tl.where(on_path, tl.where(first, walked, tl.gather(row_dual, came_from, 0)), row_dual)
    return tl.where(given_up, -1, row_of)


# Specialising on divisibility by 16 makes no faster code here, only more of it to compile.
@triton.jit(do_not_specialize_on_alignment=["stride_batch", "stride_row", "stride_column", "rows", "columns"])
def linear_assignment_kernel(
    cost_ptr,
    num_columns_ptr,
    out_ptr,
    stride_batch,
    stride_row,
    stride_column,
    rows,
    columns,
    COUNTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_CHECKED: tl.constexpr,
):
    """cost [B, rows, columns], rows <= columns -> out [B, rows], or [B, columns] of the transposed problem.

    COUNTED: each problem has its own number of columns, at most `columns`, which may be below its rows. Then it is this
    program that transposes.
    """
    i_b = tl.program_id(0).to(tl.int64)
    cost_ptr += i_b * stride_batch
    if COUNTED:
        out_ptr += i_b * rows
        counted = tl.minimum(tl.maximum(tl.load(num_columns_ptr + i_b), 0), columns).to(tl.int32)
        transposed = counted < rows
        columns = tl.maximum(counted, rows)
        rows = tl.minimum(counted, rows)
        row, column = stride_row, stride_column
        stride_row = tl.where(transposed, column, row)
        stride_column = tl.where(transposed, row, column)
    else:
        transposed = TRANSPOSED
        out_ptr += i_b * (columns if TRANSPOSED else rows)
    o_c = column_numbers(COLUMNS)
    m_c = o_c < columns
    # [ROWS_CHECKED, COLUMNS] costs at a time; reading all of them first also brings them into the cache
    p_column = cost_ptr + o_c[None, :].to(tl.int64) * stride_column
    b_bad = tl.zeros([ROWS_CHECKED, COLUMNS], tl.int32)
    for r in range(0, rows, ROWS_CHECKED):
        o_r = r + tl.arange(0, ROWS_CHECKED)[:, None]
        m_cost = (o_r < rows) & m_c[None, :]
        b_cost = tl.load(p_column + o_r.to(tl.int64) * stride_row, mask=m_cost, other=0.0).to(tl.float64)
        b_bad |= tl.where(tl.abs(b_cost) <= LARGEST_COST, 0, 1)  # NaN compares as false
    searched = tl.where(tl.max(tl.max(b_bad, 1), 0) > 0, 0, rows)

    row_of = shortest_augmenting_paths(cost_ptr, stride_row, stride_column, searched, columns, COLUMNS=COLUMNS)
    searched = tl.where(tl.max(row_of, 0) < 0, 0, searched)  # given up
    if transposed:
        tl.store(out_ptr + o_c, row_of.to(tl.int64), mask=m_c)
    else:
        tl.store(out_ptr + row_of, o_c.to(tl.int64), mask=row_of >= 0)
        tl.store(out_ptr + o_c, tl.full([COLUMNS], -1, tl.int64), mask=(o_c >= searched) & (o_c < rows))


class Config(NamedTuple):
    """Columns of the search, rows that are checked at once, warps."""

    columns: int
    rows_checked: int
    warps: int


def config(larger_side: int) -> Config:
    """The same on every chip. Wide searches have four columns a thread: their state is 40 bytes a column."""
    columns = launch.power_of_2(larger_side, 8)
    return Config(columns, 8 if columns <= 64 else 4, max(1, columns // 128))


def linear_assignment(cost: torch.Tensor, num_columns: torch.Tensor | None, assignment: torch.Tensor) -> None:
    """Fills assignment [B, R] int64, -1 in a row without a column.

    cost [B, R, C], R and C at most 1024, any strides; num_columns int64 [B], the columns of each problem, or None.
    """
    batch, rows, columns = cost.shape
    launch.written("assignment", assignment, torch.int64, (batch, rows), cost.device)
    if num_columns is not None:
        num_columns = launch.dense("num_columns", num_columns, torch.int64, (batch,), cost.device)
    strides = cost.stride()
    transposed = num_columns is None and rows > columns
    chosen = config(max(rows, columns))
    if transposed:
        rows, columns, strides = columns, rows, (strides[0], strides[2], strides[1])
    launch.launch(
        linear_assignment_kernel,
        (batch if assignment.numel() else 0,),
        cost.detach(),
        num_columns,
        assignment,
        *strides,
        rows,
        columns,
        COUNTED=num_columns is not None,
        TRANSPOSED=transposed,
        COLUMNS=chosen.columns,
        ROWS_CHECKED=chosen.rows_checked,
        num_warps=chosen.warps,
        num_stages=1,
    )
