"""python -m spot_fast.evaluate [RUN ...]: one table a run, and mean ± std over runs that differ in their seed only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import __version__
from .checkpoint import Run, atomic_write, find_folder, find_run, load_run
from .data import open_set
from .data.base import ImageSet
from .errors import UserError
from .evaluation import NOTES, Evaluation, evaluate, evaluation_table, mean_rows, mean_table
from .metrics import METRICS

PROTOCOL = "spot"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spot_fast.evaluate",
        description="Scores the decoder masks and slot masks of trained runs on their validation pictures, beside "
        "block masks and k-means on the same features. Several runs that differ in their seed only also get "
        "a table of mean ± standard deviation.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="folder of a run, or name of one below --runs (default: the newest finished)")  # fmt: skip
    parser.add_argument("--data", metavar="PATH", help="folder of the data set (default: the one the run trained on)")
    parser.add_argument("--runs", dest="root", default="runs", metavar="DIR",
                        help="folder with the runs (default: runs)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON; scores as fractions")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N pictures (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of slot noise and of k-means (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:N (default: a GPU where there is one)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        _evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, the JSON file was not written", file=sys.stderr)
        return 130
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    target = _json_target(args.json)
    device = _device(args.device)
    paths = [find_folder(name, args.root) for name in args.runs] or [find_run(args.root)]
    # All runs are opened before the first is measured: a missing one should not cost the others' minutes.
    runs = [load_run(path) for path in paths]
    results = []
    opened: dict[str, ImageSet] = {}
    for run in runs:
        result = evaluate(run.model.to(device), _val_set(run, args.data, opened), batch_size=args.batch_size,
                          seed=args.seed, limit=args.limit)  # fmt: skip
        results.append(result)
        print(_report(run, result), end="\n\n", flush=True)
        run.model.to("cpu")
    groups = _groups(runs)
    for group in groups:
        print(_summary(runs, results, group), end="\n\n")
    print("\n".join(NOTES))
    if target:
        text = json.dumps(_as_json(args, runs, results, groups), indent=2, ensure_ascii=False) + "\n"
        atomic_write(target, lambda partial: partial.write_text(text, encoding="utf-8"))
        print(f"wrote {target}")


def _json_target(name: str | None) -> Path | None:
    if name is None:
        return None
    target = Path(name)
    if target.is_dir() or not target.parent.is_dir():
        reason = "is a folder" if target.is_dir() else f"lies in {target.parent}, which is not a folder"
        raise UserError(f"--json {target} {reason}: give a file name in a folder that exists")
    return target


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}): use cpu, or cuda where there is a GPU") from error
    return device


def _val_set(run: Run, data: str | None, opened: dict[str, ImageSet]) -> ImageSet:
    """The run's validation pictures; runs on the same pictures share them."""
    config = replace(run.config, data=data) if data else run.config
    keys = ("preset", "data", "val_images", "image_size", "mask_size", "crop")
    key = json.dumps([getattr(config, name) for name in keys])
    if key not in opened:
        opened[key] = open_set(config, "val")
    return opened[key]


def _name(run: Run) -> str:
    return run.path.resolve().name


def _groups(runs: list[Run]) -> list[list[int]]:
    """Places of runs whose settings differ in nothing but the seed, two or more each."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(replace(run.config, seed=0).to_json(), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _report(run: Run, result: Evaluation) -> str:
    config = run.config
    losses = ", ".join(f"{loss:.4f} ({'order 0' if orders == 1 else f'{orders} orders'})"
                       for orders, loss in result.reconstruction.items())  # fmt: skip
    count = f"{result.images} picture{'s' * (result.images != 1)}"
    lines = [
        f"{_name(run)} · preset {config.preset} · stage {config.stage} · {count} of {result.data}, "
        f"masks {result.mask_size} × {result.mask_size} · protocol {PROTOCOL} · percent",
        "",
        evaluation_table(result),
        "",
        f"reconstruction loss {losses} · {1000 * result.seconds_per_image:.1f} ms a picture, "
        f"{1000 * result.metric_seconds_per_image:.1f} of them metrics",
    ]
    if result.skipped:
        lines.append(f"skipped {len(result.skipped)} that cannot be read:")
        lines += [f"  {label}: {reason}" for label, reason in result.skipped.items()]
    return "\n".join(lines)


def _summary(runs: list[Run], results: list[Evaluation], group: list[int]) -> str:
    names = ", ".join(_name(runs[place]) for place in group)
    config = runs[group[0]].config
    heading = f"mean ± std of {len(group)} runs · preset {config.preset} · stage {config.stage} · {names} · percent"
    return f"{heading}\n\n{mean_table([results[place] for place in group])}"


def _as_json(
    args: argparse.Namespace, runs: list[Run], results: list[Evaluation], groups: list[list[int]]
) -> dict:
    return {
        "protocol": PROTOCOL,
        "unit": "fraction",
        "versions": {"spot_fast": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "settings": {"seed": args.seed, "batch_size": args.batch_size, "limit": args.limit, "device": args.device},
        "runs": [_run_json(run, result) for run, result in zip(runs, results, strict=True)],
        "summary": [
            {
                "preset": runs[group[0]].config.preset,
                "stage": runs[group[0]].config.stage,
                "runs": [_name(runs[place]) for place in group],
                "rows": [
                    {"title": title, **{name: score and dict(zip(("mean", "std"), score, strict=True))
                                        for name, score in scores.items()}}
                    for title, scores in mean_rows([results[place] for place in group])
                ],
            }
            for group in groups
        ],
    }  # fmt: skip


def _run_json(run: Run, result: Evaluation) -> dict:
    return {
        "run": _name(run),
        "preset": run.config.preset,
        "stage": run.config.stage,
        "seed": run.config.seed,
        "data": result.data,
        "images": result.images,
        "skipped": result.skipped,
        "mask_size": result.mask_size,
        "reconstruction_loss": [{"orders": n, "loss": loss} for n, loss in result.reconstruction.items()],
        "seconds_per_image": result.seconds_per_image,
        "metric_seconds_per_image": result.metric_seconds_per_image,
        "rows": [
            {
                "masks": row.masks,
                "num_masks": row.num_masks,
                "orders": row.orders,
                "columns": row.columns,
                **{name: row.scores[name] for name in METRICS},
                "counted": row.counted,
            }
            for row in result.rows
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
