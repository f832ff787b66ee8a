"""The README's results table: both stages on generated scenes, with and without patch orders, several seeds, targets.

    python bench/scenes_table.py [--seeds 0 1 2] [--out DIR] [--csv FILE] [-- options of spot_fast.train]

Prints a Markdown table of mean ± std over seeds, the minutes of training, and whether the targets hold. Exit code 0,
1 where a target fails, 2 on an error, 3 where --minutes are over. Started again with the same line it goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness.runs import Plan, add_arguments, command_line, results_of, split_options
from harness.tables import Result, Row, Target, above, machines, markdown, select, targets_table, training

BLOCKS = Row("block masks (best of 1 to 4 columns)", "scenes", 1, "blocks")
KMEANS = Row("k-means per image, same features", "scenes", 1, "kmeans")
DECODER = Row("stage 1, decoder, order 0", "scenes", 1, "decoder", 1)
SLOTS = Row("stage 1, slots", "scenes", 1, "slots")
STUDENT_SLOTS = Row("stage 2, slots", "scenes", 2, "slots")
DECODER_ALL = Row("stage 1, decoder, nine orders", "scenes", 1, "decoder", 9)
STUDENT = Row("stage 2, decoder, order 0", "scenes", 2, "decoder", 1)
STUDENT_ALL = Row("stage 2, decoder, nine orders", "scenes", 2, "decoder", 9)
PLAIN = Row("plain: stage 1 in one order, decoder", "plain", 1, "decoder", 1)
PLAIN_SLOTS = Row("plain: stage 1 in one order, slots", "plain", 1, "slots")
PLAIN_STUDENT = Row("self-training in one order, decoder", "plain", 2, "decoder", 1)
PLAIN_STUDENT_SLOTS = Row("self-training in one order, slots", "plain", 2, "slots")
ROWS = (
    BLOCKS,
    KMEANS,
    PLAIN,
    PLAIN_SLOTS,
    PLAIN_STUDENT,
    PLAIN_STUDENT_SLOTS,
    DECODER,
    DECODER_ALL,
    SLOTS,
    STUDENT,
    STUDENT_ALL,
    STUDENT_SLOTS,
)


def plans(seeds: Sequence[int], options: Sequence[str] = ()) -> list[Plan]:
    """Stage 1 and its student for every seed: SPOT, and the same in the standard order alone (the paper's Table 1)."""
    made = []
    for seed in seeds:
        for variant, extra in (("scenes", ()), ("plain", ("--orders", "standard"))):
            teacher = Plan(variant, 1, seed, ("--preset", "scenes", *extra, *options))
            made += [teacher, Plan(variant, 2, seed, teacher.options, teacher)]
    return made


def targets(results: Sequence[Result]) -> list[Target]:
    """What the default recipe has to reach, in mBO_i and for every seed."""
    plain, first, second = select(results, "plain", 1), select(results, "scenes", 1), select(results, "scenes", 2)

    def ahead(name: str, one: tuple, other: tuple, points: int) -> Target:
        return above(f"{name} by at least {points}", one, other, points / 100, strict=False)

    return [
        ahead("stage-1 decoder ahead of block masks", (first, DECODER), (first, BLOCKS), 10),
        ahead("stage-1 decoder ahead of k-means", (first, DECODER), (first, KMEANS), 12),
        ahead("stage-1 decoder ahead of slots", (first, DECODER), (first, SLOTS), 2),
        ahead("nine orders ahead of one, stage 1", (first, DECODER_ALL), (first, DECODER), 1),
        ahead("nine orders ahead of one, stage 2", (second, STUDENT_ALL), (second, STUDENT), 1),
        ahead("slots after stage 2 ahead of those after stage 1", (second, STUDENT_SLOTS), (first, SLOTS), 3),
        above("Table 1: patch orders above plain", (first, DECODER_ALL), (plain, PLAIN)),
        above("Table 1: with self-training above patch orders alone", (second, STUDENT_ALL), (first, DECODER_ALL)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="options after -- go to spot_fast.train, such as: -- --epochs 1 --train-images 256",
    )
    add_arguments(parser, "scenes")
    words, options = split_options(argv)
    args = parser.parse_args(words)
    results = results_of("scenes", plans(args.seeds, options), args, options)
    verdicts = targets(results)
    groups = [(f"stage {stage}", "scenes", stage) for stage in (1, 2)]
    groups += [(f"plain, stage {stage}", "plain", stage) for stage in (1, 2)]
    print(markdown(ROWS, results), training(results, groups), machines(results), targets_table(verdicts), sep="\n\n")
    return 1 if any(t.passed is False for t in verdicts) else 0


if __name__ == "__main__":
    sys.exit(command_line(main))
