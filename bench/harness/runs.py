"""Trains and evaluates a list of runs through spot_fast's own command lines, each in a process of its own.

What is measured is what a user runs. A run that is finished is not trained again and one that was stopped goes on, so
a benchmark that was interrupted is simply started again with the same line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from harness.machine import ROOT, commit, cores, cpu_name
from harness.tables import (
    CONFIG,
    EVALUATION,
    MODEL,
    BenchError,
    Result,
    Scores,
    read_csv,
    read_metadata,
    read_run,
    slug,
    write_csv,
)
from harness.targets import target_file
from spot_fast.config import option_names

OUT_OF_TIME = 3
TRAINER = ("-m", "spot_fast.train")  # what Python is given to train a run


class OutOfTime(Exception):
    """The minutes that were given are over; what was trained so far is saved."""


@dataclass(frozen=True)
class Plan:
    """A run to make: options of spot_fast.train, and for stage 2 the run that teaches it."""

    variant: str
    stage: int
    seed: int
    options: tuple[str, ...]
    teacher: Plan | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-stage{self.stage}-seed{self.seed}"


def add_arguments(parser: argparse.ArgumentParser, bench: str) -> None:
    """Options that every benchmark of training has."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"runs/bench-{bench}"),
        metavar="DIR",
        help=f"where the runs are kept (default: runs/bench-{bench})",
    )
    parser.add_argument(
        "--csv",
        type=target_file,
        metavar="FILE",
        help=f"results (default: bench/results/{bench}_[GPU_]DATE.csv, with -- in --out)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a run (default: PyTorch's choice)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once; their minutes are then those of shared hardware (default: 1)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="X",
        help=f"stop after so long with exit code {OUT_OF_TIME}; the same line goes on",
    )
    parser.add_argument(
        "--plain-table",
        nargs="*",
        type=Path,
        metavar="CSV",
        help="train nothing: the table of these files, or of what is finished in --out",
    )


def split_options(argv: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """(own arguments, options of spot_fast.train): the latter follow a lone --."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], tuple(words[cut + 1 :])


def results_of(
    bench: str,
    plans: Sequence[Plan],
    args: argparse.Namespace,
    options: Sequence[str],
    trainer: Sequence[str] = TRAINER,
    more: Callable[[], dict[tuple[str, int], Scores]] = dict,
) -> list[Result]:
    """What the arguments of `add_arguments` ask for: trains, evaluates and writes the CSV, or only reads. OutOfTime
    where time was short, after the CSV of what is finished. trainer: as `Runner` has it. more: called where a run is
    finished; scores that are no run's own, which every run's lines in the CSV then have beside them."""
    if args.plain_table:
        return read_csv(args.plain_table)
    about = {
        "bench": bench,
        "cpu": cpu_name(),
        "cores": str(cores()),
        "commit": commit(),
        "jobs": str(args.jobs),
        "options": shlex.join(options),
        "date": datetime.now(UTC).date().isoformat(),
    }
    runner = Runner(
        args.out, about, device=args.device, threads=args.threads, jobs=args.jobs, minutes=args.minutes, trainer=trainer
    )
    if args.plain_table is not None:
        results = _with(runner.collect(plans), more)
        if not results:
            raise BenchError(f"nothing is finished in {args.out}: give CSV files, or train without --plain-table")
        return results
    in_time = runner.run(plans)
    results = _with(runner.collect(plans), more)
    if results:
        # A rehearsal with other options is no result of the project.
        path = args.csv or (args.out / f"{bench}.csv" if options else default_csv(bench, results))
        write_csv(path, results)
        _say(f"wrote {path}: {len(results)} of {len(plans)} runs")
    if not in_time:
        raise OutOfTime
    return results


def _with(results: list[Result], more: Callable[[], dict[tuple[str, int], Scores]]) -> list[Result]:
    scores = more() if results else {}
    return [replace(result, scores=result.scores | scores) for result in results]


def command_line(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs `main` and turns what stops it into a sentence and an exit code."""
    # `timeout` and a shutdown send SIGTERM: let the runs save then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main(argv)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OutOfTime:
        print("out of time: every run is saved, the same line goes on", file=sys.stderr)
        return OUT_OF_TIME
    except KeyboardInterrupt:
        print("interrupted: every run is saved, the same line goes on", file=sys.stderr)
        return 130


# ---- processes


def _environment() -> dict[str, str]:
    """The checkout's packages come first, as in the tests, so nothing has to be installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}


class Runner:
    """Trains and evaluates plans below `out`, `jobs` at a time, until `minutes` are over.

    about: texts kept with a run when its training begins, for its line in the CSV. trainer: what Python is given to
    train a run, before the run's options.
    """

    def __init__(
        self,
        out: Path,
        about: dict[str, str],
        *,
        device: str | None = None,
        threads: int | None = None,
        jobs: int = 1,
        minutes: float | None = None,
        trainer: Sequence[str] = TRAINER,
    ) -> None:
        if jobs < 1:
            raise BenchError(f"--jobs {jobs}: use 1 or more")
        self.out, self.about, self.jobs, self.trainer = out, about, jobs, trainer
        self.device = ["--device", device] if device else []
        self.threads = ["--threads", str(threads)] if threads else []
        self.deadline = time.monotonic() + 60 * minutes if minutes else None

    def folder(self, plan: Plan) -> Path:
        return self.out / plan.name

    def run(self, plans: Sequence[Plan]) -> bool:
        """Whether all was done in time; at the deadline, and where a process fails, the others stop and are saved."""
        self.out.mkdir(parents=True, exist_ok=True)
        there = [p for p in plans if (self.folder(p) / CONFIG).is_file()]
        with ThreadPoolExecutor(cores()) as pool:  # a second or more each
            list(pool.map(self._require_same, there))
        todo = [(plan, task) for plan in plans for task in (self._train, self._evaluate)]
        running: dict[subprocess.Popen, tuple] = {}
        try:
            while todo or running:
                for job in [job for job in todo if self._is_ready(*job)][: self.jobs - len(running)]:
                    todo.remove(job)
                    if process := job[1](job[0]):
                        running[process] = (*job, time.monotonic())
                for process in [p for p in running if p.poll() is not None]:
                    self._ended(process, *running.pop(process))
                if self.deadline and time.monotonic() > self.deadline:
                    return False
                time.sleep(0.05)
            return True
        finally:
            _stop(list(running))

    def _is_ready(self, plan: Plan, task) -> bool:
        needed = plan if task == self._evaluate else plan.teacher
        return needed is None or _is_finished(self.folder(needed))

    def _options(self, plan: Plan) -> list[str]:
        teacher = ["--teacher", str(self.folder(plan.teacher))] if plan.teacher else []
        return ["--stage", str(plan.stage), "--seed", str(plan.seed), *plan.options, *self.device, *teacher]

    def _train(self, plan: Plan) -> subprocess.Popen | None:
        folder = self.folder(plan)
        if _is_finished(folder):
            _say(f"{plan.name}: trained already")
            return None
        self._about(plan).write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
        words = [*self._options(plan), *self.threads, "--out", str(folder), "--resume"]
        return self._start(plan, self.trainer, words)

    def _evaluate(self, plan: Plan) -> subprocess.Popen | None:
        folder = self.folder(plan)
        target = folder / EVALUATION
        if target.is_file() and target.stat().st_mtime_ns > (folder / MODEL).stat().st_mtime_ns:
            return None
        return self._start(
            plan, ("-m", "spot_fast.evaluate"), [str(folder), "--json", str(target), *self.device, *self.threads]
        )

    def _require_same(self, plan: Plan) -> None:
        """A folder of another recipe must not stand in for the run that is asked for."""
        folder = self.folder(plan)
        if not self._is_ready(plan, self._train):
            raise BenchError(f"{folder} is there but its teacher {plan.teacher.name} is not: remove it")
        done = subprocess.run(
            [sys.executable, *TRAINER, *self._options(plan), "--print-config"],
            env=_environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise BenchError(f"{plan.name} cannot be trained: {_last_line(done.stderr)}")
        now, then = json.loads(done.stdout), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for name in sorted((now.keys() | then.keys()) - set(option_names("resumable"))):
            if now.get(name) not in (then.get(name), "auto"):  # a run keeps what auto became
                raise BenchError(
                    f"{folder} was trained with {name} {then.get(name)} and now it is {now.get(name)}: "
                    "remove the folder or give another --out"
                )
        if plan.teacher and _is_finished(folder):
            teacher = hashlib.sha256((self.folder(plan.teacher) / MODEL).read_bytes()).hexdigest()
            if read_metadata(folder / MODEL).get("teacher_sha256") != teacher:
                raise BenchError(f"{folder} was taught by another {plan.teacher.name} than the present one: remove it")

    def _start(self, plan: Plan, program: Sequence[str], words: list[str]) -> subprocess.Popen:
        log: IO = open(self._log(plan), "a", encoding="utf-8")
        log.write(f"$ python {shlex.join([*program, *words])}\n")
        log.flush()
        # A single run on a terminal shows its progress bar there.
        errors = None if self.jobs == 1 and sys.stderr.isatty() else log
        _say(f"{plan.name}: {'evaluate' if 'spot_fast.evaluate' in program else 'train'}")
        with log:
            # A process group of its own, so that Ctrl-C reaches a run once, from `_stop`.
            return subprocess.Popen(
                [sys.executable, *program, *words], env=_environment(), stdout=log, stderr=errors, process_group=0
            )

    def _log(self, plan: Plan) -> Path:
        return self.out / f"{plan.name}.log"

    def _ended(self, process: subprocess.Popen, plan: Plan, task, start: float) -> None:
        if process.returncode:
            log = self._log(plan)
            reason = _last_line(log.read_text(encoding="utf-8", errors="replace"))
            raise BenchError(f"{plan.name} failed with exit code {process.returncode}: {reason} (see {log})")
        _say(f"{plan.name}: {'trained' if task == self._train else 'evaluated'} in {time.monotonic() - start:.0f} s")

    # ---- results

    def _about(self, plan: Plan) -> Path:
        return self.out / f"{plan.name}.json"

    def collect(self, plans: Sequence[Plan]) -> list[Result]:
        """Results of those plans that are trained and evaluated."""
        done = [p for p in plans if _is_finished(self.folder(p)) and (self.folder(p) / EVALUATION).is_file()]
        results = []
        for plan in done:
            file = self._about(plan)
            kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.about
            which = {"variant": plan.variant, "stage": str(plan.stage), "seed": str(plan.seed)}
            results.append(read_run(self.folder(plan), kept | which))
        return results


def default_csv(bench: str, results: Sequence[Result]) -> Path:
    """bench/results/<bench>_<date>.csv, with the GPU's name where there is one."""
    about = results[0].about
    parts = [bench, slug(about["accelerator"]), about["date"]]
    return ROOT / "bench" / "results" / ("_".join(p for p in parts if p) + ".csv")


def _stop(running: list[subprocess.Popen]) -> None:
    """Asks runs to save and leave, and waits; a second Ctrl-C ends them at once."""
    for process in running:
        process.send_signal(signal.SIGINT)
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            process.kill()
        raise


def _is_finished(folder: Path) -> bool:
    return (folder / MODEL).is_file()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
