"""What a training step consists of: operations of the device, products, FLOPs, bytes. Counted, on any machine.

    python bench/step_operations.py [--stages 1 2] [--without all] [--csv FILE] [--names] [--tiny]

ViT-B/16, COCO's settings, bfloat16, batch 64, cached features, compiled, as `first_light/steps.py` times it. Forward
and backward are what Inductor generates for an H200 (`harness/inductor_code.py`; needs a CUDA build of PyTorch 2.11,
Triton and a C compiler, but no GPU); the update (clipping, judging, Adam) and what a step is given (draws, weights of
the losses, features out of the cache, copies to where a recording reads them) are counted operator by operator. An
operation is a launch: a kernel, a copy or a fill. FLOPs are those of products and attention, as
`torch.utils.flop_counter` has them; bytes are what every operation has to read and write, so what a fused kernel keeps
to itself is not in them. What cuBLAS launches besides a product (a reduction of its parts) is not known here.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness import no_accelerator

if __name__ == "__main__":
    try:
        no_accelerator.load()
    except RuntimeError as reason:
        sys.exit(f"error: {reason}")

import torch  # isort: skip
from harness.machine import commit
from harness.step_counts import COLUMNS, Count, count_stage
from harness.targets import target_file
from ladder import write_csv

from spot_kernels import dispatch


def table(counts: Sequence[Count]) -> str:
    """Markdown: each stage's parts and their sum."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for stage in sorted({count.stage for count in counts}):
        parts = [count for count in counts if count.stage == stage]
        whole = sum(parts[1:], parts[0])
        lines += [part.line() for part in parts] + [whole.line(f"**stage {stage}**")]
    return "\n".join(lines)


def names(counts: Sequence[Count]) -> str:
    """Every operation of a step by name, the most frequent first."""
    lines = []
    for stage in sorted({count.stage for count in counts}):
        found = sum((count.names for count in counts if count.stage == stage), Counter())
        lines += ["", f"stage {stage}", *(f"{number:5}  {name}" for name, number in found.most_common())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument(
        "--without", nargs="+", default=[], choices=("all", *dispatch.TECHNIQUES), metavar="NAME", help="techniques off"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="B")
    parser.add_argument("--names", action="store_true", help="list the operations too")
    parser.add_argument("--csv", type=target_file, metavar="FILE", help="write the counts to this file")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    args = parser.parse_args(argv)
    if torch.version.cuda is None or not dispatch.TRITON:
        print(
            f"error: PyTorch {torch.__version__} is not built for CUDA, or there is no Triton: install its CUDA "
            "build, which needs no driver for this",
            file=sys.stderr,
        )
        return 2
    without = tuple(dispatch.TECHNIQUES) if "all" in args.without else tuple(args.without)
    counts = []
    for stage in args.stages:
        with dispatch.without(*without):
            counts += count_stage(stage, args.batch_size, tiny=args.tiny)
    print(table(counts))
    if args.names:
        print(names(counts))
    if args.csv:
        from datetime import date

        about = {
            "date": f"{date.today()}",
            "torch": torch.__version__,
            "commit": commit(),
            "without": " ".join(without),
            "batch_size": str(args.batch_size),
        }
        write_csv(args.csv, [count.row() for count in counts], about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
