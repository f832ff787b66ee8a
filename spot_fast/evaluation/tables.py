"""What is written about an evaluation: tables as text, and a CSV line for each image and kind of masks."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from spot_fast.checkpoints.runs import atomic_write
from spot_fast.evaluation.baselines import MAX_COLUMNS, STARTS
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS
from spot_fast.evaluation.scoring import Evaluation, Row, Table

TITLES = {"mbo_i": "mBO_i", "mbo_c": "mBO_c", "miou": "mIoU", "fg_ari": "FG-ARI"}
BINS = [f"{100 * low:g}–{100 * high:g}" for low, high in zip(SIZE_BINS, SIZE_BINS[1:], strict=False)]
_CSV = ("run", "image", "protocol", "masks", "orders", "columns", "num_masks", *METRICS, "objects", "note")
_NAMED = 10  # images named in a line of text; all of them are in the JSON and CSV files
NO_OBJECT = "no object"

NOTES = (
    "[1] the slot-attention map, from before the decoder: the same for every patch order",
    f"[2] as many masks as slots, in 1 to {MAX_COLUMNS} columns, whichever has the best mBO_i",
    f"[3] per image on the frozen features that the decoder reconstructs, at unit length; best of {STARTS} starts",
    "[4] the layout of SPOT's Table 6",
)


def table(titles: Sequence[str], cells: Sequence[Sequence[str]], heading: Sequence[str] = ()) -> str:
    """Lines of numbers under a heading (default: the metrics), columns aligned."""
    heading = ["masks", *(heading or (TITLES[name] for name in METRICS))]
    lines = [heading, *([title, *row] for title, row in zip(titles, cells, strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"


def spread(score: tuple[float, float] | None) -> str:
    return "–" if score is None else f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}"


def evaluation_table(scored: Table) -> str:
    """The table in percent, without a heading line."""
    rows = scored.rows
    return table([r.title for r in rows], [[percent(r.scores[name]) for name in METRICS] for r in rows])


def size_table(scored: Table) -> str:
    """mBO_i in percent by the size of the instances in percent of the label map, and how many instances there are."""
    cells = [[percent(mean) for mean, _ in row.sizes] for row in scored.rows]
    numbers = [str(number) for _, number in scored.rows[0].sizes]
    return table([*(r.title for r in scored.rows), "instances"], [*cells, numbers], BINS)


def unlabelled_line(scored: Table) -> str:
    """Names the images without an object; empty where there are none."""
    names = scored.unlabelled
    if not names:
        return ""
    named = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} without an object, which no mBO counts: {named}"


def _alike(tables: Sequence[Table]) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Title and rows, one a run. Block masks may have another number of columns in each run: their title says so."""
    for rows in zip(*(t.rows for t in tables), strict=True):
        titles = {r.title for r in rows}
        yield titles.pop() if len(titles) == 1 else "block masks, best columns [2]", rows


def _mean(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation with n - 1; None where a value is missing."""
    return None if None in values else (float(np.mean(values)), float(np.std(values, ddof=1)))


def mean_rows(tables: Sequence[Table]) -> list[tuple[str, dict[str, tuple[float, float] | None]]]:
    """Title and (mean, standard deviation with n - 1) of each metric, row by row, of two or more runs alike."""
    return [
        (title, {name: _mean([r.scores[name] for r in rows]) for name in METRICS}) for title, rows in _alike(tables)
    ]


def mean_sizes(tables: Sequence[Table]) -> list[tuple[str, list[tuple[float, float] | None]]]:
    """Title and (mean, standard deviation) of mBO_i in each size bin, row by row, of two or more runs alike."""
    return [
        (title, [_mean([mean for mean, _ in bins]) for bins in zip(*(r.sizes for r in rows), strict=True)])
        for title, rows in _alike(tables)
    ]


def mean_table(tables: Sequence[Table]) -> str:
    """`mean_rows` as a table in percent: mean ± standard deviation."""
    means = mean_rows(tables)
    return table([title for title, _ in means], [[spread(scores[name]) for name in METRICS] for _, scores in means])


def mean_size_table(tables: Sequence[Table]) -> str:
    """`mean_sizes` as a table in percent: mean ± standard deviation."""
    means = mean_sizes(tables)
    return table([title for title, _ in means], [[spread(cell) for cell in cells] for _, cells in means], BINS)


def write_csv(path: Path, evaluations: Sequence[tuple[str, Evaluation]]) -> None:
    """One line for each run, image, protocol and kind of masks; an image that cannot be read has one line a run.

    Scores are fractions, empty where an image is not counted; objects is how many masks its mBO_i is a mean over; note
    says why an image was skipped or that it has no object. The file appears whole or not at all.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.DictWriter(file, _CSV, restval="", lineterminator="\n")
            writer.writeheader()
            for run, evaluation in evaluations:
                writer.writerows({"run": run, **line} for line in _lines(evaluation))

    atomic_write(path, write)


def _lines(evaluation: Evaluation) -> Iterator[dict[str, object]]:
    for scored in evaluation.tables:
        empty = set(scored.unlabelled)
        columns = [(row, {name: values.tolist() for name, values in row.per_image.items()}) for row in scored.rows]
        for place, image in enumerate(evaluation.labels):
            for row, values in columns:
                scores = {name: values[name][place] for name in METRICS}
                yield {
                    "image": image,
                    "protocol": scored.protocol,
                    "masks": row.masks,
                    "orders": row.orders,
                    "columns": row.columns,
                    "num_masks": row.num_masks,
                    "objects": values["objects"][place],
                    "note": NO_OBJECT if image in empty else "",
                    **{name: "" if math.isnan(score) else f"{score:.6f}" for name, score in scores.items()},
                }
    for image, reason in evaluation.skipped.items():
        yield {"image": image, "note": reason}
