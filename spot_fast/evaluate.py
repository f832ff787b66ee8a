"""python -m spot_fast.evaluate [RUN ...]: a table for each run and protocol, and mean ± std over runs that differ in
their seed only."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spot_fast import __version__
from spot_fast.checkpoints.runs import Run, find_folder, find_run, load_run
from spot_fast.data import open_set
from spot_fast.data.base import ImageSet
from spot_fast.errors import UserError
from spot_fast.evaluation.baselines import published_layouts
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS
from spot_fast.evaluation.protocols import PROTOCOLS, Protocol, chosen
from spot_fast.evaluation.scoring import WORKERS, Evaluation, Row, Table, evaluate
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
from spot_fast.plain_json import write_json
from spot_fast.precision import PRECISIONS
from spot_fast.system import terminal
from spot_fast.system.cpu_threads import add_option, computing
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
    parser = argparse.ArgumentParser(
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
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a run, name of one below --runs, checkpoint file of the authors, or owner/name "
        "on the hub (default: the newest finished run)",
    )
    parser.add_argument("--data", metavar="PATH", help="folder of the data set (default: the one the run trained on)")
    parser.add_argument(
        "--runs", dest="root", default="runs", metavar="DIR", help="folder with the runs (default: runs)"
    )
    parser.add_argument(
        "--protocol",
        default="spot",
        metavar="NAME[,NAME]",
        help=f"{', '.join(PROTOCOLS)}, several with commas, or all: a table each (default: spot)",
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
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument(
        "--workers",
        type=int,
        default=WORKERS,
        metavar="N",
        help="threads that read images and masks ahead, 0 = none (default: one a processor, at most "
        f"8; here {WORKERS})",
    )
    add_option(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the model; bf16 is faster where the hardware has it and moves scores by a few tenths "
        "of a percent; tf32 is for GPUs (default: float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of slot noise and of k-means (default: 0)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: a GPU where there is one)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    terminal.any_character()
    args = _parser().parse_args(argv)
    try:
        _evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; files have the runs that were scored to their end, if any", file=sys.stderr)
        return 130
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    protocols = chosen(args.protocol)
    targets = {
        name: writable_target(name, getattr(args, name.replace("-", "_"))) for name in ("json", "csv", "size-plot")
    }
    if targets["size-plot"]:
        check_target(targets["size-plot"])
    device = usable_device(args.device)
    paths = [find_folder(name, args.root) for name in args.runs] or [find_run(args.root)]
    # All runs are opened before the first is measured: a missing one should not cost the others' minutes.
    runs = [load_run(path) for path in paths]
    results = []
    opened: dict[str, ImageSet] = {}
    for run in runs:
        val_set = open_val_set(run, args.data, opened)
        with computing(args.threads, device) as adapt:
            result = evaluate(
                run.model.to(device),
                val_set,
                protocols=[p.name for p in protocols],
                layouts=published_layouts(run.config.preset),
                batch_size=args.batch_size,
                seed=args.seed,
                limit=args.limit,
                workers=args.workers,
                precision=args.precision,
                between_batches=adapt,
            )
        results.append(result)
        run.model.to("cpu")
        # On disk before it is printed: neither a terminal nor a later run can lose it.
        failed = _write(args, targets, protocols, runs[: len(results)], results)
        print(_report(run, result, args.sizes), end="\n\n", flush=True)
    groups = alike_runs(runs)
    for group in groups:
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
) -> UserError | None:
    """Writes the files that were asked for; what went wrong with one is returned, to be told after the scores."""
    groups = alike_runs(runs)
    writers = {
        "json": lambda target: write_json(target, _as_json(args, protocols, runs, results, groups)),
        "csv": lambda target: write_csv(
            target, [(run_name(run), result) for run, result in zip(runs, results, strict=True)]
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


def writable_target(option: str, name: str | None) -> Path | None:
    """The file that --`option` names; UserError where it is a folder, lies in none, or cannot be written."""
    if name is None:
        return None
    target = Path(name)
    if target.is_dir() or not target.parent.is_dir():
        reason = "is a folder" if target.is_dir() else f"lies in {target.parent}, which is not a folder"
        raise UserError(f"--{option} {target} {reason}: give a file name in a folder that exists")
    try:
        # As `atomic_write` will: a read-only disk and full quotas have to show before the hours of scoring.
        with tempfile.TemporaryFile(dir=target.parent) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(
            f"--{option} {target} cannot be written ({error.strerror}): choose a file in a folder that you may write to"
        ) from None
    return target


def open_val_set(run: Run, data: str | None, opened: dict[str, ImageSet]) -> ImageSet:
    """The run's validation images; runs on the same images share them."""
    config = replace(run.config, data=data) if data else run.config
    keys = ("preset", "data", "val_images", "image_size", "mask_size", "crop")
    key = json.dumps([getattr(config, name) for name in keys])
    if key not in opened:
        opened[key] = open_set(config, "val")
    return opened[key]


def run_name(run: Run) -> str:
    """The name of its folder."""
    return run.path.resolve().name


def alike_runs(runs: list[Run]) -> list[list[int]]:
    """Places of runs whose settings differ in nothing but the seed, two or more each."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(replace(run.config, seed=0).to_json(), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


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
            f"{run_name(run)} · preset {config.recipe} · stage {config.stage} · {count} of {result.data}, "
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
    names = ", ".join(run_name(runs[place]) for place in group)
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
            rows.append((f"{run_name(run)}, {row.title}", [mean for mean, _ in row.sizes], [0.0] * len(row.sizes)))
    plot_sizes(target, title, rows, [number for _, number in first.rows[0].sizes])


def _as_json(
    args: argparse.Namespace,
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
            "device": args.device,
            "precision": args.precision,
        },
        "runs": [_run_json(run, result) for run, result in zip(runs, results, strict=True)],
        "summary": [
            {
                "preset": runs[group[0]].config.preset,
                "stage": runs[group[0]].config.stage,
                "protocol": tables[0].protocol,
                "runs": [run_name(runs[place]) for place in group],
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
        "run": run_name(run),
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
    sys.exit(terminal.run(main))
