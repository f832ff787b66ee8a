"""Optimal one-to-one assignment of each problem of a batch: `linear_assignment`, and the interface of a known package.

On a GPU one program solves one problem, up to 1024 × 1024, without waiting for the device. On the CPU the native
library runs on all threads, or scipy where it was not built. All of them are exact and search in the same order, so
they also agree where several assignments are optimal. On a GPU, larger problems and backend torch copy the cost to the
host and the result back, which waits for the device.

`batch_linear_assignment` and `assignment_to_indices` have the signatures of the package torch-linear-assignment
(ivan-chai/torch-linear-assignment, 0.1.0): `from spot_kernels import …` takes the place of its import.

Assignments are integers: no gradients flow through these operators.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch, native
from spot_kernels.reference import linear_assignment as reference

# Limit of the kernel, which packs the numbers of a row and of a column beside a rank into 32 bits.
LARGEST_SIDE = 1024


def empty_assignment(cost: torch.Tensor) -> torch.Tensor:
    """The column of each row [B, R]."""
    return cost.new_empty(cost.shape[:2], dtype=torch.int64)


@torch.library.custom_op("spot_kernels::linear_assignment", mutates_args=())
def _linear_assignment(cost: torch.Tensor, num_columns: torch.Tensor | None, backend: str) -> torch.Tensor:
    if backend == "triton":
        from spot_kernels.gpu import linear_assignment as kernels

        assignment = empty_assignment(cost)
        kernels.linear_assignment(cost, num_columns, assignment)
        return assignment
    return assign(cost, num_columns, backend)


@_linear_assignment.register_fake
def _(cost, num_columns, backend):
    return empty_assignment(cost)


def linear_assignment(cost: torch.Tensor, num_columns: torch.Tensor | None = None) -> torch.Tensor:
    """One-to-one assignment of rows to columns with the least total cost, for each problem of a batch.

    Exact, in double precision. Where several assignments are optimal the result still depends on the costs alone: rows
    are added in order, each by a shortest augmenting path that, at equal distance, ends at a free column rather than
    pass through a taken one, and at the free column of lowest index if it has passed through none (a constant cost
    gives row i column i). `csrc/linear_assignment.cpp` states the rule in full; scipy's is the same.

    Args:
        cost: [B, R, C], floating point, finite. Gradients do not flow.
        num_columns: integers [B] from 0 to C, on the cost's device: problem b has the first num_columns[b] columns. The
            rest is padding, which no row gets and whose values may be anything. None: every problem has C.

    Returns:
        columns [B, R] int64, on the cost's device: the column of each row, -1 for rows without one, of which there are
        R - C (R - num_columns[b]) if that is positive.

    Raises:
        ValueError: naming what is wrong with an argument: shape, dtype or device, NaN, infinity, values so large that
            their sums might overflow (beyond ±1e300), or a number of columns out of range. On a GPU the kernel does not
            raise: all rows of a problem with such a cost get -1, the other problems are not affected, and a number
            below 0 counts as 0, one above C as C. It ends in R × C steps, whatever the costs.
    """
    checks.floating("linear_assignment", cost=cost)
    checks.shape("linear_assignment", "cost", cost, "[B, R, C]")
    if num_columns is not None:
        num_columns = _checked_counts(num_columns, cost)
    limit = ""
    if max(cost.shape[1:]) > LARGEST_SIDE:
        limit = f"cost {tuple(cost.shape)} has more than {LARGEST_SIDE} rows or columns"
    backend = dispatch.choose("linear_assignment", cost, limit)
    # detached: torch.func would differentiate the operator, which has no rule for it
    return _linear_assignment(cost.detach(), num_columns, backend)


def batch_linear_assignment(cost: torch.Tensor) -> torch.Tensor:
    """`linear_assignment` in the interface of torch-linear-assignment: the task of each worker at the least total cost.

    Differs from the package in three points: integer costs are computed in float64, which holds them to 2^53, not in
    float32; on a GPU nothing waits for the device; and +infinity does not forbid a pair, but is refused as any other
    cost that is not finite. Forbid by a large cost, such as 1e9.

    Args:
        cost: [B, W, T], floating point, integer or bool.

    Returns:
        assignment [B, W] int64: the task of each worker, -1 for a worker without one.

    Raises:
        ValueError: as `linear_assignment`.
    """
    exact = cost if cost.is_floating_point() or cost.is_complex() else cost.double()
    return linear_assignment(exact)


def assignment_to_indices(assignment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An assignment as pairs of indices, as scipy.optimize.linear_sum_assignment returns them. Waits for the device.

    Args:
        assignment: [B, W] integers, -1 for a worker without a task.

    Returns:
        row_ind, col_ind, both int64 [B, K]: the workers that have a task, in ascending order, and their tasks.

    Raises:
        ValueError: for another shape, or problems with different numbers of pairs, such as those of `num_columns`.
    """
    checks.shape("assignment_to_indices", "assignment", assignment, "[B, W]")
    assigned = assignment >= 0
    pairs = assigned.sum(1).tolist()
    if len(set(pairs)) > 1:
        raise ValueError(
            f"assignment_to_indices: assignment has {min(pairs)} to {max(pairs)} pairs a problem, "
            "which no [B, K] holds: pass one problem at a time"
        )
    rows = assigned.sort(dim=1, descending=True, stable=True).indices[:, : pairs[0] if pairs else 0]
    return rows, assignment.gather(1, rows).long()


def _checked_counts(num_columns: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """num_columns as int64 [B]; values are checked where they are read, since a GPU's would have to be waited for."""
    dtype, shape, device = num_columns.dtype, tuple(num_columns.shape), num_columns.device
    integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if not integer or shape != tuple(cost.shape[:1]) or device != cost.device:
        raise ValueError(
            f"linear_assignment: num_columns is {dtype} {shape} on {device}: "
            f"pass integers ({len(cost)},) on {cost.device}"
        )
    return num_columns.long()


def assign(cost: torch.Tensor, num_columns: torch.Tensor | None, backend: str) -> torch.Tensor:
    """columns [B, R] on the host, by the native library or scipy, copied back to the cost's device."""
    on_host = cost.cpu()
    if on_host.dtype != torch.float64:
        on_host = on_host.float()
    counts = None if num_columns is None else num_columns.cpu()
    if counts is not None and ((counts < 0) | (counts > cost.shape[2])).any():
        low, high = (int(bound) for bound in counts.aminmax())
        raise ValueError(f"num_columns is {low} to {high}, but cost has {cost.shape[2]} columns: pass 0 to that")
    solve = native.linear_assignment if backend == "native" else reference.linear_assignment
    try:
        return solve(on_host, counts).to(cost.device)
    except ValueError:
        good = ((on_host.double().abs() <= 1e300) | reference.padding(on_host, counts)).flatten(1).all(1)
        raise ValueError(
            f"cost[{good.int().argmin()}] holds NaN, infinity or a value beyond 1e300: forbid pairs by a smaller cost"
        ) from None
