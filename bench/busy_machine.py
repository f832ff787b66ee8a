"""A training step on a CPU that other programs use too: how its threads wait for each other, six ways in turns.

    python bench/busy_machine.py [--ways WAY ...] [--rounds N] [--steps N] [--csv FILE] [--tiny]

The step is that of `python -m spot_fast.train --stage 1`: generated scenes, cached features. Each way has a process of
its own, and all take turns; whoever is not at it sleeps. Of each round the first half has the machine to itself, in the
second half another program keeps one core busy.

    spinning     PyTorch's OpenMP threads as they are: they wait by spinning, for milliseconds
    sleeping     OMP_WAIT_POLICY=PASSIVE: they sleep as soon as they have to wait
    spin 1,000   GOMP_SPINCOUNT: they look so many times, then sleep
    spin 30,000
    one thread   has nobody to wait for
    commands     what the commands do (`system.cpu_threads`): spinning, with fewer threads while others use the cores

Times are medians of a step. Before they are timed all ways take the same three steps, and the loss of the third is
compared with that of one thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from ladder import write_csv
from machine import commit, cores, cpu_name
from targets import target_file

ONE_THREAD, COMMANDS = "one thread", "commands"
WAYS: Mapping[str, Mapping[str, str]] = {
    "spinning": {},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 30,000": {"GOMP_SPINCOUNT": "30000"},
    ONE_THREAD: {"OMP_NUM_THREADS": "1"},
    COMMANDS: {},
}
IDLE, BUSY = "idle", "one core busy"
_DECIDES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME")
_SETTLES = 3.0  # seconds until `commands` has its number of threads


@dataclass(frozen=True)
class Row:
    """A line of the table; error: relative, of the third step's loss against that of one thread."""

    way: str
    load: str
    ms: float
    times_one_thread: float
    error: float


class Trainee:
    """The process of a way."""

    def __init__(self, way: str, tiny: bool) -> None:
        command = [sys.executable, __file__, "--trainee", way, *["--tiny"] * tiny]
        environment = {name: value for name, value in os.environ.items() if name not in _DECIDES} | WAYS[way]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        (self.loss,) = self._answer()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> list[float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bench has ended: its error is above")
        return [float(word) for word in line.split()]


def trainee(way: str, tiny: bool) -> None:
    """Takes steps as stdin asks for them; stdout gets a loss first, then their seconds."""
    import torch
    from step_runs import TrainerSteps, settings

    from spot_fast.config import preset
    from spot_fast.system.cpu_threads import CpuThreads

    config = replace(preset("scenes", 1), train_images=256, eval_images=0, workers=0, loader="torch", warmup_steps=5)
    if tiny:
        config = settings(1, precision="float32", batch_size=4, tiny=True)
    steps = TrainerSteps(config, torch.device("cpu"), cached=True)
    for _ in range(2):
        steps.next()
    print(steps.first().loss, flush=True)
    for line in sys.stdin:
        threads = CpuThreads(torch.get_num_threads(), lambda sentence: None) if way == COMMANDS else None
        settled = time.monotonic() + (_SETTLES if way == COMMANDS and not tiny else 0)
        seconds: list[float] = []
        while len(seconds) < int(line):
            if threads:
                threads.adapt()
            begin = time.perf_counter()
            steps.next()
            if time.monotonic() > settled:
                seconds.append(time.perf_counter() - begin)
        print(*seconds, flush=True)
        if threads:
            torch.set_num_threads(threads.most)


@contextmanager
def other_program() -> Iterator[None]:
    """Keeps a core busy."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait()


def measure(ways: Sequence[str], rounds: int, steps: int, tiny: bool) -> list[Row]:
    trainees = {way: Trainee(way, tiny) for way in ways}
    seconds: dict[tuple[str, str], list[float]] = {(way, machine): [] for way in ways for machine in (IDLE, BUSY)}
    try:
        for _ in range(rounds):
            for way, process in trainees.items():
                seconds[way, IDLE] += process.steps(steps)
            with other_program():
                for way, process in trainees.items():
                    seconds[way, BUSY] += process.steps(steps)
    finally:
        for process in trainees.values():
            process.close()
    middle = {key: median(values) for key, values in seconds.items()}
    true = trainees[ONE_THREAD].loss
    return [
        Row(way, machine, 1e3 * value, value / middle[ONE_THREAD, machine], abs(trainees[way].loss / true - 1))
        for (way, machine), value in middle.items()
    ]


def table(rows: Sequence[Row]) -> str:
    found = {(row.way, row.load): row for row in rows}
    lines = [f"| threads wait | {IDLE}, ms | {BUSY}, ms | error of the loss |", "|---|---|---|---|"]
    for way in dict.fromkeys(row.way for row in rows):
        idle, busy = found[way, IDLE], found[way, BUSY]
        lines.append(f"| {way} | {idle.ms:.0f} | {busy.ms:.0f} | {idle.error:.1e} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of all ways (default: 5)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps of a way and half round (default: 6)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="beside one thread (default: all)"
    )
    parser.add_argument("--csv", type=target_file, metavar="FILE", help="also write the rows there")
    parser.add_argument("--tiny", action="store_true", help="a step that says nothing, to try the bench")
    parser.add_argument("--trainee", choices=tuple(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.trainee:
        trainee(args.trainee, args.tiny)
        return 0
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: use 1 or more")
    rows = measure(list(dict.fromkeys([*args.ways, ONE_THREAD])), args.rounds, args.steps, args.tiny)
    print(f"{cpu_name()}, {cores()} cores, {date.today()}\n\n{table(rows)}")
    if args.csv:
        about = {"date": str(date.today()), "machine": f"{cpu_name()}, {cores()} cores", "commit": commit()}
        write_csv(args.csv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
