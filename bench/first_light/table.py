"""The results of first_light from its CSV files: Markdown tables, and the line that says how far the aims are.

    python bench/first_light/table.py bench/results/first_light_*.csv
    python bench/first_light/table.py --last FILE.csv ...          the last line of each card alone

Each card and each set of versions has its own. Of a part that was run several times the newest rows count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from record import NO_GO, PARTS, Row, read
from steps import AIMS

COCO_STEPS = 50 * (118_287 // 64)  # of each stage
COCO_MINUTES = 30.0

Lines = Sequence[tuple[dict[str, str], Row]]


def machines(lines: Lines, run: str = "") -> dict[tuple[str, ...], Lines]:
    """Rows by card, versions and whether it was a rehearsal: of each part those of `run`, or of its newest run."""
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for about, row in lines:
        runs = newest.setdefault(_machine(about), {})
        runs[row.part] = run or max(runs.get(row.part, ""), about["run"])
    return {
        machine: kept
        for machine, runs in newest.items()
        if (
            kept := [
                (about, row) for about, row in lines if _machine(about) == machine and about["run"] == runs[row.part]
            ]
        )
    }


def _machine(about: dict[str, str]) -> tuple[str, ...]:
    return tuple(about[name] for name in ("card", "torch", "triton", "rehearsal"))


def tables(lines: Lines) -> str:
    """A table for each part of one machine, and where and when it was measured."""
    text: list[str] = []
    for part in PARTS:
        rows = [(about, row) for about, row in lines if row.part == part and row.subject != "the whole part"]
        if not rows:
            continue
        about = rows[0][0]
        text += [
            "",
            f"**{part}**, {about['card']}, torch {about['torch']}, triton {about['triton']}, {about['date']}"
            + (" (a rehearsal)" if about["rehearsal"] else ""),
            "",
            "| what | of | figure | p20 to p80 | error, allowed | |",
            "|---|---|---|---|---|---|",
        ]
        text += [_line(row) for _, row in rows]
    return "\n".join(text).strip()


def _line(row: Row) -> str:
    figure = row.figure if row.value is None else f"{row.value:.4g} {row.figure}"
    between = "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"
    error = "" if row.error is None else f"{row.error:.1e}"
    error += "" if row.allowed is None else f", {row.allowed:.1e}"
    return f"| {row.subject} | {row.variant} | {figure} | {between} | {error} | {row.verdict} {row.note} |".replace(
        "  |", " |"
    )


def fastest(rows: Sequence[Row], stage: int) -> Row | None:
    """The fastest variant of a stage whose check passed."""
    candidates = [
        row
        for row in rows
        if row.part == "steps"
        and row.subject == f"stage {stage}"
        and row.figure == "ms a step"
        and row.variant != "aim"
        and row.verdict != NO_GO
    ]
    return min(candidates, key=lambda row: row.value, default=None)


def last_line(lines: Lines) -> str:
    """The aims and by how much they are missed, COCO's minutes, and whatever is no go."""
    rows = [row for _, row in lines]
    best = {stage: fastest(rows, stage) for stage in AIMS}
    parts = []
    for stage, row in best.items():
        if row is None:
            parts.append(f"stage {stage}: no time, aim {AIMS[stage]:g} ms")
            continue
        over = row.value - AIMS[stage]
        how = f"missed by {over:.2f} ms" if over > 0 else f"met by {-over:.2f} ms"
        parts.append(f"stage {stage}: {row.value:.2f} ms a step ({row.variant}), aim {AIMS[stage]:g}: {how}")
    if all(best.values()):
        minutes = sum(COCO_STEPS * row.value for row in best.values()) / 60e3
        over = minutes - COCO_MINUTES
        parts.append(
            f"COCO, {COCO_STEPS:,} steps a stage: {minutes:.1f} minutes, aim {COCO_MINUTES:g}: "
            + (f"missed by {over:.1f}" if over > 0 else f"met by {-over:.1f}")
        )
    wrong = sorted({f"{row.part}: {row.subject}" for row in rows if row.verdict == NO_GO})
    if wrong:
        parts.append(f"NO GO in {len(wrong)}: {', '.join(wrong[:6])}" + (", …" if len(wrong) > 6 else ""))
    if any(about["rehearsal"] for about, _ in lines):
        parts.insert(0, "a rehearsal, whose figures say nothing")
    return "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--last", action="store_true", help="the last line alone")
    parser.add_argument("--run", default="", help="only rows of this call of the script (default: each part's newest)")
    args = parser.parse_args(argv)
    try:
        lines = [line for path in args.files for line in read(path)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not lines:
        print(f"error: no rows in {', '.join(map(str, args.files))}: run bench/first_light.sh first", file=sys.stderr)
        return 2
    by_machine = machines(lines, args.run)
    if not by_machine:
        there = ", ".join(sorted({about["run"] for about, _ in lines}))
        print(f"error: no rows of the run {args.run}: there are {there}", file=sys.stderr)
        return 2
    for rows in by_machine.values():
        if not args.last:
            print(tables(rows), end="\n\n")
        print(f"{rows[0][0]['card']}: {last_line(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
