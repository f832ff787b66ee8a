"""How much memory training takes, preset by preset: does it fit a card of 24 GB?

    python bench/memory.py [--card GB] [--presets coco …]

Counted, not measured: the bytes that tensors hold at once (`live_bytes`) in a step of four and of eight images, on
the CPU, and on the straight line through both at the preset's batch of 64; weights, gradients and Adam's moments
included. (With fewer images the most is held at the end, when all gradients are there, and does not grow with them.)
The frozen ViT's pass over the images is in it, as without a cache. A GPU adds its context (about 0.5 GB) and what the
allocator keeps; its fused attention needs less than the plain one that stage 2's last blocks have on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("bench", "kernels", "")]

from harness.live_bytes import of_step
from harness.step_runs import TrainerSteps, settings, write_teacher

from spot_fast.config import preset

PRESETS = ("coco", "voc", "movi_c", "movi_e")
COUNTED = (4, 8)
SPARE = 1.5e9  # bytes of a card that are left to the context and to fragments


def bytes_of(name: str, stage: int, batch_size: int, tiny: bool = False) -> int:
    """Peak bytes of a step of the preset with so many images."""
    slots = {} if tiny else {"num_slots": preset(name, stage).num_slots}
    config = settings(stage, precision="bf16", batch_size=batch_size, tiny=tiny, **slots)
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config) if stage == 2 else None
        return of_step(TrainerSteps(config, torch.device("cpu"), teacher), products=False)


def line(name: str, stage: int, card: float, tiny: bool = False) -> tuple[float, float, int | None]:
    """Bytes without images, bytes an image, and the least --accumulate with which a batch of 64 fits, if any."""
    few, many = (bytes_of(name, stage, size, tiny) for size in COUNTED)
    each = (many - few) / (COUNTED[1] - COUNTED[0])
    fixed = few - COUNTED[0] * each
    parts = (1, 2, 4, 8, 16, 32, 64)
    return fixed, each, next((n for n in parts if fixed + 64 / n * each <= card - SPARE), None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", type=float, default=24, metavar="GB", help="memory of the card (default: 24)")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything works")
    args = parser.parse_args(argv)
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
