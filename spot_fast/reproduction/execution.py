"""Trains and evaluates runs through spot_fast's own commands, each in a process of its own, several at once.

What is finished is not done again and what was stopped goes on, so the same command line is simply started again, after
Ctrl-C as after a kill. Several such processes may share a folder: a run that another one trains is waited for.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

import spot_fast
import spot_kernels
from spot_fast.checkpoints.runs import MODEL
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.protocols import chosen
from spot_fast.reproduction.folders import LOGS, Folders
from spot_fast.reproduction.runs import RunSpec
from spot_fast.system.machine import commit, cpu_name, gpu_name
from spot_fast.training.console import duration
from spot_fast.training.run_folder import is_free

EVALUATION = "evaluation.json"
_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Settings:
    """How runs are trained and scored. devices: one for each of the runs at once, None for spot_fast.train's choice.

    data: of the evaluation, which otherwise takes the folder that the run was trained on.
    """

    jobs: int = 1
    devices: Sequence[str | None] = (None,)
    threads: int | None = None
    minutes: float | None = None
    protocol: str = "spot"
    data: str | None = None


@dataclass
class Outcome:
    """in_time: whether all was done or had failed before the minutes were over. failed: run → sentence."""

    in_time: bool = True
    failed: dict[str, str] = field(default_factory=dict)


def evaluation(folder: Path, protocol: str) -> dict | None:
    """The scores of a finished run; None where they are older than its model, of other protocols or fewer metrics."""
    file, model = folder / EVALUATION, folder / MODEL
    if not file.is_file() or file.stat().st_mtime_ns < model.stat().st_mtime_ns:
        return None
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        there = set(scores["protocols"]) if "protocols" in scores else {scores["protocol"]}
        complete = {each.name for each in chosen(protocol)} <= there and scores["settings"]["limit"] == 0
        complete &= set(METRICS) <= scores["runs"][0]["rows"][0].keys()  # older versions had fewer
    except (ValueError, KeyError, TypeError):
        return None
    return scores if complete else None


@dataclass(eq=False)
class _Task:
    """A process that trains or evaluates a run, in a slot of its own."""

    run: RunSpec
    kind: str  # train or evaluate
    process: subprocess.Popen
    slot: int
    start: float


class Runner:
    """Does what is left of `runs`, given with parents before students. say: prints a line."""

    def __init__(self, folders: Folders, settings: Settings, say: Callable[[str], None]) -> None:
        self.folders, self.settings, self.say = folders, settings, say
        self.running: list[_Task] = []
        self.outcome = Outcome()
        gpu = gpu_name() if torch.cuda.is_available() else ""
        self._about = {"commit": commit(), "cpu": cpu_name(), "gpu": gpu, "jobs": str(settings.jobs)}

    def run(self, runs: Sequence[RunSpec], rest: Callable[[], str] = lambda: "") -> Outcome:
        """rest: what is left to do, for the line after each training. UserError where the first process fails."""
        (self.folders.root / LOGS).mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 60 * self.settings.minutes if self.settings.minutes else float("inf")
        todo = [(run, kind) for run in runs for kind in ("train", "evaluate")]
        waiting: set[str] = set()
        changed = True
        with self._stopping():
            while todo or self.running:
                if changed or not self.running:
                    todo = [job for job in todo if not self._is_done(*job) and not self._is_lost(job[0])]
                for job in [job for job in todo if self._is_ready(*job)]:
                    if len(self.running) >= self.settings.jobs:
                        break
                    if self._is_taken(*job):
                        if job[0].name not in waiting:
                            self.say(f"{job[0].name}: another process trains it, waiting")
                        waiting.add(job[0].name)
                        continue
                    todo.remove(job)
                    if not self._is_done(*job):  # another process may have
                        self._start(*job)
                ended = [task for task in self.running if task.process.poll() is not None]
                changed = bool(ended)
                for task in ended:
                    self.running.remove(task)
                    self._ended(task, rest)
                if time.monotonic() > deadline and (todo or self.running):
                    self.outcome.in_time = False
                    break
                time.sleep(_POLL if self.running else 20 * _POLL if todo else 0)
        return self.outcome

    # ---- which job is next

    def _is_done(self, run: RunSpec, kind: str) -> bool:
        here = self.folders.find(run)
        if not here.finished:
            return False
        return kind == "train" or evaluation(here.path, self.settings.protocol) is not None

    def _is_lost(self, run: RunSpec) -> bool:
        """Whether the run, or one that it begins with, has failed."""
        return run.name in self.outcome.failed or any(self._is_lost(parent) for parent in run.parents.values())

    def _is_ready(self, run: RunSpec, kind: str) -> bool:
        needed = [run] if kind == "evaluate" else run.parents.values()
        return all(self.folders.find(each).finished for each in needed)

    def _is_taken(self, run: RunSpec, kind: str) -> bool:
        """Whether another process trains the run. Then its folder is looked at again."""
        if kind == "evaluate":
            return False
        here = self.folders.refresh(run)
        return here.path.is_dir() and not here.finished and not is_free(here.path)

    # ---- processes

    def _start(self, run: RunSpec, kind: str) -> None:
        slot = min(set(range(self.settings.jobs)) - {task.slot for task in self.running})
        device = self.settings.devices[slot % len(self.settings.devices)]
        words = [f"spot_fast.{kind}", *(self._training(run) if kind == "train" else self._evaluation(run))]
        words += ["--device", device] if device else []
        words += ["--threads", str(self.settings.threads)] if self.settings.threads else []
        with open(self.folders.log(run), "a", encoding="utf-8") as log:
            log.write(f"$ python -m {shlex.join(words)}\n")
            log.flush()
            # A single run on a terminal shows its progress bar there.
            errors = None if self.settings.jobs == 1 and sys.stderr.isatty() else log
            # A process group of its own, so that Ctrl-C reaches a run once, from `_stopping`.
            process = subprocess.Popen(
                [sys.executable, "-m", *words], env=_environment(), stdout=log, stderr=errors, process_group=0
            )
        self.running.append(_Task(run, kind, process, slot, time.monotonic()))

    def _training(self, run: RunSpec) -> list[str]:
        path = self.folders.prepare(run)
        if not self.folders.find(run).begun:
            self.folders.note(run, self._about | {"date": datetime.now(UTC).date().isoformat()})
        parents = [word for option, parent in run.parents.items() for word in (option, self.folders.find(parent).path)]
        return [*run.words, *map(str, parents), "--out", str(path), "--resume"]

    def _evaluation(self, run: RunSpec) -> list[str]:
        path = self.folders.find(run).path
        words = [str(path), "--protocol", self.settings.protocol, "--json", str(path / EVALUATION)]
        return words + (["--data", self.settings.data] if self.settings.data else [])

    def _ended(self, task: _Task, rest: Callable[[], str]) -> None:
        seconds, name = time.monotonic() - task.start, task.run.name
        here = self.folders.refresh(task.run)
        if task.process.returncode:
            log = self.folders.log(task.run)
            reason = _last_line(log.read_text(encoding="utf-8", errors="replace")).removeprefix("error: ")
            self.outcome.failed[name] = f"{name} failed ({task.kind}, exit code {task.process.returncode}): {reason}"
            self.say(f"{self.outcome.failed[name]} (see {log})")
            if not any(self.folders.find(run).finished for run in self._ended_well):
                raise UserError(f"{self.outcome.failed[name]} (see {log})")
            return
        self._ended_well.append(task.run)
        verb = "trained" if task.kind == "train" else "evaluated"
        now = ", ".join(other.run.name for other in self.running)
        left = rest() if task.kind == "train" and here.finished else ""
        parts = [f"{name}: {verb} in {duration(seconds)}", left, now and f"running: {now}"]
        self.say("; ".join(filter(None, parts)))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """On the way out runs are asked to save and leave, and waited for; a second Ctrl-C ends them at once."""
        # `timeout` and a shutdown send SIGTERM: runs save then too.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._ended_well: list[RunSpec] = []
        try:
            yield
        finally:
            for task in self.running:
                task.process.send_signal(signal.SIGINT)
            try:
                for task in self.running:
                    task.process.wait()
            except KeyboardInterrupt:
                for task in self.running:
                    task.process.kill()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    """The packages that run now come first, so that a checkout need not be installed."""
    paths = [str(Path(package.__file__).parents[1]) for package in (spot_fast, spot_kernels)]
    paths = list(dict.fromkeys([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
