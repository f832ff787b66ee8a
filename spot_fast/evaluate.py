"""python -m spot_fast.evaluate [RUN ...]: a table for each run and protocol, and mean ± std over runs that differ in
their seed only; with --transfer one table of all runs over other data sets."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spot_fast import cli
from spot_fast.checkpoints.runs import open_runs
from spot_fast.data.base import ImageSet
from spot_fast.errors import UserError
from spot_fast.evaluation.json_results import json_results
from spot_fast.evaluation.options import add_scoring_options, open_val_set, score
from spot_fast.evaluation.protocols import PROTOCOLS, Protocol, chosen
from spot_fast.evaluation.size_plot import SizeRow, check_target, plot_sizes
from spot_fast.evaluation.tables import (
    NOTES,
    ScoredRun,
    group_report,
    mean_sizes,
    run_report,
    seed_groups,
    tables_by_protocol,
    write_csv,
)
from spot_fast.evaluation.transfer import Target, open_target, targets_of, transfer_report
from spot_fast.files import writable_target, write_json
from spot_fast.system.devices import usable_device


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        80,
        initial_indent=indent,
        subsequent_indent=indent + "    " * bool(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m spot_fast.evaluate",
        description=_wrapped(
            "Scores the decoder masks and slot masks of trained runs on their validation images, "
            "beside block masks and k-means on the same features. Several runs that differ in their "
            "seed only also get a table of mean ± standard deviation."
        ),
        epilog="\n".join(
            [
                "protocols, all scored in the same pass:",
                *(
                    _wrapped(text, indent)
                    for protocol in PROTOCOLS.values()
                    for text, indent in (
                        (f"{protocol.name}: {protocol.about}", "  "),
                        (f"[{protocol.source}]", "      "),
                    )
                ),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_scoring_options(parser, protocol="spot", protocol_note=": a table each")
    parser.add_argument(
        "--transfer",
        nargs="+",
        metavar="SET=PATH",
        help="instead: one table over these data sets, such as coco=COCO voc=VOCdevkit scenes, with the size of each "
        "one's own masks and the runs' own input size and slots",
    )
    parser.add_argument("--sizes", action="store_true", help="also print mBO_i by the size of the instances")
    parser.add_argument(
        "--size-plot",
        metavar="FILE",
        help="the same as an image, .png or .svg, of the first protocol: of one run or of runs that "
        "differ in their seed only every kind of masks, otherwise the decoder masks of each "
        "run",
    )
    parser.add_argument("--csv", metavar="FILE", help="also write a line for each image, kind of masks and protocol")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON; scores as fractions")
    cli.add_precision(
        parser,
        "float32",
        "of the model; bf16 is faster where the hardware has it and moves scores by a few tenths of a percent; tf32 is "
        "for GPUs",
    )
    cli.add_seed(parser, "slot noise and of k-means")
    return parser


@cli.command("files have the runs that were scored to their end, if any")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    protocols = chosen(args.protocol)
    targets = {
        name: writable_target(name, getattr(args, name.replace("-", "_"))) for name in ("json", "csv", "size-plot")
    }
    if targets["size-plot"]:
        check_target(targets["size-plot"])
    others = _targets(args)
    device = usable_device(args.device)
    # All runs are opened before the first is measured: a missing one should not cost the others' minutes.
    runs = open_runs(args.runs, args.root)
    scored: list[ScoredRun] = []
    opened: dict[str, ImageSet] = {}
    names = [protocol.name for protocol in protocols]
    for run in runs if others else ():  # and all sets, likewise
        for other in others:
            open_target(other, run.config, opened)
    for run in runs:
        for other in others or (None,):
            val_set = open_target(other, run.config, opened) if other else open_val_set(run.config, args.data, opened)
            of_set = other.name if other else ""
            result = score(run.model, val_set, names, args, device, " ".join([run.name, of_set]).strip(), of_set)
            if other:  # MOVi-C and MOVi-E have the same name
                result = replace(result, data=f"{of_set}: {result.data}")
            scored.append(ScoredRun(run.name, run.config, result, of_set))
            # On disk before it is printed: neither a terminal nor a later run can lose it.
            failed = _write(args, targets, protocols, scored, device)
        if not others:
            print(run_report(scored[-1], args.sizes), end="\n\n", flush=True)
    if others:
        print("\n\n".join(transfer_report(scored, name) for name in names), end="\n\n")
    else:
        for group in seed_groups([run.config for run in scored]):
            print(group_report([scored[index] for index in group], args.sizes), end="\n\n")
    print("\n".join(NOTES))
    if failed is not None:
        raise failed
    for target in filter(None, targets.values()):
        print(f"wrote {target}")


def _targets(args: argparse.Namespace) -> list[Target]:
    """The data sets of --transfer, none without it; UserError for options that are of a single set."""
    for option in ("data", "sizes", "size-plot"):
        if args.transfer and getattr(args, option.replace("-", "_")):
            raise UserError(f"--{option} is for one data set: leave it out, or --transfer")
    return targets_of(args.transfer or ())


def _write(
    args: argparse.Namespace,
    targets: dict[str, Path | None],
    protocols: list[Protocol],
    runs: list[ScoredRun],
    device: torch.device,
) -> UserError | None:
    """Writes the files of the options; returns the first error, to be raised after the scores are printed."""
    groups = [] if args.transfer else seed_groups([run.config for run in runs])
    settings = {name: getattr(args, name) for name in ("seed", "batch_size", "limit", "precision")}
    settings["device"] = str(device)
    writers = {
        "json": lambda target: write_json(target, json_results(runs, groups, protocols, settings)),
        "csv": lambda target: write_csv(target, [(run.name, run.evaluation) for run in runs]),
        "size-plot": lambda target: _plot(target, runs, groups),
    }
    failed = None
    for option, write in writers.items():
        if target := targets[option]:
            try:
                write(target)
            except UserError as error:
                failed = failed or error
    return failed


def _plot(target: Path, runs: list[ScoredRun], groups: list[list[int]]) -> None:
    """Every kind of masks of a single run or seed group; otherwise the decoder masks of each run."""
    first = runs[0].evaluation.tables[0]
    title = f"{runs[0].evaluation.data} · preset {runs[0].config.recipe} · protocol {first.protocol}"
    if len(runs) == 1:
        sizes = [(row.title, [mean for mean, _ in row.sizes], None) for row in first.rows]
    elif groups and len(groups[0]) == len(runs):
        title += f" · mean ± std of {len(runs)} runs"
        sizes = [
            (name, [cell and cell[0] for cell in cells], [cell[1] if cell else 0.0 for cell in cells])
            for name, cells in mean_sizes(tables_by_protocol(runs)[0])
        ]
    else:
        sizes = []
        for run in runs:
            row = [row for row in run.evaluation.tables[0].rows if row.masks == "decoder"][-1]
            sizes.append((f"{run.name}, {row.title}", [mean for mean, _ in row.sizes], None))
    rows = [SizeRow(*size, colour) for colour, size in enumerate(sizes)]
    plot_sizes(target, title, rows, [count for _, count in first.rows[0].sizes])


if __name__ == "__main__":
    sys.exit(cli.run(main))
