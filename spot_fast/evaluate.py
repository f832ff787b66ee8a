"""python -m spot_fast.evaluate [RUN ...]: a table for each run and protocol, and mean ± std over runs that differ in
their seed only."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from spot_fast import __version__, cli
from spot_fast.checkpoints.runs import Run, alike_but_for_seed, open_runs
from spot_fast.data.base import ImageSet
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS
from spot_fast.evaluation.options import add_scoring_options, open_val_set, score
from spot_fast.evaluation.protocols import PROTOCOLS, Protocol, chosen
from spot_fast.evaluation.scoring import Evaluation, Row, Table
from spot_fast.evaluation.size_plot import check_target, plot_sizes
from spot_fast.evaluation.tables import (
    NOTES,
    evaluation_table,
    mean_rows,
    mean_size_table,
    mean_sizes,
    mean_table,
    size_table,
    unlabelled_line,
    write_csv,
)
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
    device = usable_device(args.device)
    runs = open_runs(args.runs, args.root)
    results = []
    opened: dict[str, ImageSet] = {}
    for run in runs:
        val_set = open_val_set(run.config, args.data, opened)
        results.append(score(run.model, val_set, [protocol.name for protocol in protocols], args, device))
        # On disk before it is printed: neither a terminal nor a later run can lose it.
        failed = _write(args, targets, protocols, runs[: len(results)], results, device)
        print(_report(run, results[-1], args.sizes), end="\n\n", flush=True)
    for group in alike_but_for_seed(runs):
        print(_summary(runs, results, group, args.sizes), end="\n\n")
    print("\n".join(NOTES))
    if failed is not None:
        raise failed
    for target in filter(None, targets.values()):
        print(f"wrote {target}")


def _write(
    args: argparse.Namespace,
    targets: dict[str, Path | None],
    protocols: list[Protocol],
    runs: list[Run],
    results: list[Evaluation],
    device: torch.device,
) -> UserError | None:
    """Writes the files that were asked for; what went wrong with one is returned, to be reported after the scores."""
    groups = alike_but_for_seed(runs)
    writers = {
        "json": lambda target: write_json(target, _as_json(args, device, protocols, runs, results, groups)),
        "csv": lambda target: write_csv(
            target, [(run.name, result) for run, result in zip(runs, results, strict=True)]
        ),
        "size-plot": lambda target: _plot(target, runs, results, groups),
    }
    failed = None
    for option, write in writers.items():
        if target := targets[option]:
            try:
                write(target)
            except UserError as error:
                failed = failed or error
    return failed


def _report(run: Run, result: Evaluation, sizes: bool) -> str:
    config = run.config
    losses = ", ".join(
        f"{loss:.4f} ({'order 0' if orders == 1 else f'{orders} orders'})"
        for orders, loss in result.reconstruction.items()
    )
    count = f"{result.images} image{'s' * (result.images != 1)}"
    lines = []
    for scored in result.tables:
        lines += [
            f"{run.name} · preset {config.recipe} · stage {config.stage} · {count} of {result.data}, "
            f"masks {scored.mask_size} × {scored.mask_size} · protocol {scored.protocol} · percent",
            "",
            evaluation_table(scored),
            "",
        ]
        if sizes:
            lines += ["mBO_i by size of the instance, percent of the label map", "", size_table(scored), ""]
        if line := unlabelled_line(scored):
            lines += [line, ""]
    lines += [
        f"reconstruction loss {losses} · {1000 * result.seconds_per_image:.1f} ms an image, "
        f"{1000 * result.metric_seconds_per_image:.1f} of them metrics",
    ]
    if result.skipped:
        lines.append(f"skipped {len(result.skipped)} that cannot be read:")
        lines += [f"  {label}: {reason}" for label, reason in result.skipped.items()]
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def _summary(runs: list[Run], results: list[Evaluation], group: list[int], sizes: bool) -> str:
    names = ", ".join(runs[place].name for place in group)
    config = runs[group[0]].config
    parts = []
    for tables in _tables(results, group):
        parts.append(
            f"mean ± std of {len(group)} runs · preset {config.recipe} · stage {config.stage} · {names} · "
            f"protocol {tables[0].protocol} · percent\n\n{mean_table(tables)}"
        )
        if sizes:
            parts.append(f"mBO_i by size of the instance, percent of the label map\n\n{mean_size_table(tables)}")
    return "\n\n".join(parts)


def _tables(results: list[Evaluation], group: list[int]) -> list[list[Table]]:
    """The group's tables, protocol by protocol."""
    return [list(tables) for tables in zip(*(results[place].tables for place in group), strict=True)]


def _plot(target: Path, runs: list[Run], results: list[Evaluation], groups: list[list[int]]) -> None:
    first = results[0].tables[0]
    config = runs[0].config
    title = f"{results[0].data} · preset {config.recipe} · protocol {first.protocol}"
    if len(runs) == 1:
        rows = [(row.title, [mean for mean, _ in row.sizes], [0.0] * len(row.sizes)) for row in first.rows]
    elif groups and len(groups[0]) == len(runs):
        title += f" · mean ± std of {len(runs)} runs"
        rows = [
            (name, [cell and cell[0] for cell in cells], [cell[1] if cell else 0.0 for cell in cells])
            for name, cells in mean_sizes(_tables(results, groups[0])[0])
        ]
    else:
        rows = []
        for run, result in zip(runs, results, strict=True):
            row = [r for r in result.tables[0].rows if r.masks == "decoder"][-1]
            rows.append((f"{run.name}, {row.title}", [mean for mean, _ in row.sizes], [0.0] * len(row.sizes)))
    plot_sizes(target, title, rows, [number for _, number in first.rows[0].sizes])


def _as_json(
    args: argparse.Namespace,
    device: torch.device,
    protocols: list[Protocol],
    runs: list[Run],
    results: list[Evaluation],
    groups: list[list[int]],
) -> dict:
    return {
        "protocol": protocols[0].name,
        "protocols": {protocol.name: {"about": protocol.about, "source": protocol.source} for protocol in protocols},
        "unit": "fraction",
        "versions": {"spot_fast": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "settings": {
            "seed": args.seed,
            "batch_size": args.batch_size,
            "limit": args.limit,
            "device": str(device),
            "precision": args.precision,
        },
        "runs": [_run_json(run, result) for run, result in zip(runs, results, strict=True)],
        "summary": [
            {
                "preset": runs[group[0]].config.preset,
                "stage": runs[group[0]].config.stage,
                "protocol": tables[0].protocol,
                "runs": [runs[place].name for place in group],
                "rows": [
                    {
                        "title": title,
                        **{name: _spread(score) for name, score in scores.items()},
                        "sizes": [_bin(place, mbo_i=_spread(cell)) for place, cell in enumerate(cells)],
                    }
                    for (title, scores), (_, cells) in zip(mean_rows(tables), mean_sizes(tables), strict=True)
                ],
            }
            for group in groups
            for tables in _tables(results, group)
        ],
    }


def _spread(score: tuple[float, float] | None) -> dict[str, float] | None:
    return score and dict(zip(("mean", "std"), score, strict=True))


def _bin(place: int, **values: object) -> dict:
    """Of instances larger than "above" and at most "to", as fractions of the label map."""
    return {"above": SIZE_BINS[place], "to": SIZE_BINS[place + 1], **values}


def _run_json(run: Run, result: Evaluation) -> dict:
    tables = [
        {
            "protocol": scored.protocol,
            "mask_size": scored.mask_size,
            "without_object": scored.unlabelled,
            "rows": [_row_json(row) for row in scored.rows],
        }
        for scored in result.tables
    ]
    return {
        "run": run.name,
        "preset": run.config.preset,
        "stage": run.config.stage,
        "seed": run.config.seed,
        "data": result.data,
        "images": result.images,
        "skipped": result.skipped,
        "notes": result.notes,
        "mask_size": tables[0]["mask_size"],  # these two are the first protocol's, for readers that know one only
        "rows": tables[0]["rows"],
        "reconstruction_loss": [{"orders": n, "loss": loss} for n, loss in result.reconstruction.items()],
        "seconds_per_image": result.seconds_per_image,
        "metric_seconds_per_image": result.metric_seconds_per_image,
        "tables": tables,
    }


def _row_json(row: Row) -> dict:
    return {
        "masks": row.masks,
        "num_masks": row.num_masks,
        "orders": row.orders,
        "columns": row.columns,
        **{name: row.scores[name] for name in METRICS},
        "counted": row.counted,
        "sizes": [_bin(place, mbo_i=mean, instances=number) for place, (mean, number) in enumerate(row.sizes)],
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
