"""Exports a trained model as files that run without this package, and compares each with PyTorch.

In the folder OUT, which must be free:
  model.pt2    torch.export's format, ATen operators for a CPU: torch.export.load("model.pt2").module()(images)
  model.onnx   ONNX, one file of standard operators with its settings as metadata; segment --onnx takes it

Input, for any number of images B (S: the side that the model was trained at):
  images           uint8 [B, 3, S, S], RGB; pixels as they are, normalisation is part of the graph
Outputs, float32 but for the labels:
  slots            [B, K, U]
  slot_masks       [B, N, K], soft, on the grid of N patches
  slot_labels      uint8 [B, S, S], the slot masks resized bilinearly, then the largest
  decoder_masks    with --decoder, likewise
  decoder_labels   with --decoder, likewise

Gaussian initial slots are stored as a constant, so that results are those of spot_fast.segment. Every file is run on 64
images, in batches of 1, 3 and more. Unless its labels are PyTorch's on 99.9 % of the pixels, nothing is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import spot_fast
from spot_fast import cli
from spot_fast.checkpoints.runs import find_folder, load_run
from spot_fast.checkpoints.shared_folder import check_free
from spot_fast.data import Scenes
from spot_fast.data.decoding.opening import open_rgb
from spot_fast.errors import UserError
from spot_fast.exporting.comparison import FEWEST, Agreement, batches, compare, require_agreement
from spot_fast.exporting.formats import FORMATS, Runner, require_onnx
from spot_fast.exporting.graph import SegmentationGraph, traced
from spot_fast.exporting.latency import in_pytorch, measure
from spot_fast.segmentation.exported_model import MASKS, SLOTS, ExportedModel
from spot_fast.segmentation.files import find_images
from spot_fast.segmentation.grids import resized
from spot_fast.segmentation.segmenter import Segmenter, model_segmenter
from spot_fast.system.cpu_threads import available_cores, computing
from spot_fast.system.machine import cpu_name

_COMPARED = 64  # images
_CPU = torch.device("cpu")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m spot_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="run folder, checkpoint file of the authors, or owner/name on the hub"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=tuple(FORMATS),
        default=list(FORMATS),
        metavar="FORMAT",
        help=f"of {', '.join(FORMATS)} (default: all)",
    )
    parser.add_argument("--decoder", action="store_true", help="also give the decoder masks and their label map")
    parser.add_argument(
        "--orders",
        choices=("0", "all"),
        help="of the decoder masks: patch order 0, or the average over all nine (default: 0)",
    )
    cli.add_adaptive_slots(parser)
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help=f"compare on the first {_COMPARED} images of FOLDER (default: generated scenes)",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="also time the graph on this CPU, one image and --batch-size of them, in PyTorch, under torch.compile and "
        "in ONNX Runtime",
    )
    cli.add_batch_size(parser, 16, "largest batch that is compared and timed")
    cli.add_threads(parser)
    return parser.parse_args(argv)


@cli.command("OUT is whole or not there")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.orders and not args.decoder:
        raise UserError(f"--orders {args.orders} belongs to the decoder masks: add --decoder")
    check_free(args.out)
    if not args.out.parent.is_dir():
        raise UserError(f"OUT {args.out} lies in {args.out.parent}, which is not a folder: make it, or choose another")
    if "onnx" in args.formats:
        require_onnx()
    model = load_run(find_folder(args.run)).model
    if args.adaptive_slots is not None:
        model.config = replace(model.config, adaptive_slots=args.adaptive_slots)
    graph = SegmentationGraph(model, decoder=args.decoder, orders=args.orders or "0")
    reference = model_segmenter(model, orders=graph.orders)
    images = _images(args.images, reference)
    threads = args.threads or available_cores()
    with (
        computing(threads, _CPU),
        tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as name,
    ):
        folder = Path(name) / "out"
        folder.mkdir()
        runners = _write(graph, _about(graph, Path(args.run).name), args.formats, folder, threads)
        agreements = compare(runners, reference, batches(images, args.batch_size))
        require_agreement(agreements)
        os.replace(folder, args.out)  # one that exists is empty, as `check_free` saw
        _print_agreement(args.out, agreements, len(images))
        if args.latency:
            _print_latency(graph, runners, reference, images[: args.batch_size], threads)


def _about(graph: SegmentationGraph, title: str) -> ExportedModel:
    config = graph.model.config
    return ExportedModel(
        title=title,
        image_size=config.image_size,
        patch_size=graph.model.encoder.patch_size,
        num_slots=config.num_slots,
        masks=",".join(graph.kinds),
        orders=graph.orders if graph.decoder else "none",
        adaptive_slots=config.adaptive_slots,
        normalisation="ImageNet's mean and standard deviation, inside the graph",
        spot_fast=spot_fast.__version__,
    )


def _images(folder: str | None, reference: Segmenter) -> Tensor:
    """uint8 [B, 3, S, S] on which formats are compared."""
    size, patch = reference.size, reference.patch
    if folder is None:
        return Scenes(_COMPARED, "val", size=size).images
    paths = [path for path, _ in find_images([folder], Path(folder))][:_COMPARED]
    if len(paths) < FEWEST:
        raise UserError(f"--images {folder} has too few images, {len(paths)}: give {FEWEST} or more, or leave it out")
    return torch.stack([resized(open_rgb(path, upright=True), (size // patch,) * 2, patch) for path in paths])


def _write(
    graph: SegmentationGraph, about: ExportedModel, formats: Sequence[str], folder: Path, threads: int
) -> dict[str, Runner]:
    """Writes the files; returns them opened."""
    program, runners = traced(graph), {}
    for name in dict.fromkeys(formats):
        path = folder / FORMATS[name].file
        FORMATS[name].write(program, about, path)
        runners[name] = FORMATS[name].open(path, threads)
    return runners


def _print_agreement(out: Path, agreements: Mapping[str, Agreement], images: int) -> None:
    print(f"compared with PyTorch on {images} images:")
    for name, agreement in agreements.items():
        file = out / FORMATS[name].file
        print(f"  {file}, {file.stat().st_size / 1e6:.1f} MB: {_in_words(agreement)}")
    if "onnx" in agreements:
        print(f"next:\n  python -m spot_fast.segment IMAGE --onnx {out / FORMATS['onnx'].file}")


def _in_words(agreement: Agreement) -> str:
    labels = ", ".join(f"{100 * agreement.share(kind):.3f} % of {kind} labels equal" for kind in agreement.equal)
    worst = ", ".join(f"{name} {value:.1e}" for name, value in agreement.worst.items())
    return f"{labels}; largest difference of {worst}"


def _print_latency(
    graph: SegmentationGraph, runners: Mapping[str, Runner], reference: Segmenter, images: Tensor, threads: int
) -> None:
    timed = in_pytorch(graph) | ({"ONNX Runtime": runners["onnx"]} if "onnx" in runners else {})
    agreements = compare(timed, reference, [images[:1], images])
    require_agreement(agreements)
    print(f"\n{cpu_name()}, {threads} threads, float32, medians of runs that take turns\n")
    print(f"| | ms, 1 image | images/s, batch {len(images)} | labels equal | largest difference: slots, masks |")
    print("|---|---|---|---|---|")
    for name, latency in measure(timed, images).items():
        agreement = agreements[name]
        equal = min(agreement.share(kind) for kind in agreement.equal)
        masks = max(agreement.worst[output] for output in MASKS.values() if output in agreement.worst)
        print(
            f"| {name} | {latency.ms:.1f} | {latency.images_per_s:.1f} | {100 * equal:.3f} % "
            f"| {agreement.worst[SLOTS]:.1e}, {masks:.1e} |"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
