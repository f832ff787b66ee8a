"""What each setting of the scenes recipe brings: the same run without it.

    python bench/scenes_ablations.py [--seeds 0] [--jobs N] [--out DIR] [--csv FILE] [-- options of spot_fast.train]

Trains one run for each line of `ABLATIONS` and seed, evaluates it and prints a Markdown table. Runs of scenes_table.py
in the same --out are not trained again. Exit codes and resuming as there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from harness.runs import Plan, add_arguments, command_line, results_of, split_options
from harness.tables import Row, machines, markdown, training


class Ablation(NamedTuple):
    variant: str
    stage: int
    title: str
    options: tuple[str, ...]


ABLATIONS = (
    Ablation("scenes", 1, "the recipe", ()),
    Ablation("plain", 1, "one patch order", ("--orders", "standard")),
    Ablation("xavier", 1, "SPOT's start", ("--initial-weights", "xavier")),
    Ablation("xavier-plain", 1, "SPOT's start, one order", ("--initial-weights", "xavier", "--orders", "standard")),
    Ablation("two-epochs", 1, "2 epochs", ("--epochs", "2")),
    Ablation("xavier-two-epochs", 1, "SPOT's start, 2 epochs", ("--initial-weights", "xavier", "--epochs", "2")),
    Ablation("full-rate", 1, "slots learn as fast as the rest", ("--slot-rate", "1")),
    Ablation("three-iterations", 1, "3 slot-attention iterations", ("--slot-iterations", "3")),
    Ablation("one-block", 1, "1 decoder block", ("--dec-blocks", "1")),
    Ablation("scenes", 2, "the recipe", ()),
    Ablation("afresh", 2, "a student that starts afresh", ("--initial-weights", "xavier")),
    Ablation("frozen", 2, "no encoder block trains", ("--train-blocks", "0")),
)


def rows() -> list[Row]:
    """Decoder (all its orders) and slots of every ablation."""
    lines = []
    for variant, stage, title, options in ABLATIONS:
        name = f"stage {stage}, {title}" + (f" (`{' '.join(options)}`)" if options else "")
        lines.append(Row(f"{name}, decoder", variant, stage, "decoder", 1 if "standard" in options else 9))
        lines.append(Row(f"{name}, slots", variant, stage, "slots"))
    return lines


def plans(seeds: Sequence[int], options: Sequence[str] = ()) -> list[Plan]:
    """The run of each ablation and seed; all students have the recipe's teacher."""
    made = []
    for seed in seeds:
        recipe = Plan("scenes", 1, seed, ("--preset", "scenes", *options))
        for variant, stage, _, changes in ABLATIONS:
            words = ("--preset", "scenes", *changes, *options)
            made.append(Plan(variant, stage, seed, words, recipe if stage == 2 else None))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "scenes")
    parser.set_defaults(seeds=[0])
    words, options = split_options(argv)
    args = parser.parse_args(words)
    results = results_of("scenes-ablations", plans(args.seeds, options), args, options)
    groups = [(f"stage {stage}, {title}", variant, stage) for variant, stage, title, _ in ABLATIONS]
    print(markdown(rows(), results), training(results, groups), machines(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
