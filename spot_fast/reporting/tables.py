"""Tables of a report: every metric, run and protocol beside the baselines, mBO_i by instance size, all settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from spot_fast.config import Config
from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.size_plot import SizeRow
from spot_fast.evaluation.tables import (
    BINS,
    TITLES,
    mean_rows,
    mean_sizes,
    percent,
    shared_title,
    spread,
    used_by_objects,
)
from spot_fast.reporting.records import Report, SetRecord

TitledRow = tuple[str, list[str]]  # title, cells
_TRAINED = ("decoder", "slot")  # first words of rows that are no baselines


@dataclass(frozen=True)
class ReportTable:
    """bodies: (title, rows) of each <tbody>, without a title where it is empty. best: of each column the cell to show
    in bold, if any."""

    heading: list[str]
    bodies: list[tuple[str, list[TitledRow]]]
    best: list[str | None] = field(default_factory=list)


def protocol_table(report: Report, shown: SetRecord, protocol: str) -> ReportTable:
    """All metrics of every run under one protocol, then mean ± deviation of runs that differ only in their seed."""
    tables = {index: report.runs[index].evaluation.table(protocol) for index in shown.run_indices}

    def best(name: str) -> str | None:
        scores = [row.scores[name] for scored in tables.values() for row in scored.rows]
        return max((percent(score) for score in scores if score is not None), key=float, default=None)

    def means(group: Sequence[int]) -> list[TitledRow]:
        rows = mean_rows([tables[index] for index in group])
        return [(title, [spread(scores[name]) for name in METRICS]) for title, scores in rows]

    rows = {
        index: [(row.title, [percent(row.scores[name]) for name in METRICS]) for row in scored.rows]
        for index, scored in tables.items()
    }
    bodies = _by_run(report, shown, rows, means)
    return ReportTable(["masks", *(TITLES[name] for name in METRICS)], bodies, [best(name) for name in METRICS])


def mbo_table(report: Report, shown: SetRecord, protocols: Sequence[str]) -> ReportTable:
    """mBO_i of every run's masks, a column for each protocol."""
    rows = {}
    for index in shown.run_indices:
        tables = [report.runs[index].evaluation.table(name) for name in protocols]
        rows[index] = [
            (shared_title(same), [percent(row.scores["mbo_i"]) for row in same])
            for same in zip(*(scored.rows for scored in tables), strict=True)
        ]
    return ReportTable(["masks", *protocols], _by_run(report, shown, rows))


def _by_run(
    report: Report,
    shown: SetRecord,
    rows: dict[int, list[TitledRow]],
    means: Callable[[Sequence[int]], list[TitledRow]] | None = None,
) -> list[tuple[str, list[TitledRow]]]:
    """Bodies of a table: one for each run, of its index in `rows`, then the `means` of each seed group.

    Baselines that are equal for every run, such as block masks, come once, at the end.
    """
    several = len(rows) > 1
    common = [
        row
        for row in rows[shown.run_indices[0]]
        if several and not row[0].startswith(_TRAINED) and all(row in own for own in rows.values())
    ]
    shared = {title for title, _ in common}

    def without_shared(own: list[TitledRow]) -> list[TitledRow]:
        return [row for row in own if row[0] not in shared]

    bodies = [(report.runs[index].name if several else "", without_shared(own)) for index, own in rows.items()]
    for group in shown.seed_groups if means else []:
        names = ", ".join(report.runs[index].name for index in group)
        bodies.append((f"mean ± std of {names}", without_shared(means(group))))
    if common:
        bodies.append(("without training, the same for every run", common))
    return bodies


def instances_by_size(report: Report, shown: SetRecord) -> list[int]:
    rows = report.runs[shown.run_indices[0]].evaluation.table("spot").rows
    return [count for _, count in rows[0].sizes]


def size_table(rows: Sequence[SizeRow], instances: Sequence[int]) -> ReportTable:
    """mBO_i by instance size, in percent."""
    lines = []
    for row in rows:
        deviations = row.deviations or [None] * len(row.means)
        cells = [
            percent(mean) if mean is None or deviation is None else spread((mean, deviation))
            for mean, deviation in zip(row.means, deviations, strict=True)
        ]
        lines.append((row.name, cells))
    return ReportTable(["masks", *BINS], [("", [*lines, ("instances", [str(count) for count in instances])])])


def used_table(report: Report, shown: SetRecord) -> ReportTable:
    """Masks with pixels in an image, mean by the number of its objects, of every run."""
    bodies, heading = [], ["masks"]
    for index in shown.run_indices:
        record = report.runs[index]
        found = used_by_objects(record.evaluation.table("spot"))
        heading = ["masks", *(f"{number} object{'s' * (number != 1)}" for number, _, _ in found)]
        lines = [(title, [f"{used[title]:.1f}" for _, _, used in found]) for title in found[0][2]]
        bodies.append((record.name if len(shown.run_indices) > 1 else "", lines))
    return ReportTable(heading, [*bodies, ("", [("images", [str(images) for _, images, _ in found])])])


def size_rows(report: Report, shown: SetRecord) -> list[SizeRow]:
    """Every kind of masks of a single run or seed group; otherwise decoder and slot masks of each, runs that differ
    only in their seed as mean and deviation."""
    rows = []
    groups = [next((group for group in shown.seed_groups if index in group), [index]) for index in shown.distinct]
    for colour, group in enumerate(groups):
        tables = [report.runs[index].evaluation.table("spot") for index in group]
        masks = [row.masks for row in tables[0].rows]
        sizes = [(row.title, [mean for mean, _ in row.sizes], None) for row in tables[0].rows]
        if len(group) > 1:
            sizes = [
                (title, [c and c[0] for c in cells], [c[1] if c else 0.0 for c in cells])
                for title, cells in mean_sizes(tables)
            ]
        if len(groups) == 1:
            return [SizeRow(*size, index) for index, size in enumerate(sizes)]
        name = report.runs[group[0]].name
        if len(group) > 1:
            name += f" and {len(group) - 1} more seed{'s' * (len(group) > 2)}"
        all_orders = max(i for i, kind in enumerate(masks) if kind == "decoder")
        for i, dashed in ((all_orders, False), (masks.index("slots"), True)):
            title, means, deviations = sizes[i]
            rows.append(SizeRow(f"{name}, {title}", means, deviations, colour, dashed))
    return rows


def settings_rows(report: Report) -> list[tuple[str, list[str], str]]:
    """(name, value of each run, help) of every setting."""
    configs = [record.run.config for record in report.runs]
    return [(f.name, [str(getattr(config, f.name)) for config in configs], f.metadata["help"]) for f in fields(Config)]
