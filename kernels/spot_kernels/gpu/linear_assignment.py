"""Optimal assignment by shortest augmenting paths: one program solves one problem, 64 × 64 at most.

The algorithm and its rule for ties are those of csrc/linear_assignment.cpp, so the result is the library's to the last
choice among equals: rows are added one at a time, a Dijkstra search over reduced costs finds the nearest free column,
the path is flipped and the duals move. The search is sequential; what a program does in parallel is one step of it, on
vectors over columns. Everything that belongs to a row (its dual) is kept at the column that holds the row.

Computed in float64 whatever the dtype of the costs. Near-ties are decided by rounding: only the same operations in the
same precision as on the CPU make the same choice, and only additions occur, which no compiler contracts. Float64 is
also what makes the result optimal for integer costs beyond float32's 24 bits.

A problem that holds NaN, infinity or a value beyond ±1e300 is not searched: all its rows get -1. For every other one
sums stay finite, each step of a search takes one column out, and a free column is left: loops end.

That is a proof about correct memory. A search that reads something else (NaN that another kernel wrote in the meantime,
say) must not hang the machine either: it takes a step for each column at most, stops where no column is at a finite
distance, and gives the whole problem up, whose columns are then held by no row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

LARGEST_COST = tl.constexpr(1e300)
ROWS_CHECKED_AT_ONCE = tl.constexpr(8)


@triton.jit
def column_numbers(COLUMNS: tl.constexpr):
    """0…COLUMNS-1. The hint keeps loads and stores at them from being vectorised: with two neighbouring columns a lane
    there and one elsewhere, every step of a search would shuffle between the two layouts."""
    return tl.max_contiguous(tl.arange(0, COLUMNS), 1)


@triton.jit
def shortest_augmenting_paths(cost_ptr, stride_row, stride_column, rows, columns, COLUMNS: tl.constexpr):
    """The row that holds each column, -1 for a free one: int32 [COLUMNS], a power of two >= columns >= rows.

    cost_ptr points to finite costs [rows, columns] of any floating dtype. Where they are not, all may be -1; it ends in
    rows × columns steps in any case.
    """
    o_c = column_numbers(COLUMNS)
    m_c = o_c < columns
    p_cost = cost_ptr + o_c.to(tl.int64) * stride_column
    row_of = tl.full([COLUMNS], -1, tl.int32)
    row_dual = tl.zeros([COLUMNS], tl.float64)
    column_dual = tl.zeros([COLUMNS], tl.float64)
    given_up = rows < 0
    for start in range(0, rows):
        distance = tl.full([COLUMNS], float("inf"), tl.float64)
        # the column through which the search came here; a column's own number: straight from the new row
        came_from = o_c
        through = o_c
        # place in the list of columns not yet reached (csrc/linear_assignment.cpp), -1 once reached
        place = tl.where(m_c, columns - 1 - o_c, -1)
        # what is to be known of the nearest column, packed so that one reduction finds it: column and row + 1, 7 bits
        # each, and before them in a step its rank
        known = (o_c << 7) | (row_of + 1)
        left = columns
        row = start
        dual = tl.zeros([COLUMNS], tl.float64)
        walked = tl.full([], 0.0, tl.float64)
        searching = not given_up
        while searching:
            b_cost = tl.load(p_cost + row.to(tl.int64) * stride_row, mask=m_c, other=0.0).to(tl.float64)
            # the order of these operations is the library's: rounding decides between near-ties
            through_row = walked + b_cost - dual - column_dual
            unreached = place >= 0
            closer = unreached & (through_row < distance)
            distance = tl.where(closer, through_row, distance)
            came_from = tl.where(closer, through, came_from)
            walked = tl.min(tl.where(unreached, distance, float("inf")), 0)
            # of the nearest: a free column before a taken one, the last place of free ones, the first of taken ones
            rank = tl.where(row_of < 0, COLUMNS + place, COLUMNS - 1 - place)
            nearest = tl.max(tl.where(unreached & (distance == walked), (rank << 14) | known, -1), 0)
            given_up = (nearest < 0) | (walked == float("inf"))
            nearest = tl.maximum(nearest, 0)
            row = (nearest & 127) - 1
            column = (nearest >> 7) & 127
            rank = nearest >> 14
            # the list's last entry fills the place of the column that leaves it
            freed = tl.where(row < 0, rank - COLUMNS, COLUMNS - 1 - rank)
            left -= 1
            place = tl.where(place == left, freed, place)
            place = tl.where(o_c == column, -1, place)
            through = column + tl.zeros([COLUMNS], tl.int32)
            dual = tl.gather(row_dual, through, 0)
            given_up |= (row >= 0) & (left <= 0)
            searching = (row >= 0) & (not given_up)

        moved = tl.where(m_c & (place < 0), walked - distance, 0.0)
        column_dual -= moved
        row_dual += moved
        # from the free column back to the new row; a search of n steps has a path of at most n columns, and stepping
        # further stays at its first one
        on_path = o_c == through
        for _ in range(left + 1, columns):
            through = tl.gather(came_from, through, 0)
            on_path = on_path | (o_c == through)
        first = came_from == o_c
        row_of = tl.where(on_path, tl.where(first, start, tl.gather(row_of, came_from, 0)), row_of)
        row_dual = tl.where(on_path, tl.where(first, walked, tl.gather(row_dual, came_from, 0)), row_dual)
    return tl.where(given_up, -1, row_of)


# What is divisible by 16 makes no faster code here, only more of it to compile.
@triton.jit(do_not_specialize_on_alignment=["stride_batch", "stride_row", "stride_column", "rows", "columns"])
def linear_assignment_kernel(
    cost_ptr,
    out_ptr,
    stride_batch,
    stride_row,
    stride_column,
    rows,
    columns,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """cost [B, rows, columns], rows <= columns -> out [B, rows], or [B, columns] of the transposed problem."""
    i_b = tl.program_id(0).to(tl.int64)
    cost_ptr += i_b * stride_batch
    o_c = column_numbers(COLUMNS)
    m_c = o_c < columns
    # b_bad [ROWS_CHECKED_AT_ONCE, COLUMNS]; reading every cost at once also brings them near for the search
    p_column = cost_ptr + o_c[None, :].to(tl.int64) * stride_column
    b_bad = tl.zeros([ROWS_CHECKED_AT_ONCE, COLUMNS], tl.int32)
    for r in range(0, rows, ROWS_CHECKED_AT_ONCE):
        o_r = r + tl.arange(0, ROWS_CHECKED_AT_ONCE)[:, None]
        m_cost = (o_r < rows) & m_c[None, :]
        b_cost = tl.load(p_column + o_r.to(tl.int64) * stride_row, mask=m_cost, other=0.0).to(tl.float64)
        b_bad |= tl.where(tl.abs(b_cost) <= LARGEST_COST, 0, 1)  # NaN compares as false
    searched = tl.where(tl.max(tl.max(b_bad, 1), 0) > 0, 0, rows)

    row_of = shortest_augmenting_paths(cost_ptr, stride_row, stride_column, searched, columns, COLUMNS=COLUMNS)
    searched = tl.where(tl.max(row_of, 0) < 0, 0, searched)  # given up
    if TRANSPOSED:
        tl.store(out_ptr + i_b * columns + o_c, row_of.to(tl.int64), mask=m_c)
    else:
        p_out = out_ptr + i_b * rows
        tl.store(p_out + row_of, o_c.to(tl.int64), mask=row_of >= 0)
        tl.store(p_out + o_c, tl.full([COLUMNS], -1, tl.int64), mask=(o_c >= searched) & (o_c < rows))


def linear_assignment(cost: torch.Tensor) -> torch.Tensor:
    """cost [B, R, C] floating, R and C at most 64, any strides -> columns [B, R] int64; -1 in a row without one."""
    batch, rows, columns = cost.shape
    out = cost.new_empty((batch, rows), dtype=torch.int64)
    strides = cost.stride()
    transposed = rows > columns
    if transposed:
        rows, columns, strides = columns, rows, (strides[0], strides[2], strides[1])
    launch.launch(
        linear_assignment_kernel,
        (batch if columns else 0,),
        cost.detach(),
        out,
        *strides,
        rows,
        columns,
        TRANSPOSED=transposed,
        COLUMNS=launch.power_of_2(columns, 8),
        num_warps=1,
        num_stages=1,
    )
    return out
