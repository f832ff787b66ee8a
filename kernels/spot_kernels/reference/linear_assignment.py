"""Optimal assignment by scipy: the tests' oracle, and the CPU's path where the native library was not built."""

from __future__ import annotations

import torch


def linear_assignment(cost: torch.Tensor, num_columns: torch.Tensor | None = None) -> torch.Tensor:
    """cost [B, R, C] float32 or float64, on the CPU -> [B, R] int64: the column of each row, -1 for a row without one.

    num_columns: int64 [B], the columns that each problem has. Raises ValueError for a cost among them that is not
    finite or beyond ±1e300, where sums of costs might overflow, ImportError without scipy.
    """
    try:  # here, because a copy from Hugging Face's hub cannot require them, and no other operator needs them
        import numpy as np
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        remedy = "pip install scipy"
        raise ImportError(f"linear_assignment on a CPU without the native library needs scipy: {remedy}") from None
    problems = cost.detach().double().numpy()
    if not ((np.abs(problems) <= 1e300) | padding(cost, num_columns).numpy()).all():
        raise ValueError("cost holds NaN, infinity or a value beyond 1e300")
    batch, rows, columns = cost.shape
    assignment = np.full((batch, rows), -1, dtype=np.int64)
    counts = [columns] * batch if num_columns is None else num_columns.tolist()
    for assigned, problem, count in zip(assignment, problems, counts, strict=True):
        row, column = linear_sum_assignment(problem[:, :count])
        assigned[row] = column
    return torch.from_numpy(assignment)


def padding(cost: torch.Tensor, num_columns: torch.Tensor | None) -> torch.Tensor:
    """bool [B, 1, C], or one False: the columns that are none of the problem's."""
    if num_columns is None:
        return torch.zeros((), dtype=torch.bool, device=cost.device)
    return (torch.arange(cost.shape[2], device=cost.device) >= num_columns[:, None])[:, None, :]
