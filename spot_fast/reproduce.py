"""python -m spot_fast.reproduce TABLE ...: the paper's tables by one command.

Plans the runs that are missing, trains each once however many tables need it, evaluates them, and prints the tables
beside the paper's figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from spot_fast import cli
from spot_fast.errors import UserError
from spot_fast.evaluation.protocols import chosen as chosen_protocols
from spot_fast.files import atomic_write
from spot_fast.recipes import DATA_SETS, needs_data
from spot_fast.reproduction.execution import Runner, Settings
from spot_fast.reproduction.figures import draw
from spot_fast.reproduction.folders import Folders
from spot_fast.reproduction.plan import Plan, chosen, make_plan, rest, state
from spot_fast.reproduction.results import markdown, write_csv
from spot_fast.reproduction.runs import Planner, RunSpec
from spot_fast.reproduction.tables import OURS, PAPER, TABLES
from spot_fast.system.optional import required

OUT_OF_TIME = 3
_GOES_ON = "every run is saved, the same command line goes on"

_EPILOG = """options after -- go to every training, such as: -- --epochs 1 --train-images 256

examples:
  python -m spot_fast.reproduce                                      the tables, a line each
  python -m spot_fast.reproduce 1                                    Table 1 on generated scenes
  python -m spot_fast.reproduce 1 2 --preset coco --data COCO --plan what is there, what is left, what it costs
  python -m spot_fast.reproduce all --preset coco --data COCO --jobs 8
  python -m spot_fast.reproduce 1 --preset coco --data COCO --list   the runs for a cluster's array, a line each
  python -m spot_fast.reproduce 1 --preset coco --data COCO --only RUN
"""


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m spot_fast.reproduce",
        usage="python -m spot_fast.reproduce [TABLE ...] [option ...] [-- options of spot_fast.train]",
        description="Trains and evaluates what tables of the paper need and is not there, and prints them beside the "
        "paper's figures. Started again it goes on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="some of those that are listed without it, or all")
    parser.add_argument(
        "--preset", default="scenes", metavar="NAME", help=f"data set: {', '.join(DATA_SETS)} (default: scenes)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (scenes need none)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2, three as in the paper"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="ENCODER=FILE",
        help="weights of an encoder, such as moco_vitb16=vit-b-300ep.pth.tar, which the hub does not have; may be "
        "repeated (default: the hub's)",
    )
    parser.add_argument("--protocol", default="spot", metavar="NAME[,NAME]", help="as evaluate has it (default: spot)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only print the runs, how far they are and what they cost")
    what.add_argument("--list", action="store_true", help="only print the names of the runs, teachers first")
    what.add_argument("--show", action="store_true", help="train nothing: the tables of what is finished")
    what.add_argument("--only", metavar="RUN", help="train and evaluate this run of --list alone")
    cli.add_runs_folder(
        parser, type=Path, default=Path("runs/reproduce"), help="folder of the runs (default: runs/reproduce)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the tables are written as .md and .csv (default: --runs)"
    )
    parser.add_argument(
        "--jobs",
        action=cli.Number,
        least=1,
        default=1,
        help="runs at once, on several GPUs in turn; their minutes are those of shared hardware (default: 1)",
    )
    parser.add_argument(
        "--minutes",
        action=cli.Number,
        least=0,
        type=float,
        metavar="X",
        help=f"stop after so long with exit code {OUT_OF_TIME}; the same command line goes on",
    )
    cli.add_device(parser)
    cli.add_threads(parser)
    return parser


@cli.command(_GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args, options = _parser().parse_args(words[:cut]), words[cut + 1 :]
    if not args.tables:
        print(_tables())
        return 0
    chosen_protocols(args.protocol)
    planner = Planner(args.preset, args.data, options, _weights(args.weights))
    plan = make_plan(chosen(args.tables), planner, list(dict.fromkeys(args.seeds)))
    if any(TABLES[name].figure for name in plan.tables):
        required("matplotlib.figure", "a figure", "matplotlib")  # drawing comes last: a missing package must show now
    if args.list:
        print("\n".join(run.name for run in plan.runs))
        return 0
    for sentence in plan.left_out:
        print(f"note: {sentence}", file=sys.stderr)
    folders = Folders(args.runs)
    if args.plan:
        print(state(plan, folders))
        return 0
    if args.show:
        _write(plan, folders, args)
        return 0
    if args.data is None and needs_data(args.preset):
        raise UserError(f"--preset {args.preset} needs --data: the folder of {DATA_SETS[args.preset].title}")
    return _do(plan, folders, args)


def _do(plan: Plan, folders: Folders, args: argparse.Namespace) -> int:
    runs = [_named(args.only, plan, folders)] if args.only else plan.runs
    settings = Settings(
        args.jobs, _devices(args.device, args.jobs), args.threads, args.minutes, args.protocol, args.data
    )
    if not args.only:
        _say(rest(plan, folders, args.jobs))
    outcome = Runner(folders, settings, _say).run(runs, lambda: rest(plan, folders, args.jobs))
    if not args.only:
        _write(plan, folders, args)
    if outcome.failed:
        raise UserError(f"{len(outcome.failed)} of {len(plan.runs)} runs failed: {'; '.join(outcome.failed.values())}")
    if not outcome.in_time:
        print(f"out of time: {_GOES_ON}", file=sys.stderr)
        return OUT_OF_TIME
    return 0


def _named(name: str, plan: Plan, folders: Folders) -> RunSpec:
    run = next((run for run in plan.runs if run.name == name), None)
    if run is None:
        raise UserError(f"--only {name} is no run of these tables: --list prints their names")
    for option, parent in run.parents.items():
        if not folders.find(parent).finished:
            raise UserError(f"--only {name} needs {parent.name} as {option}, which is not finished: train it first")
    return run


def _weights(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=")[::2] for text in given]
    for encoder, file in pairs:
        if not file or not Path(file).is_file():
            raise UserError(f"--weights {encoder}={file} names no file: write ENCODER=FILE")
    return dict(pairs)


def _devices(name: str | None, jobs: int) -> list[str | None]:
    """A device for each of the runs at once."""
    count = torch.cuda.device_count() if name is None and jobs > 1 else 0
    return [f"cuda:{index}" for index in range(count)] if count > 1 else [name]


def _tables() -> str:
    lines = ["of the paper, all together: all"]
    lines += [f"  {name:<10} {table.title}" for name, table in PAPER.items()]
    lines += ["ours"]
    lines += [f"  {name:<10} {table.title}" for name, table in OURS.items()]
    return "\n".join(
        [*lines, "", "python -m spot_fast.reproduce TABLE ... --plan prints the runs; --help has examples"]
    )


def _write(plan: Plan, folders: Folders, args: argparse.Namespace) -> None:
    """Prints the tables and writes them."""
    out = args.out or args.runs
    out.mkdir(parents=True, exist_ok=True)
    parts = [markdown(plan, folders, args.protocol)]
    for name in plan.tables:
        if TABLES[name].figure:
            stem = out / f"{plan.preset}-{name}"
            parts += draw(name, TABLES[name].title, plan.tables[name], folders, stem, args.protocol, args.device)
    text = "\n\n".join(filter(None, [*parts, *plan.left_out]))
    print(text)
    file = out / "-".join([plan.preset, *args.tables])
    atomic_write(file.with_suffix(".md"), lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    written = "md"
    if not all(TABLES[name].figure for name in plan.tables):  # a figure has a CSV file of its own
        write_csv(file.with_suffix(".csv"), plan, folders, args.protocol)
        written += " and .csv"
    _say(f"wrote {file}.{written}")


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
