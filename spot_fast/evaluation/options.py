"""Shared by the commands evaluate and report: options, a run's validation images, scoring as the options say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from spot_fast import cli
from spot_fast.config import Config, option_names
from spot_fast.data import open_set
from spot_fast.data.base import ImageSet
from spot_fast.evaluation.baselines import published_layouts
from spot_fast.evaluation.protocols import PROTOCOLS
from spot_fast.evaluation.scoring import WORKERS, Evaluation, evaluate
from spot_fast.model.spot import Spot
from spot_fast.system.cpu_threads import computing


def add_scoring_options(parser: argparse.ArgumentParser, *, protocol: str, protocol_note: str = "") -> None:
    """RUN ... and how runs are scored, but for --precision; protocol: the default, with a note in --help."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a run, name of one below --runs, checkpoint file of the authors, or owner/name "
        "on the hub (default: the newest finished run)",
    )
    parser.add_argument("--data", metavar="PATH", help="folder of the data set (default: the one the run trained on)")
    cli.add_runs_folder(parser, dest="root", help="folder with the runs (default: runs)")
    parser.add_argument(
        "--protocol",
        default=protocol,
        metavar="NAME[,NAME]",
        help=f"{', '.join(PROTOCOLS)}, several with commas, or all{protocol_note} (default: {protocol})",
    )
    parser.add_argument("--limit", action=cli.Number, least=0, default=0, help="only the first N images (default: all)")
    cli.add_adaptive_slots(parser, "; k-means' clusters are joined likewise")
    cli.add_batch_size(parser, 32)
    cli.add_workers(parser, WORKERS, "threads that read images and masks ahead, 0 = none")
    cli.add_threads(parser)
    cli.add_device(parser)


def open_val_set(config: Config, data: str | None, opened: dict[str, ImageSet]) -> ImageSet:
    """The validation images of a run, from the folder `data` if given; `opened` shares them among runs."""
    if data:
        config = replace(config, data=data)
    key = repr([getattr(config, name) for name in option_names("validation")])
    if key not in opened:
        opened[key] = open_set(config, "val")
    return opened[key]


def score(
    model: Spot,
    val_set: ImageSet,
    protocols: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
    name: str,
    data_set: str = "",
) -> Evaluation:
    """Scores a model on `device`; afterwards it is on the CPU, so that the next one has the memory.

    name: of the run, for the progress bar. data_set: whose published block masks are scored too; "" for the run's.
    """
    if args.adaptive_slots is not None:
        model.config = replace(model.config, adaptive_slots=args.adaptive_slots)
    with computing(args.threads, device) as adapt:
        result = evaluate(
            model.to(device),
            val_set,
            protocols=protocols,
            layouts=published_layouts(data_set or model.config.preset),
            batch_size=args.batch_size,
            seed=args.seed,
            limit=args.limit,
            workers=args.workers,
            precision=args.precision,
            title=f"{name}: scores",
            between_batches=adapt,
        )
    model.to("cpu")
    return result
