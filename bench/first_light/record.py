"""Rows of the first minutes on a GPU: printed and appended to their CSV the moment they exist.

A part is one of PARTS, a process of its own with a limit of time. `Recorder.add` prints a row and appends it, with the
card's name, clocks and versions in it, and makes sure that it is on disk: whatever ends the process afterwards, the row
stays. One CSV a part, named after card and versions; rows of one call of the script have the same `run`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), str(ROOT / "tests" / "support")]

import torch
from harness.machine import commit, cpu_name, nvidia_smi
from harness.tables import slug

PARTS = ("ceilings", "operators", "steps", "techniques", "layouts", "rivals")
GO, NO_GO, ABSENT, LATE = "go", "NO GO", "not here", "out of time"
# The exit code of a part that ran out of its time, as `timeout` has it.
OUT_OF_TIME = 124


@dataclass(frozen=True)
class Row:
    """One result.

    subject: of what; variant: of several that are compared; figure: what `value` is, with its unit. low, high: p20 and
    p80 of the same. error, allowed: of the check that the value passed, or failed. verdict: GO, NO_GO, ABSENT, LATE, or
    empty where nothing is decided.
    """

    part: str
    subject: str
    variant: str = ""
    figure: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    allowed: float | None = None
    verdict: str = ""
    note: str = ""

    def __str__(self) -> str:
        words = [" · ".join(filter(None, (self.part, self.subject, self.variant)))]
        if self.value is not None:
            spread = f" ({self.low:.4g} to {self.high:.4g})" if self.low is not None else ""
            words.append(f"{self.value:.4g}{spread} {self.figure}")
        elif self.figure:
            words.append(self.figure)
        if self.error is not None:
            words.append(f"error {self.error:.2g}" + (f" of {self.allowed:.2g}" if self.allowed is not None else ""))
        return "  ".join(filter(None, (*words, self.verdict.upper(), self.note)))


_ABOUT = (
    "run",
    "date",
    "time",
    "card",
    "sm_mhz",
    "memory_mhz",
    "driver",
    "torch",
    "triton",
    "cuda",
    "commit",
    "rehearsal",
)
_TEXTS = ("part", "subject", "variant", "figure", "verdict", "note")


class Recorder:
    """Prints and keeps the rows of one part below `folder`."""

    def __init__(self, part: str, folder: Path, *, rehearsal: bool = False) -> None:
        self.part, self.rehearsal, self.rows = part, rehearsal, []
        self.facts = facts()
        versions = (f"{name}-{slug(self.facts[name])}" for name in ("torch", "triton"))
        names = ("first_light", part, slug(self.facts["card"]), *versions, self.facts["date"])
        self.path = folder / ("_".join(names) + ".csv")
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, subject: str, variant: str = "", **values: object) -> Row:
        row = Row(self.part, subject, variant, **values)
        self.rows.append(row)
        print(row, flush=True)
        mhz = dict(zip(("sm_mhz", "memory_mhz"), clocks.now(), strict=True))
        about = self.facts | mhz | {"time": f"{datetime.now():%H:%M:%S}", "rehearsal": "yes" * self.rehearsal}
        numbers = {
            name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
            for name, value in asdict(row).items()
        }
        new = not self.path.exists()
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, (*_ABOUT, *(field.name for field in fields(Row))), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: about.get(name, "") for name in _ABOUT} | numbers)
            file.flush()
            os.fsync(file.fileno())
        return row


def read(path: Path) -> list[tuple[dict[str, str], Row]]:
    """The rows of a CSV with what is said of card and versions; ValueError names a file that is none."""
    found = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                values = {field.name: line[field.name] for field in fields(Row)}
                values = {
                    name: value if name in _TEXTS else float(value) if value else None for name, value in values.items()
                }
                found.append(({name: line[name] for name in _ABOUT}, Row(**values)))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a result of first_light ({type(error).__name__}: {error})") from None
    return found


# ---- the machine


@functools.cache
def facts() -> dict[str, str]:
    """Card, versions, date and run; the commit from $COMMIT where the checkout came without its history."""
    gpu = torch.cuda.is_available()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    now = datetime.now()
    (driver,) = (nvidia_smi("driver_version", 5) if gpu else None) or ("",)
    return {
        "run": os.environ.get("FIRST_LIGHT_RUN") or f"{now:%Y-%m-%d %H:%M:%S}",
        "date": f"{now:%Y-%m-%d}",
        "card": torch.cuda.get_device_name() if gpu else f"cpu {cpu_name()}",
        "driver": driver,
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda or "none",
        "commit": commit() or os.environ.get("COMMIT", ""),
    }


class _Clocks:
    """MHz of multiprocessors and memory, asked for at most every few seconds: each question takes its time."""

    EVERY, PATIENCE = 5.0, 3.0  # seconds

    def __init__(self) -> None:
        self._asked, self._found = -math.inf, ("", "")

    def now(self) -> tuple[str, str]:
        if torch.cuda.is_available() and time.monotonic() - self._asked > self.EVERY:
            found = nvidia_smi("clocks.sm,clocks.mem", self.PATIENCE)
            self._found = (found[0], found[1]) if len(found) == 2 else ("", "")
            self._asked = time.monotonic() if found else math.inf  # one without an answer is not asked again
        return self._found


clocks = _Clocks()


# ---- a part as a process


class Time:
    """What is left of a part's seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Options:
    """What every part is given. gpu: whether it runs on one; a rehearsal has small shapes and few repetitions."""

    gpu: bool
    rehearse: bool
    out: Path
    seconds: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")


def parser(about: str) -> argparse.ArgumentParser:
    """With the options of every part."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--rehearse", action="store_true", help="small shapes, on any machine: to see that it works")
    made.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="where the CSV goes")
    made.add_argument("--seconds", type=float, default=600.0, metavar="S", help="how long it may take")
    return made


def options(args: argparse.Namespace) -> Options:
    return Options(torch.cuda.is_available(), args.rehearse, args.out, args.seconds)


def run(part: str, work: Callable[[Recorder, Options, Time], object], args: argparse.Namespace) -> int:
    """Does a part's work; its exit code. What stops it, its time too, becomes a row."""
    chosen = options(args)
    recorder = Recorder(part, chosen.out, rehearsal=chosen.rehearse)
    if not chosen.gpu and not chosen.rehearse:
        print(f"error: {part} needs a GPU: add --rehearse for a rehearsal on this machine", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which `timeout` sends
    began = time.monotonic()
    try:
        work(recorder, chosen, Time(chosen.seconds))
    except KeyboardInterrupt:
        recorder.add("the whole part", verdict=LATE, note=f"stopped after {time.monotonic() - began:.0f} s")
        return OUT_OF_TIME
    except Exception as error:
        recorder.add("the whole part", verdict=NO_GO, note=reason(error))
        return 1
    recorder.add("the whole part", figure="s", value=time.monotonic() - began)
    return int(any(row.verdict == NO_GO for row in recorder.rows))


def reason(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def best_of(rows: Sequence[Row]) -> Row | None:
    """The row of least value among those that passed their check."""
    return min(
        (row for row in rows if row.value is not None and row.verdict != NO_GO), key=lambda row: row.value, default=None
    )
