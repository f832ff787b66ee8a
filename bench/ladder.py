"""From the reference step to the whole stack, one technique a row: speed, memory, and what the results differ by.

    python bench/ladder.py [--stages 1 2] [--batch-size B] [--steps N] [--csv FILE] [--tiny] [--device cpu]
    python bench/ladder.py --table FILE.csv

Rows are cumulative, each in a fresh process. Its first step is compared with the reference step in float64 on the same
weights, images and draws: a row whose loss or gradients are further off than they may be has no speed. On a CPU the
processes then take turns, step by step, so that a change of load meets all of them; on a GPU they follow one another.
A step is one batch with what it takes to get it. Memory is the process's peak over the timed steps: resident on a CPU,
allocated on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.kernel_clock import measure_ceilings
from harness.ladder_row import Job, Process, RowEnded, Technique
from harness.machine import commit, cores, cpu_name
from harness.step_runs import settings, write_teacher
from harness.targets import target_file

from spot_fast.files import atomic_write
from spot_fast.precision import cpu_has_bfloat16
from spot_kernels import dispatch

REFERENCE = Technique("reference: plain float32, three encoder passes in stage 2", reference=True)
# What a step does without, once everything that can be is cached, in the order in which rows add it; the name of each.
LESS_WORK = {
    "flat_parameters": "+ weights, gradients and moments in flat buffers",
    "input_path": "+ the decoder's input in the run's precision",
    "folded_cross_attention": "+ folded cross-attention",
    "joined_projections": "+ joined projections",
    "order_layout": "+ tokens in the patch order",
    "residual_norm": "+ residual and LayerNorm in one kernel",
    "linear_relu": "+ bias and ReLU in the product",
}
# Those of them that change nothing on a CPU.
_ON_A_GPU = ("order_layout", "residual_norm", "linear_relu")
_CACHED = Technique("+ frozen features cached", cached=True)


def techniques(device: torch.device) -> list[Technique]:
    """The rows: products in bfloat16, where the device multiplies it, from the third one on."""
    named = [*(name for name in LESS_WORK if name in dispatch.TECHNIQUES), *(dispatch.TECHNIQUES.keys() - LESS_WORK)]
    precision = "bf16" if device.type != "cpu" or cpu_has_bfloat16() else "float32"
    rows = [
        REFERENCE,
        Technique("+ our modules and operators, nothing computed twice", without=tuple(named)),
        Technique("+ bfloat16 products, float32 weights", precision="bf16", without=tuple(named)),
        replace(_CACHED, precision=precision, without=tuple(named)),
    ]
    for number, name in enumerate(named, 1):
        title = LESS_WORK.get(name, f"+ {name.replace('_', ' ')}")
        rows.append(replace(rows[-1], name=title, without=tuple(named[number:]), adds=name))
    last = replace(rows[-1], adds="")
    return [
        *rows,
        replace(last, name="+ torch.compile", changes={"compile": "yes"}),
        replace(last, name="+ the whole step as a CUDA graph", changes={"compile": "yes", "cuda_graph": "yes"}),
    ]


COCO_BATCH, COCO_STEPS = 64, 50 * (118_287 // 64)
# A row may be this many times as far from float64 as plain PyTorch of its precision, and as far as this in any case:
# rounding of a loss; in float32 gradients a ReLU input next to zero that falls on the other side.
ROOM = 3.0
_LOSS = {"float32": 1e-6, "bf16": 4e-3}
_GRADIENTS = {"float32": 1e-3, "bf16": 0.0}
SPEED = "product_flops_per_s"
_AT_ONCE = 4  # processes on a CPU, besides the reference


@dataclass(frozen=True)
class Row:
    """A line of the table and of the CSV. Errors are relative; None where the row did not run or has no speed.

    gflop: billions of operations of the products that its step needs.
    """

    stage: int
    technique: str
    batch_size: int
    ms: float | None = None
    images_s: float | None = None
    times: float | None = None
    gflop: float | None = None
    peak_mib: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    loss_limit: float | None = None
    gradient_limit: float | None = None
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ran, and wrongly."""
        return bool(self.problem) and not self.problem.startswith("skipped")


def limits(plain: dict[str, tuple[float, float]], precision: str) -> tuple[float, float]:
    """The largest relative errors of loss and gradients; plain: those of PyTorch alone, by precision."""
    loss, gradients = plain[precision]
    return max(ROOM * loss, _LOSS[precision]), max(ROOM * gradients, _GRADIENTS[precision])


def verdict(row: Row) -> Row:
    """The row with a problem where it is further off than it may be."""
    wrong = [
        f"{what} off by {error:.1e}, allowed {limit:.1e}"
        for what, error, limit in (
            ("loss", row.loss_error, row.loss_limit),
            ("gradients", row.gradient_error, row.gradient_limit),
        )
        if not error <= limit
    ]  # NaN is wrong as well
    return replace(row, problem="; ".join(wrong))


def reason_to_skip(technique: Technique, device: torch.device) -> str:
    """Why the row is not run on this device; empty if it is."""
    if technique.adds in _ON_A_GPU and device.type == "cpu":
        return "skipped: it changes nothing on a CPU"
    if technique.precision == "bf16" and device.type == "cpu" and not cpu_has_bfloat16():
        return "skipped: this processor does not multiply bfloat16, so all rows are float32"
    if technique.changes.get("cuda_graph") == "yes" and device.type == "cpu":
        return "skipped: there is no GPU to record on"
    if technique.changes.get("compile") == "yes" and device.type == "cpu":
        return "skipped: on a CPU compiling takes a minute or more and the step is no faster"
    return ""


def measure(
    stage: int,
    batch_size: int,
    steps: int,
    device: torch.device,
    *,
    tiny: bool,
    techniques: Sequence[Technique],
) -> list[Row]:
    """The rows of one stage, of `steps` timed steps each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(stage, precision="float32", batch_size=batch_size, tiny=tiny)
        teacher = write_teacher(folder / "teacher", config) if stage == 2 else None
        job = Job(stage, batch_size, str(device), tiny, str(teacher or ""), str(folder))
        _say(f"stage {stage}: the reference step in float64")
        with Process(job, None) as exact:
            about = exact.read()
        if "error" in about:
            return [Row(stage, one.name, batch_size, problem=about["error"]) for one in techniques]
        gflop = {cached: batch_size * about["flops"][str(cached)] / 1e9 for cached in (False, True)}
        rows = {
            one.name: Row(stage, one.name, batch_size, gflop=gflop[one.cached], problem=reason_to_skip(one, device))
            for one in techniques
        }
        runnable = [one for one in techniques if not rows[one.name].problem]
        times: dict[str, list[float]] = {}
        ratios: dict[str, float] = {}
        for group in groups(runnable, device):
            found = _group(job, group, rows, about["plain"], steps)
            reference = found.get(REFERENCE.name) or times.get(REFERENCE.name)
            for name, seconds in found.items():
                if reference is not None:
                    ratios.setdefault(name, median(a / b for a, b in zip(reference, seconds, strict=True)))
            times = found | times
    return with_speeds(list(rows.values()), times, ratios)


def groups(runnable: Sequence[Technique], device: torch.device) -> list[list[Technique]]:
    """The rows whose processes run at the same time: one on a GPU; on a CPU as many as the memory of a desktop holds,
    each group with the reference."""
    if device.type != "cpu":
        return [[one] for one in runnable]
    first, others = [one for one in runnable if one.reference], [one for one in runnable if not one.reference]
    return [first + others[i : i + _AT_ONCE] for i in range(0, len(others), _AT_ONCE)] or [first]


def _group(
    job: Job, group: Sequence[Technique], rows: dict[str, Row], plain: dict[str, tuple[float, float]], steps: int
) -> dict[str, list[float]]:
    """Checks all of the group, whose rows it completes, then has them take turns: seconds of each one's steps."""
    with ExitStack() as stack:
        running = {}
        for technique in group:
            name = technique.name
            _say(f"stage {job.stage}: {name}")
            process = stack.enter_context(Process(job, technique))
            found = process.read()
            if "error" in found:
                rows[name] = replace(rows[name], problem=found["error"])
                continue
            loss, gradients = limits(plain, technique.precision)
            rows[name] = verdict(
                replace(
                    rows[name],
                    loss_error=found["loss_error"],
                    loss_limit=loss,
                    gradient_error=found["gradient_error"],
                    gradient_limit=gradients,
                )
            )
            if rows[name].problem:
                process.close()
            else:
                running[name] = process
        _say(f"stage {job.stage}: {steps} steps of each, in turns" if len(group) > 1 else f"  {steps} steps")
        times: dict[str, list[float]] = {name: [] for name in running}
        for number in range(steps + 2):
            for name, process in list(running.items()):
                try:
                    if number <= steps:
                        times[name].append(process.step())
                    else:
                        rows[name] = replace(rows[name], peak_mib=process.end())
                except RowEnded as error:
                    rows[name] = replace(rows[name], problem=str(error))
                    del running[name], times[name]
    return {name: seconds[1:] for name, seconds in times.items()}  # the first one warms up


def with_speeds(rows: Sequence[Row], times: dict[str, list[float]], ratios: dict[str, float]) -> list[Row]:
    """Rows with the medians of `times`, seconds by technique; ratios: of the reference's steps to the row's."""
    found = []
    for row in rows:
        seconds = times.get(row.technique)
        if seconds and not row.problem:
            once = median(seconds)
            row = replace(row, ms=1e3 * once, images_s=row.batch_size / once, times=ratios.get(row.technique))
        found.append(row)
    return found


# ---- text


def table(rows: Sequence[Row], flops_per_s: float) -> str:
    """Markdown, a table a stage; what did not run or was wrong below. flops_per_s: of the products, makes the floor."""
    parts = []
    for stage in sorted({row.stage for row in rows}):
        titles = (
            f"stage {stage}",
            "images/s",
            "ms/step",
            "× reference",
            "% of floor",
            "peak MiB",
            "loss error",
            "gradients' error",
        )
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        of_stage = [row for row in rows if row.stage == stage]
        for row in of_stage:
            speed = ["FAILED" if row.failed else "–"] + ["–"] * 4
            if row.ms is not None:
                floor_ms = 1e12 * row.gflop / flops_per_s
                speed = [
                    f"{row.images_s:,.{2 if row.images_s < 10 else 1}f}",
                    f"{row.ms:,.{row.ms < 100:d}f}",
                    _text(row.times, ".2f"),
                    f"{100 * floor_ms / row.ms:.1f}",
                    _text(row.peak_mib, ",.0f"),
                ]
            errors = [_text(row.loss_error, ".1e"), _text(row.gradient_error, ".1e")]
            lines.append("| " + " | ".join([row.technique, *speed, *errors]) + " |")
        lines += [f"\n{row.technique}: {row.problem}" for row in of_stage if row.problem]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def about_machine(device: torch.device, flops_per_s: float) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "date": f"{date.today()}",
        "device": name,
        "cpu": cpu_name(),
        "cores": str(cores()),
        "torch": torch.__version__,
        "commit": commit(),
        SPEED: f"{flops_per_s:.4g}",
    }


def report(rows: Sequence[Row], about: dict[str, str]) -> str:
    """The tables, and what they were measured on."""
    parts = (table(rows, _speed(about)), footer(about, rows[0].batch_size), projection(rows))
    return "\n\n".join(filter(None, parts))


def _speed(about: dict[str, str]) -> float:
    """FLOPs a second; earlier files name the precision."""
    return float(about.get(SPEED) or about["bfloat16_flops_per_s"])


def projection(rows: Sequence[Row]) -> str:
    """What both stages on COCO would take at the speed of the fastest rows; empty where they are of another batch."""
    fastest = {
        row.stage: row
        for row in sorted(rows, key=lambda row: -(row.ms or 0))
        if row.ms is not None and row.batch_size == COCO_BATCH
    }
    if fastest.keys() != {1, 2}:
        return ""
    minutes = [COCO_STEPS * fastest[stage].ms / 60e3 for stage in (1, 2)]
    return (
        f"COCO, {COCO_STEPS:,} steps of {COCO_BATCH} a stage, at the fastest rows' speed: {minutes[0]:.1f} + "
        f"{minutes[1]:.1f} = {sum(minutes):.1f} minutes. A projection: filling the caches, validation and saving "
        "are not in it."
    )


def footer(about: dict[str, str], batch_size: int) -> str:
    where = about["device"] if about["device"] != "cpu" else f"{about['cpu']}, {about['cores']} cores"
    speed = _speed(about) / 1e12
    return (
        f"Batch {batch_size}; medians on {where}, torch {about['torch']}, {about['date']}. % of floor: the time "
        f"that the products a step needs would take at the {speed:.3g} TFLOP/s of a large product in the fastest "
        "precision (measured there), by the step's time. Errors: relative to the reference step in float64, gradients' "
        "as the norm of their difference."
    )


def write_csv(path: Path, rows: Sequence[object], about: dict[str, str]) -> None:
    """A line for each of `rows`, dataclasses of one kind, after what `about` says of all."""

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            names = [*about, *(field.name for field in fields(rows[0]))]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
                writer.writerow(about | values)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """What `write_csv` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = {"stage": int, "batch_size": int, "technique": str, "problem": str}
    names = [field.name for field in fields(Row)]
    rows = [
        Row(**{name: kinds.get(name, float)(line[name]) if line[name] or name == "problem" else None for name in names})
        for line in lines
    ]
    return rows, {name: value for name, value in lines[0].items() if name not in names}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--batch-size", type=int, metavar="B", help="images a step (default: 8 on a CPU, 64 on a GPU)")
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps a row (default: 5 on a CPU, 30 on a GPU)")
    parser.add_argument("--csv", type=target_file, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, measure nothing")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.table is not None:
        print(report(*read_csv(args.table)))
        return 0
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    batch_size, steps = args.batch_size or (64 if gpu else 8), args.steps or (30 if gpu else 5)
    rows, fastest = [], 0.0
    for stage in args.stages:
        fastest = max(fastest, *measure_ceilings(device).flops.values())
        rows += measure(stage, batch_size, steps, device, tiny=args.tiny, techniques=techniques(device))
        # Again: something else may have been running before.
        fastest = max(fastest, *measure_ceilings(device).flops.values())
        about = about_machine(device, fastest)
        if args.csv is not None:
            write_csv(args.csv, rows, about)
    print(report(rows, about))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
