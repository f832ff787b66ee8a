"""Evaluations of one or several runs as text tables, and as CSV with a line for each image and kind of masks."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spot_fast.config import Config
from spot_fast.evaluation.baselines import MAX_COLUMNS, STARTS
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS
from spot_fast.evaluation.recall import DETECTIONS
from spot_fast.evaluation.scoring import Evaluation, Row, Table
from spot_fast.files import atomic_write

TITLES = {
    "mbo_i": "mBO_i",
    "mbo_c": "mBO_c",
    "miou": "mIoU",
    "fg_ari": "FG-ARI",
    "ari": "ARI",
    "p_ari": "P-ARI",
    "pq": "PQ",
}
BINS = [f"{100 * low:g}–{100 * high:g}" for low, high in zip(SIZE_BINS, SIZE_BINS[1:], strict=False)]
_CSV = (
    "run",
    "image",
    "protocol",
    "masks",
    "orders",
    "columns",
    "num_masks",
    *METRICS,
    "objects",
    "note",
    "data",
    "used",
)
_MOST_NAMES = 10  # in a line of text; the JSON and CSV files name all images
NO_OBJECT = "no object"
_SIZES_HEADING = "mBO_i by size of the instance, percent of the label map"
_RECALL = [f"AR@{most}" for most in DETECTIONS]
_RECALL_HEADING = "average recall of objects, IoU 0.5 to 0.95, class-agnostic: of the 1, 10, 100 most confident masks"

NOTES = (
    "[1] the slot-attention map, from before the decoder: the same for every patch order",
    f"[2] as many masks as slots, in 1 to {MAX_COLUMNS} columns, whichever has the best mBO_i",
    f"[3] per image on the frozen features that the decoder reconstructs, at unit length; best of {STARTS} starts",
    "[4] the layout of SPOT's Table 6",
    "ARI: over all pixels, the background a segment; P-ARI and PQ: of panoptic annotations; without them there is no "
    "P-ARI,\nand PQ is of the objects and the background",
)


@dataclass(frozen=True)
class ScoredRun:
    """data_set: its name in --transfer; "" for the set that the run was trained on."""

    name: str
    config: Config
    evaluation: Evaluation
    data_set: str = ""


def seed_groups(configs: Sequence[Config]) -> list[list[int]]:
    """Indices of runs that differ only in their seed, two or more each."""
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        # Each seed begins with its own seed's run, if with any.
        alike = replace(config, seed=0, init_from=config.init_from and "RUN")
        groups.setdefault(alike.to_json(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def tables_by_protocol(runs: Sequence[ScoredRun]) -> list[tuple[Table, ...]]:
    """For each protocol the tables of all runs."""
    return list(zip(*(run.evaluation.tables for run in runs), strict=True))


def table(titles: Sequence[str], cells: Sequence[Sequence[str]], heading: Sequence[str] = ()) -> str:
    """Rows of cells under a heading (default: the metrics), columns aligned."""
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
    """All scores in percent."""
    rows = scored.rows
    return table([r.title for r in rows], [[percent(r.scores[name]) for name in METRICS] for r in rows])


def size_table(scored: Table) -> str:
    """mBO_i in percent by instance size in percent of the label map, and the number of instances."""
    cells = [[percent(mean) for mean, _ in row.sizes] for row in scored.rows]
    numbers = [str(number) for _, number in scored.rows[0].sizes]
    return table([*(r.title for r in scored.rows), "instances"], [*cells, numbers], BINS)


def recall_table(scored: Table) -> str:
    """AR@1, AR@10 and AR@100 in percent."""
    cells = [[percent(row.recall[name]) for name in _RECALL] for row in scored.rows]
    return table([row.title for row in scored.rows], cells, _RECALL)


def unlabelled_line(scored: Table) -> str:
    """Names the images without an object; empty without any."""
    names = scored.unlabelled
    if not names:
        return ""
    named = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    return f"{len(names)} without an object, which no mBO counts: {named}"


def used_by_objects(scored: Table) -> list[tuple[int, int, dict[str, float]]]:
    """For each number of objects in an image: that number, its images, and the masks used in them, mean by title.

    Of decoder and slot masks.
    """
    rows = [row for row in scored.rows if row.masks in ("decoder", "slots")]
    objects = rows[0].per_image["objects"]
    found = []
    for number in objects.unique().tolist():
        here = objects == number
        used = {row.title: row.per_image["used"][here].double().mean().item() for row in rows}
        found.append((number, int(here.sum()), used))
    return found


def used_line(scored: Table) -> str:
    """How many masks an image uses, beside its objects."""
    rows = [row for row in scored.rows if row.masks in ("decoder", "slots")]
    used = ", ".join(f"{row.used:.1f} {row.title.removesuffix(' [1]')}" for row in rows)
    return f"in use: {used}; {rows[0].per_image['objects'].double().mean():.1f} objects"


def shared_title(rows: Sequence[Row]) -> str:
    """Title of rows of one kind from several tables, whose best block masks may differ in their columns."""
    titles = {row.title for row in rows}
    return titles.pop() if len(titles) == 1 else "block masks, best columns [2]"


def _aligned(tables: Sequence[Table]) -> Iterator[tuple[str, tuple[Row, ...]]]:
    for rows in zip(*(t.rows for t in tables), strict=True):
        yield shared_title(rows), rows


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation with n - 1; None where a value is missing."""
    return None if None in values else (float(np.mean(values)), float(np.std(values, ddof=1)))


def mean_rows(tables: Sequence[Table]) -> list[tuple[str, dict[str, tuple[float, float] | None]]]:
    """Title and (mean, standard deviation) of each metric, row by row, of two or more tables."""
    return [
        (title, {name: mean_and_deviation([r.scores[name] for r in rows]) for name in METRICS})
        for title, rows in _aligned(tables)
    ]


def mean_recall(tables: Sequence[Table]) -> list[tuple[str, dict[str, tuple[float, float] | None]]]:
    """Title and (mean, standard deviation) of AR@1, AR@10 and AR@100, row by row; tables as in `mean_rows`."""
    return [
        (title, {name: mean_and_deviation([r.recall[name] for r in rows]) for name in _RECALL})
        for title, rows in _aligned(tables)
    ]


def mean_sizes(tables: Sequence[Table]) -> list[tuple[str, list[tuple[float, float] | None]]]:
    """Title and (mean, standard deviation) of mBO_i in each size bin, row by row; tables as in `mean_rows`."""
    return [
        (title, [mean_and_deviation([mean for mean, _ in bins]) for bins in zip(*(r.sizes for r in rows), strict=True)])
        for title, rows in _aligned(tables)
    ]


def mean_table(tables: Sequence[Table]) -> str:
    """`mean_rows` as a table in percent: mean ± standard deviation."""
    means = mean_rows(tables)
    return table([title for title, _ in means], [[spread(scores[name]) for name in METRICS] for _, scores in means])


def mean_recall_table(tables: Sequence[Table]) -> str:
    """`mean_recall` as a table in percent: mean ± standard deviation."""
    means = mean_recall(tables)
    return table([title for title, _ in means], [[spread(ar[name]) for name in _RECALL] for _, ar in means], _RECALL)


def mean_size_table(tables: Sequence[Table]) -> str:
    """`mean_sizes` as a table in percent: mean ± standard deviation."""
    means = mean_sizes(tables)
    return table([title for title, _ in means], [[spread(cell) for cell in cells] for _, cells in means], BINS)


def run_report(run: ScoredRun, sizes: bool) -> str:
    """All tables of a run under headings; sizes: also mBO_i by instance size."""
    config, evaluation = run.config, run.evaluation
    count = f"{evaluation.images} image{'s' * (evaluation.images != 1)}"
    lines = []
    for scored in evaluation.tables:
        lines += [
            f"{run.name} · preset {config.recipe} · stage {config.stage} · {count} of {evaluation.data}, "
            f"masks {scored.mask_size} × {scored.mask_size}{', panoptic annotations' * scored.panoptic} · "
            f"protocol {scored.protocol} · percent",
            "",
            evaluation_table(scored),
            "",
            used_line(scored),
            "",
            _RECALL_HEADING,
            "",
            recall_table(scored),
            "",
        ]
        if sizes:
            lines += [_SIZES_HEADING, "", size_table(scored), ""]
        if line := unlabelled_line(scored):
            lines += [line, ""]
    losses = ", ".join(
        f"{loss:.4f} ({'order 0' if orders == 1 else f'{orders} orders'})"
        for orders, loss in evaluation.reconstruction.items()
    )
    lines.append(
        f"reconstruction loss {losses} · {1000 * evaluation.seconds_per_image:.1f} ms an image, "
        f"{1000 * evaluation.metric_seconds_per_image:.1f} of them metrics"
    )
    if evaluation.skipped:
        lines.append(f"skipped {len(evaluation.skipped)} that cannot be read:")
        lines += [f"  {label}: {reason}" for label, reason in evaluation.skipped.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in evaluation.notes)])


def group_report(group: Sequence[ScoredRun], sizes: bool) -> str:
    """Mean ± deviation of runs that differ only in their seed, a table for each protocol."""
    config = group[0].config
    parts = []
    for tables in tables_by_protocol(group):
        parts.append(
            f"mean ± std of {len(group)} runs · preset {config.recipe} · stage {config.stage} · "
            f"{', '.join(run.name for run in group)} · protocol {tables[0].protocol} · percent\n\n{mean_table(tables)}"
        )
        parts.append(f"{_RECALL_HEADING}\n\n{mean_recall_table(tables)}")
        if sizes:
            parts.append(f"{_SIZES_HEADING}\n\n{mean_size_table(tables)}")
    return "\n\n".join(parts)


def write_csv(path: Path, evaluations: Sequence[tuple[str, Evaluation]]) -> None:
    """Writes a line for each run, image, protocol and kind of masks atomically; a skipped image has one line a run.

    Scores are fractions, empty if an image is not counted; `objects` is the number of masks in its mBO_i; `used`
    that of predicted masks with pixels; `note` says why an image was skipped or that it has no object; `data` names its
    set.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.DictWriter(file, _CSV, restval="", lineterminator="\n")
            writer.writeheader()
            for run, evaluation in evaluations:
                writer.writerows({"run": run, **line, "data": evaluation.data} for line in _lines(evaluation))

    atomic_write(path, write)


def _lines(evaluation: Evaluation) -> Iterator[dict[str, object]]:
    for scored in evaluation.tables:
        empty = set(scored.unlabelled)
        columns = [(row, {name: values.tolist() for name, values in row.per_image.items()}) for row in scored.rows]
        for index, image in enumerate(evaluation.labels):
            for row, values in columns:
                scores = {name: values[name][index] for name in METRICS}
                yield {
                    "image": image,
                    "protocol": scored.protocol,
                    "masks": row.masks,
                    "orders": row.orders,
                    "columns": row.columns,
                    "num_masks": row.num_masks,
                    "objects": values["objects"][index],
                    "used": values["used"][index],
                    "note": NO_OBJECT if image in empty else "",
                    **{name: "" if math.isnan(score) else f"{score:.6f}" for name, score in scores.items()},
                }
    for image, reason in evaluation.skipped.items():
        yield {"image": image, "note": reason}
