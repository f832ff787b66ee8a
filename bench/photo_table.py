"""The paper's Table 1 in small: plain, + patch orders, + self-training, both, on real photos in COCO layout.

    python bench/photo_table.py --photos ROOT --encoder-weights FILE [--seeds 0 1 2] [--steps 10000] [--device cuda]

DINOv2-S/14 at 224 px (16 x 16 tokens), 7 slots, 4 decoder blocks. plain and + orders are stage 1 with the standard and
with the nine patch orders; + self-training and both are students of teachers of the same kind. Unlike the paper's COCO
protocol, images are not mirrored (--no-flip): they are then the same in every epoch and frozen features are computed
once. Exit codes and resuming as in scenes_table.py. --short fits a CPU and is far too short to compare with anything.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.runs import Plan, add_arguments, command_line, results_of, split_options
from harness.tables import BenchError, Result, Row, machines, markdown, select, training

_RECIPE = (
    "--preset",
    "coco",
    "--encoder",
    "vit_small_patch14_dinov2",
    "--image-size",
    "224",
    "--num-slots",
    "7",
    "--slot-dim",
    "256",
    "--dec-blocks",
    "4",
    "--dec-heads",
    "6",
    "--no-flip",
    "--eval-every",
    "0",
)
# What --short changes, chosen so that two CPU cores do all four runs in about a quarter of an hour.
_SHORT = {"steps": 150, "batch_size": 16, "train_images": 192, "val_images": 48, "seeds": [0]}
_SHORT_RECIPE = ("--dec-blocks", "2", "--train-blocks", "2")
# Name, patch orders, stage.
METHODS = (("plain", "standard", 1), ("+ orders", "spot9", 1), ("+ self-training", "standard", 2), ("both", "spot9", 2))


def rows() -> list[Row]:
    """The table's lines: baselines, then each method's decoder and slots."""
    lines = [
        Row("block masks (best of 1 to 4 columns)", "standard", 1, "blocks"),
        Row("k-means per image, same features", "standard", 1, "kmeans"),
    ]
    for title, orders, stage in METHODS:
        if orders == "standard":
            lines.append(Row(f"{title}, decoder", orders, stage, "decoder", 1))
        else:
            lines += [
                Row(f"{title}, decoder, order 0", orders, stage, "decoder", 1),
                Row(f"{title}, decoder, nine orders", orders, stage, "decoder", 9),
            ]
        lines.append(Row(f"{title}, slots", orders, stage, "slots"))
    return lines


def count_images(root: Path) -> int:
    """Training images listed in a COCO folder."""
    path = root / "annotations" / "instances_train2017.json"
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"--photos {root} is not a folder in COCO layout ({type(error).__name__} in {path.name}): "
            "shared/tools/photo_composites.py makes one"
        ) from None


def epochs(steps: int, images: int, batch_size: int) -> int:
    """Whole epochs with at least so many steps; BenchError where the images do not fill a batch."""
    if images < batch_size:
        raise BenchError(f"{images} training images do not fill a batch of {batch_size}: use more --train-images")
    return max(1, math.ceil(steps / (images // batch_size)))


def plans(args: argparse.Namespace, options: Sequence[str]) -> list[Plan]:
    """Stage 1 with both kinds of orders, and the students of each, for every seed."""
    available = count_images(args.photos)
    images = min(args.train_images or available, available)
    recipe = (
        *_RECIPE,
        "--encoder-weights",
        str(args.encoder_weights),
        "--data",
        str(args.photos),
        "--batch-size",
        str(args.batch_size),
        "--epochs",
        str(epochs(args.steps, images, args.batch_size)),
        "--warmup-steps",
        str(args.steps // 10),
        "--train-images",
        str(args.train_images),
        "--val-images",
        str(args.val_images),
        *(_SHORT_RECIPE if args.short else ()),
        *options,
    )
    made = []
    for seed in args.seeds:
        for orders in ("standard", "spot9"):
            teacher = Plan(orders, 1, seed, (*recipe, "--orders", orders))
            made += [teacher, Plan(orders, 2, seed, teacher.options, teacher)]
    return sorted(made, key=lambda plan: plan.stage)


def main(argv: Sequence[str] | None = None) -> int:
    words, options = split_options(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="options after -- go to spot_fast.train"
    )
    parser.add_argument("--photos", type=Path, metavar="ROOT", help="folder in COCO layout")
    parser.add_argument("--encoder-weights", type=Path, metavar="FILE", help="DINOv2 ViT-S/14 in timm's names")
    parser.add_argument(
        "--steps",
        type=int,
        default=10_000,
        metavar="N",
        help="training steps, rounded up to whole epochs (default: 10000)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--train-images", type=int, default=0, metavar="N", help="default: 0, all")
    parser.add_argument("--val-images", type=int, default=0, metavar="N", help="default: 0, all")
    parser.add_argument(
        "--short",
        action="store_true",
        help="a quarter of an hour on two cores: {steps} steps of {batch_size}, {train_images} + "
        "{val_images} images, seed 0, a smaller decoder; comparable to nothing".format(**_SHORT),
    )
    short = "--short" in words
    bench = "photos-short" if short else "photos"
    add_arguments(parser, bench)
    if short:
        parser.set_defaults(**_SHORT)
    args = parser.parse_args(words)
    if args.plain_table and not args.photos:
        results = results_of(bench, [], args, options)
    elif not (args.photos and args.encoder_weights):
        raise BenchError("--photos ROOT and --encoder-weights FILE are needed (shared/tools makes both)")
    else:
        results = results_of(bench, plans(args, options), args, options)
    if any(r.about["bench"] == "photos-short" for r in results):
        print(
            f"**Too short to compare with anything**: {results[0].about['steps']} steps, a smaller decoder, few "
            "images. It shows that the command works.\n"
        )
    print(report(results))
    return 0


def report(results: Sequence[Result]) -> str:
    groups = [(title, orders, stage) for title, orders, stage in METHODS if select(results, orders, stage)]
    return "\n\n".join([markdown(rows(), results), training(results, groups), machines(results)])


if __name__ == "__main__":
    sys.exit(command_line(main))
