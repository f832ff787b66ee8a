"""The paper's Table 1 in small: plain, + patch orders, + self-training, both, on real photos in COCO layout.

    python bench/photo_table.py --photos ROOT --encoder-weights FILE [--seeds 0 1 2] [--steps 10000] [--device cuda]
    python bench/photo_table.py --photos ROOT --encoder-weights FILE --cpu

DINOv2-S/14 at 224 px (16 x 16 tokens), 7 slots, 4 decoder blocks. plain and + orders are stage 1 with the standard and
with the nine patch orders; + self-training and both are students of teachers of the same kind. Unlike the paper's COCO
protocol, images are not mirrored (--no-flip): they are then the same in every epoch and frozen features are computed
once. Exit code 0, 2 on an error, 3 where --minutes are over. Started again with the same line it goes on.

--cpu fits one core with AVX-512 BF16: 112 px (8 x 8 tokens), a shorter schedule at a higher rate, and of the four
methods only + orders and its student. `_CPU_RECIPE` has all that it changes. Its grid is coarse for objects as small as
these: the table's ceiling, the ground truth itself rounded to the tokens, says how much masks can reach there.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.runs import Plan, add_arguments, command_line, results_of, split_options
from harness.tables import BenchError, Result, Row, Scores, machines, markdown, select, training
from harness.token_ceiling import token_ceiling

from spot_fast.data.datasets.coco import Coco

PATCH = 14
_RECIPE = (
    "--preset",
    "coco",
    "--encoder",
    "vit_small_patch14_dinov2",
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
# Defaults under --cpu, and what it changes in the recipe; the last are the student's alone.
_CPU = {"size": 112, "steps": 3000, "student_steps": 1000, "batch_size": 16, "seeds": [0], "threads": 1}
_CPU_RECIPE = (
    "--feature-norm",
    "--initial-weights",
    "clustering",
    "--slot-rate",
    "0.03",
    "--slot-dim",
    "384",
    "--slot-iterations",
    "5",
    "--dec-blocks",
    "3",
    "--lr",
    "1e-3",
    "--lr-low",
    "1e-5",
    "--eval-every",
    "1",
    "--eval-images",
    "64",
)
_CPU_STUDENT = ("--train-blocks", "2", "--att-weight", "0.02", "--initial-weights", "teacher")
# Name, patch orders, stage.
METHODS = (("plain", "standard", 1), ("+ orders", "spot9", 1), ("+ self-training", "standard", 2), ("both", "spot9", 2))


def methods_in(results: Sequence[Result]) -> list[tuple[str, str, int]]:
    """Those of METHODS that have a finished run."""
    return [(title, orders, stage) for title, orders, stage in METHODS if select(results, orders, stage)]


def rows(methods: Sequence[tuple[str, str, int]] = METHODS) -> list[Row]:
    """The table's lines: ceiling and baselines, then each method's decoder and slots."""
    orders, stage = methods[0][1:]  # no training in these: every run has the same
    lines = [
        Row("ceiling: the ground truth on the token grid", orders, stage, "ceiling"),
        Row("block masks (best of 1 to 4 columns)", orders, stage, "blocks"),
        Row("k-means per image, same features", orders, stage, "kmeans"),
    ]
    for title, orders, stage in methods:
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


def ceiling(root: Path, size: int, limit: int) -> dict[tuple[str, int], Scores]:
    """The ceiling's scores at images of `size` pixels, as a row of each run."""
    return {("ceiling", 0): Scores(token_ceiling(Coco(root, "val", image_size=size, limit=limit), size // PATCH))}


def plans(args: argparse.Namespace, options: Sequence[str]) -> list[Plan]:
    """Stage 1 with both kinds of orders (--cpu: with nine), and the students of each, for every seed."""
    if args.size < PATCH or args.size % PATCH:
        raise BenchError(f"--size {args.size} is not a whole number of patches: use a multiple of {PATCH}")
    available = count_images(args.photos)
    images = min(args.train_images or available, available)

    def duration(steps: int) -> tuple[str, ...]:
        count = epochs(steps, images, args.batch_size)
        # The trainer rounds the warm-up down to whole epochs: of a short run none would be left.
        warmup = max(steps // 10, math.ceil(images / args.batch_size) if count > 1 else 0)
        return "--epochs", str(count), "--warmup-steps", str(warmup)

    recipe = (
        *_RECIPE,
        "--image-size",
        str(args.size),
        "--encoder-weights",
        str(args.encoder_weights),
        "--data",
        str(args.photos),
        "--batch-size",
        str(args.batch_size),
        "--train-images",
        str(args.train_images),
        "--val-images",
        str(args.val_images),
        *(_CPU_RECIPE if args.cpu else ()),
    )
    made = []
    for seed in args.seeds:
        for orders in ("spot9",) if args.cpu else ("standard", "spot9"):
            common = (*recipe, "--orders", orders)
            teacher = Plan(orders, 1, seed, (*common, *duration(args.steps), *options))
            student = (*common, *duration(args.student_steps or args.steps), *(_CPU_STUDENT if args.cpu else ()))
            made += [teacher, Plan(orders, 2, seed, (*student, *options), teacher)]
    return sorted(made, key=lambda plan: plan.stage)


def main(argv: Sequence[str] | None = None) -> int:
    words, options = split_options(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="options after -- go to spot_fast.train"
    )
    parser.add_argument("--photos", type=Path, metavar="ROOT", help="folder in COCO layout")
    parser.add_argument("--encoder-weights", type=Path, metavar="FILE", help="DINOv2 ViT-S/14 in timm's names")
    parser.add_argument(
        "--size", type=int, default=224, metavar="PX", help=f"side of the images, a multiple of {PATCH} (default: 224)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10_000,
        metavar="N",
        help="training steps, rounded up to whole epochs (default: 10000)",
    )
    parser.add_argument("--student-steps", type=int, metavar="N", help="those of stage 2 (default: as --steps)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--train-images", type=int, default=0, metavar="N", help="default: 0, all")
    parser.add_argument("--val-images", type=int, default=0, metavar="N", help="default: 0, all")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="for one core: {size} px, {steps} steps of {batch_size} and {student_steps} of the "
        "student, seed 0, nine orders alone, the scenes recipe's start".format(**_CPU),
    )
    cpu = "--cpu" in words
    bench = "photos-cpu" if cpu else "photos"
    add_arguments(parser, bench)
    if cpu:
        parser.set_defaults(**_CPU)
    args = parser.parse_args(words)
    if args.plain_table and not args.photos:
        results = results_of(bench, [], args, options)
    elif not (args.photos and args.encoder_weights):
        raise BenchError("--photos ROOT and --encoder-weights FILE are needed (shared/tools makes both)")
    else:
        more = functools.partial(ceiling, args.photos, args.size, args.val_images)
        results = results_of(bench, plans(args, options), args, options, more=more)
    print(report(results))
    return 0


def report(results: Sequence[Result]) -> str:
    groups = methods_in(results)
    return "\n\n".join([markdown(rows(groups), results), training(results, groups), machines(results)])


if __name__ == "__main__":
    sys.exit(command_line(main))
