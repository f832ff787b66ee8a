"""Trains and evaluates a list of runs by spot_fast.reproduction, for benchmarks whose tables are none of the paper's.

What is measured is what a user runs. A run that is finished is not trained again and one that was stopped goes on, so
a benchmark that was interrupted is simply started again with the same line.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from harness.machine import ROOT, cores
from harness.tables import BenchError, Result, Scores, read_csv, read_run, slug, write_csv
from harness.targets import target_file
from spot_fast.errors import UserError
from spot_fast.reproduction.execution import Runner, Settings, evaluation
from spot_fast.reproduction.folders import Folders
from spot_fast.reproduction.runs import RunSpec, resolved

OUT_OF_TIME = 3


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


def run_specs(plans: Sequence[Plan]) -> list[RunSpec]:
    """The runs of `plans`, which has teachers before their students."""
    made: dict[Plan, RunSpec] = {}
    for plan in plans:
        words = ("--stage", str(plan.stage), "--seed", str(plan.seed), *plan.options)
        parents = {"--teacher": made[plan.teacher]} if plan.teacher else {}
        made[plan] = RunSpec(plan.name, resolved(words, parents), words, parents.get("--teacher"))
    return list(made.values())


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
    more: Callable[[], dict[tuple[str, int], Scores]] = dict,
) -> list[Result]:
    """What the arguments of `add_arguments` ask for: trains, evaluates and writes the CSV, or only reads. OutOfTime
    where time was short, after the CSV of what is finished. more: called where a run is finished; scores that are no
    run's own, which every run's lines in the CSV then have beside them."""
    if args.plain_table:
        return read_csv(args.plain_table)
    specs, folders = run_specs(plans), Folders(args.out)
    about = {"bench": bench, "cores": str(cores()), "options": shlex.join(options)}

    def results() -> list[Result]:
        finished = [
            read_run(found.path, _noted(folders, spec) | about | _which(plan))
            for plan, spec in zip(plans, specs, strict=True)
            if (found := folders.find(spec)).finished and evaluation(found.path, "spot")
        ]
        return _with(finished, more)

    if args.plain_table is not None:
        if not (finished := results()):
            raise BenchError(f"nothing is finished in {args.out}: give CSV files, or train without --plain-table")
        return finished
    settings = Settings(args.jobs, [args.device], args.threads, args.minutes)
    outcome = Runner(folders, settings, _say).run(specs)
    if finished := results():
        # A rehearsal with other options is no result of the project.
        path = args.csv or (args.out / f"{bench}.csv" if options else default_csv(bench, finished))
        write_csv(path, finished)
        _say(f"wrote {path}: {len(finished)} of {len(plans)} runs")
    if outcome.failed:
        raise BenchError("; ".join(outcome.failed.values()))
    if not outcome.in_time:
        raise OutOfTime
    return finished


def _noted(folders: Folders, spec: RunSpec) -> dict[str, str]:
    """What was noted when the training began, with an empty text where it was not."""
    noted = folders.about(spec)
    return {name: noted.get(name, "") for name in ("date", "cpu", "commit", "jobs")}


def _which(plan: Plan) -> dict[str, str]:
    return {"variant": plan.variant, "stage": str(plan.stage), "seed": str(plan.seed)}


def _with(results: list[Result], more: Callable[[], dict[tuple[str, int], Scores]]) -> list[Result]:
    scores = more() if results else {}
    return [replace(result, scores=result.scores | scores) for result in results]


def command_line(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs `main` and turns what stops it into a sentence and an exit code."""
    # `timeout` and a shutdown send SIGTERM: let the runs save then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main(argv)
    except (BenchError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OutOfTime:
        print("out of time: every run is saved, the same line goes on", file=sys.stderr)
        return OUT_OF_TIME
    except KeyboardInterrupt:
        print("interrupted: every run is saved, the same line goes on", file=sys.stderr)
        return 130


def default_csv(bench: str, results: Sequence[Result]) -> Path:
    """bench/results/<bench>_<date>.csv, with the GPU's name where there is one."""
    about = results[0].about
    parts = [bench, slug(about["accelerator"]), about["date"]]
    return ROOT / "bench" / "results" / ("_".join(p for p in parts if p) + ".csv")


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
