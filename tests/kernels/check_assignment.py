"""Solves problems of all sizes and kinds, and compares every one with scipy: exits with 1 if one differs.

    python tests/kernels/check_assignment.py 1000000                      the CPU's path, on one thread
    python tests/kernels/check_assignment.py 2000 --interpreter           the kernel, in Triton's interpreter
    python tests/kernels/check_assignment.py 100000 --device cuda         the kernel on a GPU

Sizes go from 1 × 1 to 1024 × 256 and 256 × 1024, most of them small; costs are float32 or float64. A quarter of the
batches have a number of columns for each problem, and NaN after them. For each size class it prints how many problems
were solved, how many columns differ from scipy's (both search in one order, so none should, however many assignments
are optimal), and the largest difference of a total cost in float64. A difference names its seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import spot_kernels


@dataclass(frozen=True)
class Size:
    """Sides of a class of problems, its share of all of them, and how many are drawn with one shape."""

    smallest: int
    larger: int
    smaller: int
    share: float
    batch: int


SIZES = (
    Size(1, 8, 8, 0.7, 250),
    Size(1, 24, 24, 0.25, 250),
    Size(9, 64, 64, 0.045, 50),
    Size(33, 300, 100, 0.0045, 10),
    Size(100, 1024, 256, 0.0005, 2),
)
KINDS = (
    "uniform",
    "normal",
    "integers",
    "few integers",
    "constant",
    "equal rows",
    "equal columns",
    "sums",
    "near ties",
    "huge",
    "tiny",
    "all ranges",
)


def draw(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Costs [B, R, C] float64 of a kind."""
    batch, rows, columns = shape

    def integers(low: int, high: int, *sides: int) -> torch.Tensor:
        return torch.randint(low, high, (batch, *(sides or shape[1:])), generator=generator).double()

    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {
        "uniform": lambda: uniform,
        "normal": lambda: torch.randn(shape, generator=generator, dtype=torch.float64),
        "integers": lambda: integers(-1000, 1000),
        "few integers": lambda: integers(-1, 2) / 3,
        "constant": lambda: integers(-3, 3, 1, 1).expand(shape) * 0.1,
        "equal rows": lambda: (integers(-9, 9, 1, columns) / 7).expand(shape),
        "equal columns": lambda: (integers(-9, 9, rows, 1) / 7).expand(shape),
        # every assignment of a square one has the same total, and the order of the additions decides
        "sums": lambda: integers(1, 8, rows, 1) / 10 + integers(1, 8, 1, columns) / 10,
        "near ties": lambda: 1 + integers(0, 4) * 2**-50,
        "huge": lambda: (uniform - 0.5) * 1e37,
        "tiny": lambda: (uniform - 0.5) * 1e-37,
        "all ranges": lambda: 10 ** integers(-30, 31) * integers(-1, 2),
    }[kind]()


def batches(problems: int, seed: int) -> Iterator[tuple[Size, str, torch.Tensor, torch.Tensor | None]]:
    """Size class, a description that repeats the draw, costs [B, R, C] and numbers of columns [B] or None.

    There are `problems` of them; the first batch of a class has its largest sides.
    """
    for size in SIZES:
        left, number = round(problems * size.share), 0
        while left > 0:
            generator = torch.Generator().manual_seed((seed << 32) + (SIZES.index(size) << 24) + number)
            smallest = (size.smallest, size.smallest) if number else (size.larger, size.smaller)
            small = int(torch.randint(min(smallest[1], size.smaller), size.smaller + 1, (), generator=generator))
            large = int(torch.randint(max(smallest[0], small), size.larger + 1, (), generator=generator))
            tall, single, *counted = (bool(flag) for flag in torch.randint(2, (4,), generator=generator))
            shape = (min(left, size.batch), *((large, small) if tall else (small, large)))
            kind = KINDS[number % len(KINDS)]
            cost, num_columns = draw(kind, shape, generator), None
            if all(counted):
                num_columns = torch.randint(shape[2] + 1, shape[:1], generator=generator)
                cost = cost.masked_fill(torch.arange(shape[2]) >= num_columns[:, None, None], float("nan"))
            name = f"{kind} {shape}{' counted' if all(counted) else ''}, number {number}"
            yield size, name, cost.float() if single else cost, num_columns
            left, number = left - shape[0], number + 1


def differences(cost: torch.Tensor, num_columns: torch.Tensor | None, columns: torch.Tensor) -> tuple[int, float]:
    """How many columns differ from scipy's, and the largest difference of a problem's total cost."""
    different, worst = 0, 0.0
    counts = [cost.shape[2]] * len(cost) if num_columns is None else num_columns.tolist()
    for problem, count, chosen in zip(cost.double().numpy(), counts, columns.numpy(), strict=True):
        row, column = linear_sum_assignment(problem[:, :count])
        best = np.full(len(problem), -1)
        best[row] = column
        different += int((chosen != best).sum())
        ours = np.flatnonzero(chosen >= 0)
        one_to_one = len(ours) == len(row) == len(np.unique(chosen[ours]))
        worst = max(
            worst, abs(problem[ours, chosen[ours]].sum() - problem[row, column].sum()) if one_to_one else np.inf
        )
    return different, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("problems", type=int)
    parser.add_argument("--interpreter", action="store_true", help="the kernel, in Triton's interpreter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.interpreter and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # read once, when Triton is imported
    torch.set_num_threads(1)
    begun, solved, bad = time.perf_counter(), {}, 0
    kernel = args.interpreter or args.device != "cpu"
    with spot_kernels.use_backend("triton" if kernel else "auto"):
        print(f"backend {spot_kernels.chosen_backend('linear_assignment', torch.empty(1, device=args.device))}")
        for size, description, cost, num_columns in batches(args.problems, args.seed):
            there = None if num_columns is None else num_columns.to(args.device)
            columns = spot_kernels.linear_assignment(cost.to(args.device), there).cpu()
            different, worst = differences(cost, num_columns, columns)
            if different or worst:
                bad += 1
                print(f"DIFFERENT: seed {args.seed}, {description}: {different} columns, total cost {worst:.3g}")
            count, columns_before, worst_before = solved.get(size, (0, 0, 0.0))
            solved[size] = (count + len(cost), columns_before + different, max(worst, worst_before))
    print("| larger side | smaller side | problems | columns that differ | largest difference of a total |")
    print("|---|---|---|---|---|")
    for size, (count, different, worst) in solved.items():
        sides = f"| {size.smallest} to {size.larger} | {size.smallest} to {size.smaller} "
        print(f"{sides}| {count:,} | {different} | {worst:g} |")
    total = sum(count for count, _, _ in solved.values())
    print(
        f"{total:,} problems in {time.perf_counter() - begun:.0f} s: {f'{bad} batches differ' if bad else 'all equal'}"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
