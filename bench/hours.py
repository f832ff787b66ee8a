"""Hours that the paper's runs would take on a card: an estimate from counted operations, not a measurement.

    python bench/hours.py --share 0.4

Steps × images a step × operations an image (`step_flops.py`), at a share of the card's data-sheet bfloat16 rate
(`spot_fast.training.throughput`). Frozen features are computed in every step: COCO's do not fit a card's memory, and
reading them from disk takes longer there. Decoding, validation and start are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from harness import step_flops

from spot_fast.config import Config, preset
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.model.vits import build_vit
from spot_fast.published import IMAGES
from spot_fast.training.throughput import peak_by_name

CARDS = ("RTX 3090", "A100", "H100")
SHARE = 0.4


@cache
def _encoder(name: str, image_size: int, last_blocks: int) -> Encoder:
    return Encoder(build_vit(Config(encoder=name, image_size=image_size)), last_blocks=last_blocks)


@cache
def operations(config: Config, images: int) -> tuple[int, float]:
    """Steps of a run, and operations of one."""
    with torch.device("meta"):
        encoder = _encoder(config.encoder, config.image_size, config.train_blocks)
        model = Spot(config, encoder)
        teacher = Spot(preset(config.recipe, 1), encoder) if config.stage == 2 else None
    one = step_flops.step(model, teacher, cached=False)
    return images // config.batch_size * config.epochs, config.batch_size * one


def table(share: float) -> str:
    """Markdown: data set and stage, steps, TFLOP a step, hours a card."""
    lines = [
        f"| preset | stage | steps | TFLOP a step | {' | '.join(f'{card}, h' for card in CARDS)} |",
        "|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for name, images in IMAGES.items():
        for stage in (1, 2):
            steps, step = operations(preset(name, stage), images)
            hours = [steps * step / (share * peak_by_name(card, "bf16")) / 3600 for card in CARDS]
            lines.append(
                f"| {name} | {stage} | {steps:,} | {step / 1e12:.2f} | {' | '.join(f'{one:.1f}' for one in hours)} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        metavar="X",
        help=f"of the card's data-sheet rate that a run reaches (default: {SHARE}, an assumption)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.share <= 1:
        parser.error(f"--share is {args.share}: use a number above 0, at most 1")
    print(table(args.share))
    return 0


if __name__ == "__main__":
    sys.exit(main())
