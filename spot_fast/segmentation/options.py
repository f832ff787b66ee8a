"""The options of the segment command, and which of them do not fit together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spot_fast import cli
from spot_fast.errors import UserError
from spot_fast.evaluation.scoring import WORKERS
from spot_fast.model.vits import SCENES_ENCODER
from spot_fast.segmentation.batch import MAX_SHEET
from spot_fast.segmentation.grids import FITS
from spot_fast.segmentation.segmenter import CLUSTER_SIZE

MASKS = {"decoder": ("decoder",), "slots": ("slots",), "both": ("decoder", "slots")}  # --masks → kinds


def parse(argv: Sequence[str] | None, about: str) -> argparse.Namespace:
    """The command line; about: the command, for --help. UserError where options do not fit together."""
    parser = cli.Parser(
        prog="python -m spot_fast.segment", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--masks", choices=tuple(MASKS), help="which masks to write and show (default: both)")
    parser.add_argument("--soft", action="store_true", help="also write soft masks")
    parser.add_argument("--slots", action="store_true", help="also write the slots, a file an image")
    parser.add_argument(
        "--slots-file", type=Path, metavar="FILE.safetensors", help="also write the slots of all images, as one file"
    )
    parser.add_argument("--coco", type=Path, metavar="FILE.json", help="also write the segments in COCO's format")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE.json",
        help="for --coco: a COCO annotation file, whose ids, names and sizes of images are taken; images that it does "
        "not list are left out",
    )
    parser.add_argument("--no-labels", dest="labels", action="store_false", help="write no label maps")
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a call that was stopped: images that --out has already, with the same settings, are not done "
        "again",
    )
    cli.add_batch_size(parser, 16, "images at a time, fewer where grids are larger; changes nothing but rounding")
    cli.add_workers(parser, WORKERS, "threads that read and write images", least=1)
    cli.add_threads(parser)
    cli.add_precision(
        parser, "auto", "of the model; auto is bf16 where the device multiplies it in hardware, else float32"
    )
    cli.add_device(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if not args.images and not args.scenes:
        raise UserError(
            "nothing to segment: name images, folders or lists, or ask for generated images with --scenes N"
        )
    if args.onnx:
        _check_onnx(args)
    if args.run and args.encoder:
        raise UserError(f"--run {args.run} has its own encoder: drop --encoder {args.encoder} or --run")
    if args.encoder and (args.masks or args.slots or args.slots_file):
        option = f"--masks {args.masks}" if args.masks else "--slots" if args.slots else "--slots-file"
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
    _check_files(args)


def _check_files(args: argparse.Namespace) -> None:
    """UserError for files that do not fit."""
    if args.grid and args.grid.suffix.lower() != ".png":
        raise UserError(f"--grid {args.grid}: give the name of a .png file")
    if args.grid and args.grid.is_dir():
        raise UserError(f"--grid {args.grid} is a folder: give the name of a .png file")
    if args.grid and args.resume:
        raise UserError(f"--grid {args.grid} shows the images of one whole call: leave it out, or --resume")
    for option, target, ending in (
        ("coco", args.coco, ".json"),
        ("slots-file", args.slots_file, ".safetensors"),
    ):
        if target and (target.suffix.lower() != ending or target.is_dir()):
            raise UserError(f"--{option} {target}: give the name of a {ending} file")
    if args.annotations and not args.coco:
        raise UserError(f"--annotations {args.annotations} says what images are called in --coco FILE.json: add that")
    if args.annotations and args.annotations.resolve() == args.coco.resolve():
        raise UserError(f"--coco {args.coco} is the file of --annotations: choose another name")
    if args.annotations and args.scenes:
        raise UserError(f"--annotations {args.annotations} lists no generated images: leave out --scenes")
    if not (args.labels or args.overlay or args.soft or args.slots or args.coco or args.slots_file or args.grid):
        raise UserError(
            "--no-labels and --no-overlay leave nothing to write: add --coco, --slots-file, --soft or --slots"
        )


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
