"""The native library's operators on the CPU, against scipy and PyTorch, which run without it.

    python bench/native_table.py [--threads 1 2] [--rounds 15] [--only TEXT] [--cpu-time] [--csv FILE]

Prints a Markdown table: medians of interleaved calls in ms, their ratio, and how many of the integer results differ
(none should).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
from harness.machine import commit, cores, cpu_name
from harness.targets import target_file

from spot_kernels import native
from spot_kernels.reference import mask_matching as reference
from spot_kernels.reference.mask_labels import mask_labels


@dataclass
class Row:
    operator: str
    shape: str
    threads: int
    native_ms: float
    plain_ms: float
    ratio: float
    different: int


@dataclass
class Case:
    operator: str
    shape: str
    native: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    squares = ((64, size, size) for size in (7, 11, 24, 64))
    for batch, rows, columns in (*squares, (16, 300, 100), (16, 100, 300), (4, 1024, 256)):
        cost = torch.rand(batch, rows, columns, generator=generator)
        calls = [lambda f=f, x=cost: f(x) for f in (native.linear_assignment, reference.linear_assignment)]
        yield Case("linear assignment", f"{batch} × {rows} × {columns}", *calls)
    for batch, tokens in ((64, 196), (32, 320 * 320)):
        a, b = (torch.randint(7, (batch, tokens), generator=generator) for _ in range(2))
        calls = [lambda f=f, a=a, b=b: f(a, b, 7, 7) for f in (native.overlap_counts, reference.overlap_counts)]
        yield Case("overlap counts", f"{batch} × {tokens}, 7 × 7 labels", *calls)
    for grid, slots, size in ((14, 7, 320), (16, 7, 320), (14, 24, 128)):
        masks = (3 * torch.randn(32, grid * grid, slots, generator=generator)).softmax(-1)
        calls = [lambda f=f, m=masks, s=size: f(m, s) for f in (native.mask_labels, mask_labels)]
        yield Case("mask labels", f"32 × {grid * grid}, {slots} masks, {size} × {size}", *calls)


def medians(calls: list[Callable], rounds: int, clock: Callable[[], float]) -> list[float]:
    """ms of each call. Calls take turns, so that whatever slows the machine down slows all of them."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append(1e3 * (clock() - start))
    return [statistics.median(taken) for taken in times]


def measure(case: Case, threads: int, rounds: int, clock: Callable[[], float]) -> Row:
    torch.set_num_threads(threads)
    different = int((case.native() != case.plain()).sum())
    ours, plain = medians([case.native, case.plain], rounds, clock)
    return Row(case.operator, case.shape, threads, round(ours, 3), round(plain, 3), round(plain / ours, 2), different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores())}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose operator or shape contains this")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process: one thread on a busy machine")
    parser.add_argument("--csv", type=target_file, help="where to write the rows as well")
    args = parser.parse_args()
    if not native.available():
        print(native.describe(), file=sys.stderr)
        return 2
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{cpu_name()}, {cores()} cores; torch {torch.__version__}; commit {commit()}\n")
    print("| operator | shape | threads | native ms | scipy, PyTorch ms | ratio | different |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for case in cases():
        if args.only not in f"{case.operator} {case.shape}":
            continue
        for threads in args.threads:
            row = measure(case, threads, args.rounds, clock)
            rows.append(row)
            print(
                f"| {row.operator} | {row.shape} | {row.threads} | {row.native_ms:.3f} | {row.plain_ms:.3f} | "
                f"{row.ratio:.2f} | {row.different} |",
                flush=True,
            )
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        partial = args.csv.with_name(f".{args.csv.name}.tmp")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["machine", "torch", "commit", *(field.name for field in fields(Row))])
            writer.writeheader()
            where = {"machine": cpu_name(), "torch": torch.__version__, "commit": commit()}
            writer.writerows(where | asdict(row) for row in rows)
        partial.replace(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
