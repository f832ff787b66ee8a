"""Segments images with a trained model, or by k-means on an encoder's features.

For each image, in the folder of --out:
  NAME_overlay.png        the image, its decoder masks, its slot masks
  NAME_labels.png         the decoder masks as an indexed PNG of the image's size: a pixel's value is its slot
  NAME_slot_labels.png    the slot masks likewise
  NAME_soft.safetensors   with --soft: "decoder" and "slots" [K, h, w], float16, on the grid of patches; resized
                          bilinearly (corners not aligned) to "height" and "width" of the metadata, the largest gives
                          the label map, but for rounding
  NAME_slots.safetensors  with --slots: "slots" [K, U]
  .segments.jsonl         once: the record of what was written, with which --resume goes on
--coco FILE.json also writes the segments of all images as a data set in COCO's format: region, area, box, and as score
the mean of a mask over the patches where it is the largest. --slots-file FILE.safetensors writes all slots into one
file: "slots" [images, K, U], the images' names in the metadata.
Without --run the newest finished run is taken. With --encoder instead of a run, the masks are k-means clusters of
that encoder's features.

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
from dataclasses import replace
from pathlib import Path

from spot_fast import cli
from spot_fast.errors import UserError
from spot_fast.evaluation.scoring import WORKERS
from spot_fast.model.vits import SCENES_ENCODER
from spot_fast.segmentation import coco, slot_file
from spot_fast.segmentation.batch import MAX_SHEET, Finished, Outputs, Results, Source, segment_all, sources_of
from spot_fast.segmentation.collected import Collected
from spot_fast.segmentation.files import check_overwriting, find_images, make_folder, output_names, save
from spot_fast.segmentation.grids import FITS, Fit, fit_of
from spot_fast.segmentation.overlays import contact_sheet
from spot_fast.segmentation.segmenter import CLUSTER_SIZE, Segmenter, cluster_segmenter, run_segmenter
from spot_fast.system.cpu_threads import computing
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
        "--orders", choices=("0", "all"), default="0", help="patch order 0, or the average over all nine (default: 0)"
    )
    cli.add_adaptive_slots(parser)
    parser.add_argument("--masks", choices=tuple(_MASKS), help="which masks to write and show (default: both)")
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
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if not args.images and not args.scenes:
        raise UserError(
            "nothing to segment: name images, folders or lists, or ask for generated images with --scenes N"
        )
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


def _segmenter(args: argparse.Namespace, device: str) -> Segmenter:
    if not args.encoder:
        return run_segmenter(
            args.run,
            orders=args.orders,
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


def _sources(args: argparse.Namespace, segmenter: Segmenter) -> list[Source]:
    """The images to segment; UserError where there are none."""
    files = find_images(args.images, args.out, _note)
    paths = [path for path, _ in files]
    if args.grid and args.grid.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--grid {args.grid} is one of the images: choose another name")
    names = output_names([stem for _, stem in files] + [f"scene_{i:03d}" for i in range(args.scenes)], paths, args.out)
    sources = sources_of(paths, args.scenes, segmenter.size, names, segmenter.identity)
    if not args.annotations:
        return sources
    listed = coco.listed_images(args.annotations, [source.file_name for source in sources])
    if left_out := listed.count(None):
        _note(f"{args.annotations} does not list {left_out} of {len(sources)} images, which are left out")
    return [replace(source, listed=image) for source, image in zip(sources, listed, strict=True) if image]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _collected(args: argparse.Namespace, segmenter: Segmenter, outputs: Outputs) -> Collected:
    settings = {name: getattr(args, name) for name in ("fit", "size", "orders", "adaptive_slots", "precision")}
    collected = Collected(
        segmenter, outputs, settings, coco_file=args.coco, slot_file=args.slots_file, resume=args.resume
    )
    for target, check in ((args.coco, coco.check_target), (args.slots_file, slot_file.check_target)):
        if target and not args.overwrite:
            check(target, collected.model)
        if target:
            make_folder(target)
    return collected


@cli.command("what was written is whole, and --resume goes on from there")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    _check(args)
    device = usable_device(args.device)
    segmenter = _segmenter(args, str(device))
    fit = _fit(args, segmenter)
    sources = _sources(args, segmenter)
    kinds = _MASKS[args.masks or "both"] if "slots" in segmenter.kinds else segmenter.kinds
    metadata = {"fit": args.fit, "model": segmenter.title, **({} if args.encoder else {"orders": args.orders})}
    outputs = Outputs(
        args.out, kinds, args.labels, args.overlay, args.soft, args.slots, args.coco is not None, metadata
    )
    collected = _collected(args, segmenter, outputs)
    missing = [source for source in sources if not collected.has(source)] if args.resume else sources
    if not args.overwrite:
        names = [source.name for source in missing]
        check_overwriting(args.out, names, (source.origin for source in missing), outputs.endings)
    print(f"{segmenter.title}, {segmenter.size} px, {device}", flush=True)
    if done := len(sources) - len(missing):
        print(f"{done} of {len(sources)} images were done before", flush=True)
    lines = []

    def finished(source: Source, result: Finished) -> None:
        collected.add(source, result)
        if len(missing) <= _MOST_LINES:
            lines.append(f"{args.out / source.name}_*  {result.size[0]} x {result.size[1]}")

    start = time.perf_counter()
    try:
        with computing(args.threads, device) as adapt:
            results = segment_all(
                missing,
                segmenter,
                fit,
                outputs,
                batch_size=args.batch_size,
                workers=args.workers,
                finished=finished,
                contact_sheet=args.grid is not None,
                between_batches=adapt,
            )
    finally:
        collected.close()
    seconds = time.perf_counter() - start
    if results.rows:
        rows = [row for _, row in sorted(results.rows.items())]
        save(contact_sheet(rows, columns=1 if len(rows) < 4 else 2 if len(rows) <= 24 else 4), args.grid)
    if outputs.endings:
        print(*sorted(lines), sep="\n", end="\n" * bool(lines))
    if results.rows:
        print(args.grid, f"(the first {MAX_SHEET} of {len(sources)} images)" if len(sources) > MAX_SHEET else "")
    if results.skipped:
        print(f"{results.skipped} of {len(missing)} could not be read and were skipped", file=sys.stderr)
    if not (results.images or done):
        raise UserError("no image could be read: nothing was written")
    collected.finish(sources)
    if results.images:
        print(_summary(results, seconds))
    else:
        print("nothing was left to do")
    if outputs.endings:
        print(f"{args.out}/NAME_{{{','.join(outputs.endings)}}}")
    for target in filter(None, (args.coco, args.slots_file)):
        print(target)


def _summary(results: Results, seconds: float) -> str:
    """How fast it went: in all, and what reading, the model and the masks and files took of each image."""
    count = results.images
    read, model, write = (1000 * results.seconds[part] / count for part in ("read", "model", "write"))
    return (
        f"{count} image{'s' * (count != 1)} in {seconds:.1f} s, {count / seconds:.1f} images/s "
        f"(an image: {read:.1f} ms reading, {model:.1f} ms model, {write:.1f} ms masks and files)"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
