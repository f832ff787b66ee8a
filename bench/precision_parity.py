"""Whether bfloat16 products train as well as float32: loss curves and final scores over seeds, beside their spread.

    python bench/precision_parity.py [--seeds 0 1 2] [--csv FILE] [--plot FILE.png] [-- options of spot_fast.train]

Stage 1 on generated scenes in both precisions; a seed has the same images, orders and noise in both. A line holds
where the two means differ by no more than the larger of their standard deviations over the seeds. Exit code 0, 1 where
a line does not hold, 2 on an error, 3 where --minutes are over. Started again with the same line it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from runs import TRAINER, Plan, add_arguments, command_line, results_of, split_options
from tables import BenchError, Result, Row, cell, column, machines, select
from targets import target_file

PRECISIONS = ("float32", "bf16")
ROWS = (("decoder, order 0", "decoder", 1), ("decoder, nine orders", "decoder", 9), ("slots", "slots", 0))


def plans(seeds: Sequence[int], options: Sequence[str]) -> list[Plan]:
    return [
        Plan(precision, 1, seed, ("--preset", "scenes", "--precision", precision, *options))
        for seed in seeds
        for precision in PRECISIONS
    ]


def curves(root: Path, seeds: Sequence[int]) -> dict[str, list[list[float]]]:
    """Precision → mean training loss of every epoch, a list a seed."""
    found = {}
    for precision in PRECISIONS:
        found[precision] = []
        for plan in plans(seeds, ()):
            if plan.variant == precision:
                lines = map(json.loads, (root / plan.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
                found[precision].append([line["loss"] for line in lines if line["kind"] == "epoch"])
    return found


def compare(float32: Sequence[float], bf16: Sequence[float]) -> tuple[float, float]:
    """How far apart the means are, and the larger standard deviation."""
    return abs(mean(float32) - mean(bf16)), max(stdev(float32), stdev(bf16))


def table(results: Sequence[Result], losses: dict[str, list[list[float]]]) -> tuple[str, bool]:
    """Markdown, and whether everything is inside the spread."""
    runs = {precision: select(results, precision, 1) for precision in PRECISIONS}
    lines = ["| | float32 | bf16 | means apart | larger std | |", "|---|---|---|---|---|---|"]
    fine = True
    for title, masks, orders in ROWS:
        values = [column(runs[p], Row(title, p, 1, masks, orders), "mbo_i") for p in PRECISIONS]
        apart, spread = compare(*values)
        fine &= apart <= spread
        lines.append(
            f"| mBO_i, {title} | {cell(values[0])} | {cell(values[1])} | {100 * apart:.2f} | "
            f"{100 * spread:.2f} | {_holds(apart, spread)} |"
        )
    for epoch, values in enumerate(zip(*(zip(*losses[p], strict=True) for p in PRECISIONS), strict=True), 1):
        apart, spread = compare(*values)
        fine &= apart <= spread
        shown = [f"{mean(v):.4f} ± {stdev(v):.4f}" for v in values]
        lines.append(
            f"| loss, epoch {epoch} | {shown[0]} | {shown[1]} | {apart:.4f} | {spread:.4f} | {_holds(apart, spread)} |"
        )
    return "\n".join(lines), fine


def _holds(apart: float, spread: float) -> str:
    return "inside" if apart <= spread else "OUTSIDE"


def plot(root: Path, seeds: Sequence[int], path: Path) -> None:
    """The curves of every interval of metrics.jsonl, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for precision, colour, width in zip(PRECISIONS, ("tab:gray", "tab:blue"), (2.5, 1.0), strict=True):
        for seed in seeds:
            text = (root / plans([seed], ())[PRECISIONS.index(precision)].name / "metrics.jsonl").read_text("utf-8")
            lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
            axes.plot(
                [line["step"] for line in lines],
                [line["loss"] for line in lines],
                color=colour,
                lw=width,
                label=precision if seed == seeds[0] else None,
            )
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"stage 1 on generated scenes, seeds {seeds}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="options after -- go to spot_fast.train, such as: -- --epochs 4"
    )
    add_arguments(parser, "precision")
    parser.add_argument("--plot", type=target_file, metavar="FILE.png", help="draw the loss curves")
    parser.add_argument("--emulate", action="store_true", help="on a CPU without bfloat16: emulated_bf16.py trains")
    words, options = split_options(argv)
    args = parser.parse_args(words)
    if len(args.seeds) < 2:
        raise BenchError("--seeds needs two or more: one has no spread")
    trainer = (str(Path(__file__).with_name("emulated_bf16.py")), "train") if args.emulate else TRAINER
    results = results_of("precision", plans(args.seeds, options), args, options, trainer)
    text, fine = table(results, curves(args.out, args.seeds))
    print(text, machines(results), sep="\n\n")
    if args.plot is not None:
        plot(args.out, args.seeds, args.plot)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(command_line(main))
