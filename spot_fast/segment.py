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
from dataclasses import replace

from spot_fast import cli
from spot_fast.errors import UserError
from spot_fast.segmentation import coco, slot_file
from spot_fast.segmentation.batch import MAX_SHEET, Finished, Outputs, Results, Source, segment_all, sources_of
from spot_fast.segmentation.collected import Collected
from spot_fast.segmentation.files import check_overwriting, find_images, key_of, make_folder, output_names, save
from spot_fast.segmentation.grids import Fit, fit_of
from spot_fast.segmentation.onnx_segmenter import onnx_segmenter
from spot_fast.segmentation.options import MASKS, parse
from spot_fast.segmentation.overlays import contact_sheet
from spot_fast.segmentation.segmenter import Segmenter, cluster_segmenter, run_segmenter
from spot_fast.system.cpu_threads import available_cores, computing
from spot_fast.system.devices import usable_device

_MOST_LINES = 10  # with more images none gets a line of its own


def _onnx_segmenter(args: argparse.Namespace) -> Segmenter:
    segmenter, about = onnx_segmenter(args.onnx, args.threads or available_cores())
    if args.masks and not set(MASKS[args.masks]) <= set(about.kinds):
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
    return [
        replace(source, listed=image, file_name=image.file_name)
        for source, image in zip(sources, listed, strict=True)
        if image
    ]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _collected(args: argparse.Namespace, segmenter: Segmenter, outputs: Outputs) -> Collected:
    settings = {name: getattr(args, name) for name in ("fit", "size", "orders", "adaptive_slots", "precision")}
    model = key_of(segmenter.identity)
    if args.coco and not args.overwrite:
        coco.check_target(args.coco, model)
    if args.slots_file and not args.overwrite:
        slot_file.check_target(args.slots_file, model, resume=args.resume)
    for target in filter(None, (args.coco, args.slots_file)):
        make_folder(target)
    return Collected(segmenter, outputs, settings, coco_file=args.coco, slot_file=args.slots_file, resume=args.resume)


@cli.command("what was written is whole, and --resume goes on from there")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv, __doc__)
    device = usable_device("cpu" if args.onnx else args.device)
    segmenter = _segmenter(args, str(device))
    fit = _fit(args, segmenter)
    sources = _sources(args, segmenter)
    kinds = MASKS[args.masks or "both"] if "slots" in segmenter.kinds else segmenter.kinds
    metadata = {"fit": args.fit, "model": segmenter.title, **({} if args.encoder else {"orders": args.orders or "0"})}
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
