"""What the native library gains on the CPU: every operator it has, against what runs without it.

    python bench/native_table.py [--threads 1 2] [--rounds 15] [--only TEXT] [--cpu-time] [--csv FILE]

Prints a Markdown table: medians of interleaved calls in ms, their ratio, and the largest error of either against
float64 (updates or gradients, as a part of the largest value; integers: how many differ). The library keeps what is at
least 1.3 times as fast; `slot_attention_wins` says whether a shape is among that.
"""

from __future__ import annotations

import argparse
import csv
import functools
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

from spot_kernels import (
    native,
    slot_attention_step,  # noqa: F401  (registers the operator)
)
from spot_kernels.reference import mask_matching as plain_matching
from spot_kernels.reference.mask_labels import mask_labels as plain_labels
from spot_kernels.reference.slot_attention import slot_attention_step as plain_attention

EPS = 1e-8
# [B, H, N, K, d]
ATTENTION = {
    "SPOT": (64, 1, 196, 7, 256),
    "COCO high resolution": (16, 1, 1024, 7, 256),
    "MOVi-C": (64, 1, 196, 11, 256),
    "sixteen slots": (64, 1, 196, 16, 256),
    "MOVi-E": (64, 1, 196, 24, 256),
    "image level": (8, 1, 16384, 11, 64),
    "four heads": (64, 4, 196, 7, 64),
    "scenes": (32, 1, 64, 7, 128),
    "more slots": (32, 1, 196, 33, 256),
}


@dataclass
class Row:
    operator: str
    shape: str
    dtype: str
    threads: int
    ours_ms: float
    plain_ms: float
    ratio: float
    ours_error: float
    plain_error: float
    chosen: bool


@dataclass
class Case:
    """Two ways to the same tensors; `exact` are those in float64, `chosen` whether dispatch takes the library."""

    operator: str
    shape: str
    dtype: str
    ours: Callable[[], tuple[torch.Tensor, ...]]
    plain: Callable[[], tuple[torch.Tensor, ...]]
    exact: tuple[torch.Tensor, ...]
    chosen: bool = True


def attention_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, (batch, heads, tokens, slots, width) in ATTENTION.items():
            generator = torch.Generator().manual_seed(0)
            sizes = (slots, width), (tokens, width), (tokens, width), (slots, width)
            q, k, v, grad = (torch.randn(batch, heads, *size, generator=generator).to(dtype) for size in sizes)
            q, k, v = ((x * scale).requires_grad_() for x, scale in ((q, width**-0.5), (k, 1), (v, 1)))

            def ours(q=q, k=k, v=v):
                return torch.ops.spot_kernels.slot_attention_step(q, k, v, EPS, False, False, "native")[:1]

            def plain(q=q, k=k, v=v):
                return plain_attention(q, k, v, EPS)[:1]

            def backward(forward, q=q, k=k, v=v, grad=grad):
                return torch.autograd.grad(forward(), (q, k, v), grad)

            wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
            updates = plain_attention(*wide, EPS)[0]
            gradients = torch.autograd.grad(updates, wide, grad.double())
            shape = f"{name} ({batch}, {heads}, {tokens}, {slots}, {width})"
            chosen = native.slot_attention_wins(q, k)
            label = str(dtype).removeprefix("torch.")
            forwards = [torch.no_grad()(run) for run in (ours, plain)]
            both = [functools.partial(backward, run) for run in (ours, plain)]
            yield Case("slot attention, forward", shape, label, *forwards, (updates.detach(),), chosen)
            yield Case("slot attention, forward + backward", shape, label, *both, gradients, chosen)


def matching_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for size in (7, 24):
        cost = torch.rand(64, size, size, generator=generator)
        calls = [lambda f=f, x=cost: (f(x),) for f in (native.linear_assignment, plain_matching.linear_assignment)]
        chosen = native.linear_assignment_wins(cost)
        yield Case("linear assignment", f"64 × {size} × {size}", "float32", *calls, calls[1](), chosen)
    for batch, tokens in ((64, 196), (32, 320 * 320)):
        a, b = (torch.randint(7, (batch, tokens), generator=generator) for _ in range(2))
        calls = [lambda f=f, a=a, b=b: (f(a, b, 7, 7),) for f in (native.overlap_counts, plain_matching.overlap_counts)]
        yield Case("overlap counts", f"{batch} × {tokens}, 7 × 7 labels", "int64", *calls, calls[1]())
    for grid, slots, size in ((14, 7, 320), (16, 7, 320), (14, 24, 128)):
        masks = (3 * torch.randn(32, grid * grid, slots, generator=generator)).softmax(-1)
        calls = [lambda f=f, m=masks, s=size: (f(m, s),) for f in (native.mask_labels, plain_labels)]
        yield Case("mask labels", f"32 × {grid * grid}, {slots} masks, {size} × {size}", "float32", *calls, calls[1]())


def error(computed: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    if not exact[0].is_floating_point():
        return float(sum((a != b).sum().item() for a, b in zip(computed, exact, strict=True)))
    return max(
        ((a.detach().double() - b).abs().max() / b.abs().max()).item() for a, b in zip(computed, exact, strict=True)
    )


def medians(calls: list[Callable], rounds: int, clock: Callable[[], float]) -> list[float]:
    """ms of each call, called in turn: what slows the machine down slows down all of them."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append(1e3 * (clock() - start))
    return [statistics.median(taken) for taken in times]


def measure(case: Case, threads: int, rounds: int, clock: Callable[[], float]) -> Row:
    torch.set_num_threads(threads)
    errors = [error(call(), case.exact) for call in (case.ours, case.plain)]
    ours, plain = medians([case.ours, case.plain], rounds, clock)
    return Row(
        case.operator,
        case.shape,
        case.dtype,
        threads,
        round(ours, 3),
        round(plain, 3),
        round(plain / ours, 2),
        *errors,
        case.chosen,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores())}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose operator, shape or dtype contains this")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process: one thread on a busy machine")
    parser.add_argument("--csv", type=target_file, help="where to write the rows as well")
    args = parser.parse_args()
    if not native.available():
        print(native.describe(), file=sys.stderr)
        return 2
    clock = time.process_time if args.cpu_time else time.perf_counter
    levels = ", ".join(native.slot_attention_levels())
    print(f"{cpu_name()}, {cores()} cores, {levels}; torch {torch.__version__}; commit {commit()}\n")
    print("| operator | shape | dtype | threads | ours ms | PyTorch ms | ratio | error | PyTorch's | chosen |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for cases in (attention_cases, matching_cases):
        for case in cases():
            if args.only not in f"{case.operator} {case.shape} {case.dtype}":
                continue
            for threads in args.threads:
                row = measure(case, threads, args.rounds, clock)
                rows.append(row)
                print(
                    f"| {row.operator} | {row.shape} | {row.dtype} | {row.threads} | {row.ours_ms:.3f} | "
                    f"{row.plain_ms:.3f} | {row.ratio:.2f} | {row.ours_error:.1e} | {row.plain_error:.1e} | "
                    f"{'yes' if row.chosen else 'no'} |",
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
