"""How much memory training takes, preset by preset: does it fit a card of 24 GB?

    python bench/memory.py [--card GB] [--presets coco …]
    python bench/memory.py --sizes        DINOv2 and DINOv3 at 224 to 518 pixels, and the batches that cards hold

Counted, not measured: the bytes that tensors hold at once (`live_bytes`) in a step of four and of eight images, on
the CPU, and on the straight line through both at the preset's batch of 64; weights, gradients and Adam's moments
included. (With fewer images the most is held at the end, when all gradients are there, and does not grow with them.)
Attention is that of the kernels, which keep no N × N matrix.
The frozen ViT's pass over the images is in it, as without a cache. A GPU adds its context (about 0.5 GB) and what the
allocator keeps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("bench", "kernels", "")]

from harness import step_flops
from harness.live_bytes import kernels, of_step
from harness.step_runs import TrainerSteps, settings, write_teacher

from spot_fast.config import Config, preset
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.model.vits import build_vit
from spot_fast.recipes import ENCODERS, SIZES

PRESETS = ("coco", "voc", "movi_c", "movi_e")
COUNTED = (4, 8)
SIZED = ("dinov2_vits14", "dinov2_vitb14", "dinov3_vits16", "dinov3_vitb16")
CARDS = (24, 80, 141)  # GB
SPARE = 1.5e9  # bytes of a card that are left to the context and to fragments


def bytes_of(config: Config) -> int:
    """Peak bytes of a step of `config`."""
    with tempfile.TemporaryDirectory() as folder, kernels():
        teacher = write_teacher(Path(folder) / "teacher", config) if config.stage == 2 else None
        steps = TrainerSteps(config, torch.device("cpu"), teacher)
        for block in steps.trainer.model.last_blocks or ():
            block.attn.fused_attn = True  # as on a GPU; a CPU's train without
        return of_step(steps, products=False)


def straight(stage: int, tiny: bool = False, **changes) -> tuple[float, float]:
    """Bytes without images, and bytes an image."""
    few, many = (bytes_of(settings(stage, precision="bf16", batch_size=size, tiny=tiny, **changes)) for size in COUNTED)
    each = (many - few) / (COUNTED[1] - COUNTED[0])
    return few - COUNTED[0] * each, each


def line(name: str, stage: int, card: float, tiny: bool = False) -> tuple[float, float, int | None]:
    """Bytes without images, bytes an image, and the least --accumulate with which a batch of 64 fits, if any."""
    fixed, each = straight(stage, tiny, **({} if tiny else {"num_slots": preset(name, stage).num_slots}))
    parts = (1, 2, 4, 8, 16, 32, 64)
    return fixed, each, next((n for n in parts if fixed + 64 / n * each <= card - SPARE), None)


def flops(encoder: str, side: int, stage: int) -> float:
    """Operations of a step of 64 images."""
    config = preset(f"coco+{encoder}", stage, image_size=side)
    with torch.device("meta"):
        frozen = Encoder(build_vit(config), last_blocks=config.train_blocks)
        teacher = Spot(preset(f"coco+{encoder}", 1, image_size=side), frozen) if stage == 2 else None
        return 64 * step_flops.step(Spot(config, frozen), teacher, cached=False)


def sizes(encoders: Sequence[str] = SIZED) -> Iterator[str]:
    """Markdown lines: encoder, pixels, tokens, stage; a step's operations and bytes; batches that fit each card."""
    head = ("encoder", "pixels", "tokens", "stage", "TFLOP", "without images, GB", "an image, MB", "64 images, GB")
    yield f"| {' | '.join((*head, *(f'images on {card} GB' for card in CARDS)))} |"
    yield "|---" * (len(head) + len(CARDS)) + "|"
    for encoder in encoders:
        patch = ENCODERS[encoder].patch
        for side in (224, *(side for side in SIZES.values() if side % patch == 0)):
            for stage in (1, 2):
                fixed, each = straight(
                    stage, encoder=ENCODERS[encoder].timm, image_size=side, mask_size=side, num_slots=7
                )
                fit = " | ".join(f"{int((1e9 * card - SPARE - fixed) // each):,}" for card in CARDS)
                work = flops(encoder, side, stage) / 1e12
                whole = f"{fixed / 1e9:.2f} | {each / 1e6:.0f} | {(fixed + 64 * each) / 1e9:.1f}"
                yield f"| {encoder} | {side} | {(side // patch) ** 2:,} | {stage} | {work:.1f} | {whole} | {fit} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", type=float, default=24, metavar="GB", help="memory of the card (default: 24)")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything works")
    parser.add_argument("--sizes", action="store_true", help="the table of DINOv2 and DINOv3 at 224 to 518 pixels")
    parser.add_argument("--encoders", nargs="+", default=SIZED, choices=SIZED, help="of --sizes (default: all)")
    args = parser.parse_args(argv)
    if args.sizes:
        for row in sizes(args.encoders):
            print(row, flush=True)
        return 0
    print(f"| preset | stage | slots | without images, GB | an image, MB | batch of 64, GB | on {args.card:g} GB |")
    print("|---" * 7 + "|")
    for name in args.presets:
        for stage in (1, 2):
            fixed, each, parts = line(name, stage, 1e9 * args.card, args.tiny)
            fits = "does not fit" if parts is None else "fits" if parts == 1 else f"--accumulate {parts}"
            print(
                f"| {name} | {stage} | {preset(name, stage).num_slots} | {fixed / 1e9:.2f} | {each / 1e6:.0f} | "
                f"{(fixed + 64 * each) / 1e9:.1f} | {fits} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
