"""The operators' benchmark without timing anything: the floors of its shapes, or the table of committed results.

python bench/kernel_table.py --floors           least time of each GPU shape, from its bytes and operations
python bench/kernel_table.py --table FILE.csv   the table and the aims of committed results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.kernel_bench import Case, Setting, all_cases
from harness.kernel_clock import Ceilings
from harness.kernel_rows import aims_text, ceilings_of, duration, read_csv, table

# Measured on an H200: a large copy, a large product.
H200 = Ceilings(4.3e12, {"float32": 50e12, "bfloat16": 790e12})


def floors(cases: Iterable[Case], ceilings: Ceilings) -> str:
    """Markdown: the least time of each case, and what sets it."""
    lines = [
        "| operator | shape | dtype | forward: MB | GFLOP | floor | fwd+bwd: MB | GFLOP | floor | set by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        cells = [case.operator, case.shape, case.dtype]
        works = [case.forward] + ([case.forward + case.backward] if case.backward else [])
        for work in works:
            floor, _ = ceilings.floor(work, case.dtype)
            cells += [f"{work.bytes / 1e6:.4g}", f"{work.flops / 1e9:.4g}", duration(floor)]
        cells += ["–"] * (9 - len(cells)) + [ceilings.floor(works[-1], case.dtype)[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--floors", action="store_true", help="least time of each GPU shape")
    what.add_argument("--table", type=Path, metavar="CSV", help="table and aims of committed results")
    parser.add_argument("--gbps", type=float, default=H200.bytes / 1e9, help="copy, GB/s (H200: %(default).0f)")
    parser.add_argument("--tflops", type=float, default=H200.flops["bfloat16"] / 1e12, help="bfloat16 product (H200)")
    parser.add_argument("--tflops32", type=float, default=H200.flops["float32"] / 1e12, help="float32 product (H200)")
    args = parser.parse_args(argv)
    if args.floors:
        ceilings = Ceilings(args.gbps * 1e9, {"float32": args.tflops32 * 1e12, "bfloat16": args.tflops * 1e12})
        print(floors(all_cases(Setting(gpu=True)), ceilings))
        return 0
    try:
        about, rows = read_csv(args.table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, ceilings_of(about)), aims_text(rows, gpu=about["device"] != "cpu"), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
