"""Rows of the operators' benchmark, their table, their CSV, and the aims.

A row is one technique at one shape. Seconds and bytes in memory and in CSV; a technique whose numbers are wrong has no
time anywhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness.kernel_clock import Ceilings, Work

OURS, EAGER, COMPILE, SDPA, FLEX = "ours", "eager", "torch.compile", "SDPA", "FlexAttention"
FORWARD, BOTH = "forward", "both"
MODULE = "SlotAttention"


@dataclass(frozen=True)
class Row:
    """One technique at one shape.

    problem: empty; `FAILED: …` where a number is wrong or the operator raised; anything else is why a technique is not
    there. forward_s: seconds of a forward that keeps what backward needs; both_s: with backward, None without one;
    graph_s: both_s (or forward_s) in a replayed CUDA graph; not_captured: why there is none. Errors are the largest
    differences from float64, relative to the largest value.
    """

    operator: str
    shape: str
    dtype: str
    technique: str
    backend: str = ""
    forward_s: float | None = None
    both_s: float | None = None
    graph_s: float | None = None
    forward_bytes: float = 0.0
    forward_flops: float = 0.0
    both_bytes: float = 0.0
    both_flops: float = 0.0
    peak_bytes: float | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    problem: str = ""
    not_captured: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operator, self.shape, self.dtype

    @property
    def failed(self) -> bool:
        return self.problem.startswith("FAILED")

    def seconds(self, which: str = BOTH) -> float | None:
        """Forward and backward, or the forward where that is asked for or there is no backward."""
        return self.forward_s if which == FORWARD or self.both_s is None else self.both_s

    def work(self, which: str) -> Work:
        if which == FORWARD:
            return Work(self.forward_bytes, self.forward_flops)
        return Work(self.both_bytes, self.both_flops)


# ---- table


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "–"
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        # 0.9995 ms would read 1e+03 µs
        if seconds < 999.5 * size or unit == "ms" and seconds < 0.9995:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds)} s"


def rate(work: Work, seconds: float | None, ceilings: Ceilings | None, dtype: str) -> str:
    """GB/s or TFLOP/s, whichever limits, with the percentage of the machine's ceiling."""
    if seconds is None or ceilings is None:
        return "–"
    floor, side = ceilings.floor(work, dtype)
    amount, unit = (work.bytes / 1e9, "GB/s") if side == "bytes" else (work.flops / 1e12, "TF/s")
    return f"{_three(amount / seconds)} {unit} {100 * floor / seconds:.0f} %"


def table(rows: Sequence[Row], ceilings: Ceilings | None) -> str:
    """All rows as aligned text, a block for each operator, in the order in which operators and shapes were measured."""
    first = {row.operator: i for i, row in reversed(list(enumerate(rows)))}
    rows = sorted(rows, key=lambda row: first[row.operator])
    titles = (
        "shape",
        "dtype",
        "technique",
        "forward",
        "fwd+bwd",
        "in a graph",
        "time ÷ ours: fwd, both",
        "forward at",
        "fwd+bwd at",
        "peak MiB",
        "error",
        "gradients'",
    )
    ours = {row.key: row for row in rows if row.technique == OURS}
    lines: list[tuple[str, ...]] = []
    previous = None
    for row in rows:
        if previous is None or row.operator != previous.operator:
            lines += [(), (row.operator,), titles]
        fresh = previous is None or row.key != previous.key
        where = (row.shape, row.dtype) if fresh else ("", "")
        lines.append((*where, *_cells(row, ours.get(row.key), ceilings)))
        previous = row
    wide = [line for line in lines if len(line) == len(titles)]
    widths = [max((len(line[i]) for line in wide), default=0) for i in range(len(titles))]
    text = ["  ".join(_align(cell, widths[i], i) for i, cell in enumerate(line)).rstrip() for line in lines]
    return "\n".join(text).strip("\n")


def _cells(row: Row, ours: Row | None, ceilings: Ceilings | None) -> tuple[str, ...]:
    technique = f"{row.technique} ({row.backend})" if row.backend else row.technique
    if row.failed:
        return (technique, "FAILED", "FAILED", *[""] * 7)
    if row.problem:
        return (technique, "–", "–", *[""] * 7)
    ratios = [_ratio(row.seconds(which), ours and ours.seconds(which)) for which in (FORWARD, BOTH)]
    return (
        technique,
        duration(row.forward_s),
        duration(row.both_s),
        duration(row.graph_s),
        ", ".join(ratios if row.both_s is not None else ratios[:1]),
        rate(row.work(FORWARD), row.forward_s, ceilings, row.dtype),
        rate(row.work(BOTH), row.both_s, ceilings, row.dtype),
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        "–" if row.output_error is None else f"{row.output_error:.1e}",
        "–" if row.gradient_error is None else f"{row.gradient_error:.1e}",
    )


def problems(rows: Iterable[Row]) -> str:
    """A line for each technique without a time, in a graph or at all: where, and why."""
    reasons = ((row, row.problem or (f"no graph: {row.not_captured}" if row.not_captured else "")) for row in rows)
    return "\n".join(f"{' · '.join(row.key)} · {row.technique}: {why}" for row, why in reasons if why)


def _ratio(seconds: float | None, ours: float | None) -> str:
    return "–" if not seconds or not ours else f"{seconds / ours:.2f}"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


# ---- aims


@dataclass(frozen=True)
class Aim:
    """`factor` times faster than `than` at the shapes that begin with `shape`; or, without `than`, within `limit_s`."""

    text: str
    operator: str
    shape: str
    dtype: str
    than: str = ""
    factor: float = 1.0
    limit_s: float = 0.0

    def concerns(self, operator: str, shape: str, dtype: str) -> bool:
        return (operator, dtype) == (self.operator, self.dtype) and shape.startswith(self.shape)


AIMS = (
    Aim("slot attention at SPOT, ≥ 3 × torch.compile", "slot_attention_step", "SPOT 64", "bfloat16", COMPILE, 3.0),
    Aim(
        "slot attention at image level, ≥ 1.5 × torch.compile",
        "slot_attention_step",
        "image-level",
        "bfloat16",
        COMPILE,
        1.5,
    ),
    Aim("whole slot-attention module, ≥ 2 × torch.compile", MODULE, "SPOT 64", "bf16 autocast", COMPILE, 2.0),
    Aim(
        "permuted attention no slower than gather + SDPA + scatter",
        "permuted_causal_attention",
        "decoder",
        "bfloat16",
        SDPA,
        1.0,
    ),
    Aim("permuted attention, ≥ 1.5 × FlexAttention", "permuted_causal_attention", "decoder", "bfloat16", FLEX, 1.5),
    Aim("64 assignments 7×7 in 20 µs", "linear_assignment", "64 of 7×7", "float32", limit_s=20e-6),
)
NATIVE_FACTOR = 1.3


def judge(aim: Aim, rows: Sequence[Row]) -> tuple[bool | None, str]:
    """Whether the aim is met (None: not measured), forward + backward where there is one, and the numbers."""
    found = [row for row in rows if aim.concerns(*row.key)]
    by = {row.technique: row.seconds() for row in found}
    ours, other = by.get(OURS), by.get(aim.than)
    if ours is None or aim.than and other is None:
        wrong = any(row.failed for row in found if row.technique == OURS)
        return (False, "ours FAILED") if wrong else (None, "not measured")
    if not aim.than:
        return ours <= aim.limit_s, duration(ours)
    return other >= aim.factor * ours, f"{other / ours:.2f} × ({duration(ours)}, {aim.than} {duration(other)})"


def native_aims(rows: Sequence[Row]) -> list[tuple[bool | None, str, str]]:
    """For each operator with a native path: is it 1.3 times faster than eager PyTorch at every shape and dtype?"""
    eager = {row.key: row.seconds() for row in rows if row.technique == EAGER}
    gains: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        # a module is mostly products that are PyTorch's own
        if row.technique == OURS and row.backend == "native" and row.operator != MODULE:
            ours, other = row.seconds(), eager.get(row.key)
            gain = 0.0 if row.failed else other / ours if ours and other else float("nan")
            gains.setdefault(row.operator, []).append((gain, f"{row.shape} {row.dtype}"))
    found = []
    for operator, values in gains.items():
        known = [value for value in values if value[0] == value[0]]
        worst, where = min(known, default=(float("nan"), "not measured"))
        passed = worst >= NATIVE_FACTOR if known else None
        text = f"{operator}, native, ≥ {NATIVE_FACTOR} × eager at every shape"
        found.append((passed, text, f"least {worst:.2f} × ({where})"))
    return found


def aims_text(rows: Sequence[Row], gpu: bool) -> str:
    """PASS, FAIL or ???? for each aim of the machine's kind."""
    judged = [(*judge(aim, rows), aim.text) for aim in AIMS] if gpu else []
    lines = [(passed, text, detail) for passed, detail, text in judged] or native_aims(rows)
    word = {True: "PASS", False: "FAIL", None: "????"}
    return "\n".join(f"{word[passed]}  {text}: {detail}" for passed, text, detail in lines)


# ---- CSV

ABOUT = (
    "date",
    "device",
    "cpu",
    "cores",
    "torch",
    "triton",
    "commit",
    "copy_bytes_per_s",
    "float32_flops_per_s",
    "bfloat16_flops_per_s",
)
_FIELDS = tuple(field.name for field in fields(Row))
_TEXTS = ("operator", "shape", "dtype", "technique", "backend", "problem", "not_captured")
_LATER = ("not_captured",)  # columns that older files lack


def write_csv(path: Path, about: dict[str, str], rows: Sequence[Row]) -> None:
    """One line for each row, the machine in its first columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, (*ABOUT, *_FIELDS), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {name: "" if value is None else value for name, value in asdict(row).items()}
            numbers = {name: f"{value:.6g}" for name, value in values.items() if isinstance(value, float)}
            writer.writerow({**about, **values, **numbers})


def read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The machine and the rows of a file of `write_csv`; ValueError for another file."""
    rows, about = [], {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                about = {name: line[name] for name in ABOUT}
                # Files from before a column existed have its default.
                values = {
                    name: line[name] if name in _TEXTS else float(line[name]) if line[name] else None
                    for name in _FIELDS
                    if name in line or name not in _LATER
                }
                rows.append(Row(**values))
    except (KeyError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a result of the operators' benchmark ({reason})") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return about, rows


def ceilings_of(about: dict[str, str]) -> Ceilings:
    """The machine's ceilings as its CSV has them."""
    products = {name: float(about[f"{name}_flops_per_s"]) for name in ("float32", "bfloat16")}
    return Ceilings(float(about["copy_bytes_per_s"]), products)
