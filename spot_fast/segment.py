"""Segments images with a trained model, or by k-means on an encoder's features.

For each image, in the folder of --out:
  NAME_overlay.png        the image, its decoder masks, its slot masks
  NAME_labels.png         the decoder masks as an indexed PNG of the image's size: a pixel's value is its slot
  NAME_slot_labels.png    the slot masks likewise
  NAME_soft.safetensors   with --soft: "decoder" and "slots" [K, h, w], float16, on the grid of patches; resized
                          bilinearly (corners not aligned) to "height" and "width" of the metadata, the largest gives
                          the label map, but for rounding
  NAME_slots.safetensors  with --slots: "slots" [K, U]
Without --run the newest finished run is taken. With --encoder instead of a run, the masks are k-means clusters of
that encoder's features. With --onnx instead of a run, ONNX Runtime runs a file of spot_fast.export, on the CPU.

Images may have any size and shape. --fit says how the model sees them:
  stretch      The whole image is resized to the square that the model was trained on. Fast; shapes are squeezed and
               small objects are lost.
  interpolate  The whole image in its own shape, the ViT's positions interpolated to its grid of patches. A square image
               without --size gives the same bits as stretch; the model was not trained on other grids.

The segment along most of the border is grey, every other one has the colour whose anchor in the image is nearest:
colours depend on where segments are, not on the numbers of slots. A file in --out is overwritten if it is of the same
image and model, else only with --overwrite.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from spot_fast import cli
from spot_fast.errors import UserError
from spot_fast.evaluation.scoring import WORKERS
from spot_fast.model.vits import SCENES_ENCODER
from spot_fast.segmentation.batch import MAX_SHEET, Outputs, segment_all, sources_of
from spot_fast.segmentation.files import check_overwriting, find_images, output_names, save
from spot_fast.segmentation.grids import FITS, Fit, fit_of
from spot_fast.segmentation.onnx_segmenter import onnx_segmenter
from spot_fast.segmentation.overlays import contact_sheet
from spot_fast.segmentation.segmenter import CLUSTER_SIZE, Segmenter, cluster_segmenter, run_segmenter
from spot_fast.system.cpu_threads import available_cores, computing
from spot_fast.system.devices import usable_device

_MOST_LINES = 10  # with more images none gets a line of its own
_MASKS = {"decoder": ("decoder",), "slots": ("slots",), "both": ("decoder", "slots")}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m spot_fast.segment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE|FOLDER|LIST",
        help="image files, folders to search for images, or text files that list images, one a line",
    )
    parser.add_argument(
        "--run",
        metavar="RUN",
        help="run folder, checkpoint file of the authors, "
        "or owner/name on the hub (default: the newest finished run under runs/)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("segments"), metavar="DIR", help="where to write (default: segments)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="also overwrite files that are not of the same image and model"
    )
    parser.add_argument("--fit", choices=FITS, default="stretch", help="see above (default: stretch)")
    parser.add_argument(
        "--size",
        type=int,
        metavar="S",
        help="shorter side in pixels at which the model sees an image, for interpolate, rounded to "
        "patches (default: the side of its square); with --encoder also the side of the "
        f"square for stretch (default: {CLUSTER_SIZE}, {SCENES_ENCODER}: 96)",
    )
    parser.add_argument(
        "--orders",
        choices=("0", "all"),
        help="patch order 0, or the average over all nine (default: 0, with --onnx those of the file)",
    )
    cli.add_adaptive_slots(parser)
    parser.add_argument("--masks", choices=tuple(_MASKS), help="which masks to write and show (default: both)")
    parser.add_argument("--soft", action="store_true", help="also write soft masks")
    parser.add_argument("--slots", action="store_true", help="also write the slots")
    parser.add_argument("--no-overlay", dest="overlay", action="store_false", help="write no overlays: faster")
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help=f"also write a contact sheet of the first {MAX_SHEET} images and their masks, captioned",
    )
    parser.add_argument(
        "--scenes",
        action=cli.Number,
        least=0,
        default=0,
        help="also segment N generated validation scenes; needs no image",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="without a run: model.onnx of spot_fast.export")
    parser.add_argument("--encoder", metavar="NAME", help="without a run: cluster the features of this timm ViT")
    parser.add_argument("--encoder-weights", metavar="FILE", help="its weights (default: timm's own, from the hub)")
    parser.add_argument("--clusters", type=int, default=6, metavar="K", help="clusters for --encoder (default: 6)")
    cli.add_batch_size(parser, 16, "images at a time, fewer where grids are larger; changes nothing but rounding")
    cli.add_workers(parser, WORKERS, "threads that read and write images", least=1)
    cli.add_threads(parser)
    cli.add_precision(
        parser, "auto", "of the model; auto is bf16 where the device multiplies it in hardware, else float32"
    )
    cli.add_device(parser)
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if not args.images and not args.scenes:
        raise UserError(
            "nothing to segment: name images, folders or lists, or ask for generated images with --scenes N"
        )
    if args.onnx:
        _check_onnx(args)
    if args.run and args.encoder:
        raise UserError(f"--run {args.run} has its own encoder: drop --encoder {args.encoder} or --run")
    if args.encoder and (args.masks or args.slots):
        option = f"--masks {args.masks}" if args.masks else "--slots"
        raise UserError(f"{option} belongs to a run: an encoder has clusters only, drop it or --encoder {args.encoder}")
    if args.encoder and args.adaptive_slots is not None:
        raise UserError(f"--adaptive-slots belongs to a run: drop it or --encoder {args.encoder}")
    if not args.encoder and args.encoder_weights:
        raise UserError("--encoder-weights belongs to --encoder NAME: a run keeps the encoder it was trained with")
    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: use a multiple of the encoder's patch size")
    if not args.encoder and args.size and args.fit == "stretch":
        raise UserError(
            f"--size {args.size}: a run keeps the size it was trained with; add --fit interpolate, "
            "or cluster an --encoder NAME"
        )
    if args.grid and args.grid.suffix.lower() != ".png":
        raise UserError(f"--grid {args.grid}: give the name of a .png file")
    if args.grid and args.grid.is_dir():
        raise UserError(f"--grid {args.grid} is a folder: give the name of a .png file")


def _check_onnx(args: argparse.Namespace) -> None:
    """UserError for options that an exported file cannot follow."""
    options = (
        ("--run", args.run, "is another model"),
        ("--encoder", args.encoder, "is another model"),
        ("--fit", args.fit if args.fit != "stretch" else None, "needs other grids of patches"),
        ("--size", args.size, "needs other grids of patches"),
        ("--precision", args.precision if args.precision not in ("auto", "float32") else None, "is not the file's"),
        ("--device", args.device if args.device != "cpu" else None, "is not the CPU"),
    )
    for option, value, problem in options:
        if value:
            raise UserError(f"{option} {value} {problem}, which --onnx {args.onnx} cannot give: drop one of the two")


def _onnx_segmenter(args: argparse.Namespace) -> Segmenter:
    segmenter, about = onnx_segmenter(args.onnx, args.threads or available_cores())
    if args.masks and not set(_MASKS[args.masks]) <= set(about.kinds):
        raise UserError(f"--masks {args.masks}: {args.onnx} has slot masks only, export it with --decoder")
    if args.orders and args.orders != about.orders:
        raise UserError(
            f"--orders {args.orders}: {args.onnx} has orders {about.orders}, export it with --decoder --orders "
            f"{args.orders}"
        )
    if args.adaptive_slots not in (None, about.adaptive_slots):
        given = "--adaptive-slots" if args.adaptive_slots else "--no-adaptive-slots"
        raise UserError(f"{given}: {args.onnx} was exported without it, export it with {given}")
    args.masks = (args.masks or "both") if "decoder" in about.kinds else "slots"
    args.orders = about.orders
    return segmenter


def _segmenter(args: argparse.Namespace, device: str) -> Segmenter:
    if args.onnx:
        return _onnx_segmenter(args)
    if not args.encoder:
        return run_segmenter(
            args.run,
            orders=args.orders or "0",
            device=device,
            precision=args.precision,
            adaptive_slots=args.adaptive_slots,
        )
    return cluster_segmenter(
        args.encoder,
        args.encoder_weights,
        clusters=args.clusters,
        size=args.size,
        device=device,
        precision=args.precision,
    )


def _fit(args: argparse.Namespace, segmenter: Segmenter) -> Fit:
    fit = fit_of(args.fit, segmenter.size, segmenter.patch, args.size)
    fewest = math.prod(fit(1, 1))  # a square image has the smallest grid
    if args.encoder and args.clusters > fewest:
        raise UserError(f"--clusters {args.clusters}: with --size {args.size} use 1 to {fewest}")
    return fit


@cli.command("what was written is whole")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    _check(args)
    files = find_images(args.images, args.out, lambda note: print(f"note: {note}", file=sys.stderr))
    paths = [path for path, _ in files]
    if args.grid and args.grid.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--grid {args.grid} is one of the images: choose another name")
    device = usable_device("cpu" if args.onnx else args.device)
    segmenter = _segmenter(args, str(device))
    fit = _fit(args, segmenter)
    kinds = _MASKS[args.masks or "both"] if "slots" in segmenter.kinds else segmenter.kinds
    metadata = {"fit": args.fit, "model": segmenter.title, **({} if args.encoder else {"orders": args.orders or "0"})}
    outputs = Outputs(args.out, kinds, args.overlay, args.soft, args.slots, metadata)
    images = sources_of(paths, args.scenes, segmenter.size, segmenter.identity)
    names = output_names([stem for _, stem in files] + [f"scene_{i:03d}" for i in range(args.scenes)], paths, args.out)
    if not args.overwrite:
        check_overwriting(args.out, names, [image.origin for image in images], outputs.endings)
    print(f"{segmenter.title}, {segmenter.size} px, {device}", flush=True)
    start = time.perf_counter()
    with computing(args.threads, device) as adapt:
        results = segment_all(
            images,
            names,
            segmenter,
            fit,
            outputs,
            batch_size=args.batch_size,
            workers=args.workers,
            contact_sheet=args.grid is not None,
            between_batches=adapt,
        )
    seconds = time.perf_counter() - start
    if results.rows:
        rows = [row for _, row in sorted(results.rows.items())]
        save(contact_sheet(rows, columns=1 if len(rows) < 4 else 2 if len(rows) <= 24 else 4), args.grid)
    if len(images) <= _MOST_LINES:
        for index, (width, height) in sorted(results.sizes.items()):
            print(f"{args.out / names[index]}_*  {width} x {height}")
    if results.rows:
        print(args.grid, f"(the first {MAX_SHEET} of {len(images)} images)" if len(images) > MAX_SHEET else "")
    if results.skipped:
        print(f"{results.skipped} of {len(images)} could not be read and were skipped", file=sys.stderr)
    if not (done := len(results.sizes)):
        raise UserError("no image could be read: nothing was written")
    print(
        f"{done} image{'s' * (done != 1)} in {seconds:.1f} s, {done / seconds:.1f} images/s: "
        f"{args.out}/NAME_{{{','.join(outputs.endings)}}}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
