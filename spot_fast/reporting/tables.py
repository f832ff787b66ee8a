"""The scores of a report: tables of every metric, run and protocol beside the baselines, and mBO_i by instance size."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.protocols import PROTOCOLS
from spot_fast.evaluation.scoring import Row
from spot_fast.evaluation.tables import BINS, NOTES, TITLES, mean_rows, mean_sizes, percent, spread, unlabelled_line
from spot_fast.reporting import figures as figures
from spot_fast.reporting.markup import Markup, tag
from spot_fast.reporting.parts import missing, orders_words, set_line, source_of, table
from spot_fast.reporting.records import Report, SetRecord

_TRAINED = ("decoder", "slot")  # what the titles of rows begin with that are no baselines


def _no_masks(shown: SetRecord, what: str) -> Markup:
    return missing(f"{shown.image_set.name} has no masks to compare with, so there {what}.")


def scores(report: Report, shown: SetRecord) -> object:
    """Every metric under SPOT's protocol, mBO_i under all, the other metrics under the others to be unfolded."""
    records = [report.runs[place] for place in shown.places]
    if records[0].evaluation is None:
        return _no_masks(shown, "are no scores")
    protocols = [scored.protocol for scored in records[0].evaluation.tables]
    parts: list[object] = [
        tag(
            "p",
            f"Percent, {set_line(report, shown)}, protocol spot. In bold the best of a column. Block masks "
            "and k-means need no training: a model has to beat both.",
        ),
        _protocol_table(report, shown, "spot"),
        tag("ul", [tag("li", note) for note in NOTES], class_="notes"),
    ]
    for record in records:
        evaluation = record.evaluation
        if line := unlabelled_line(evaluation.table("spot")):
            parts.append(tag("p", f"{record.name}: {line}.", class_="notes"))
        if evaluation.skipped:
            some = "; ".join(f"{label}: {reason}" for label, reason in list(evaluation.skipped.items())[:10])
            parts.append(
                tag(
                    "p", f"{record.name}: skipped {len(evaluation.skipped)} that cannot be read: {some}", class_="notes"
                )
            )
    others = [name for name in protocols if name != "spot"]
    if others:
        parts += [
            tag("h3", "Under other protocols"),
            tag(
                "p",
                "Published scores are not all counted alike. Here is mBO_i of the same masks, counted as these "
                "code bases count; the other metrics are below.",
            ),
            _across(report, shown, protocols),
        ]
        for name in others:
            about = tag("p", f"{PROTOCOLS[name].about} [{PROTOCOLS[name].source}]", class_="notes")
            parts.append(
                tag("details", tag("summary", f"All metrics under {name}"), about, _protocol_table(report, shown, name))
            )
    losses = "; ".join(
        f"{record.name} "
        + ", ".join(f"{loss:.4f} ({orders_words(orders)})" for orders, loss in record.evaluation.reconstruction.items())
        for record in records
    )
    parts += [
        tag(
            "p",
            f"Reconstruction loss: {losses}. Evaluation took "
            f"{1000 * records[0].evaluation.seconds_per_image:.1f} ms an image, "
            f"{1000 * records[0].evaluation.metric_seconds_per_image:.1f} of them metrics.",
            class_="notes",
        ),
        tag(
            "p",
            "The same tables on a terminal: ",
            tag("code", _evaluate_command(report, shown), class_="command"),
            class_="notes",
        ),
    ]
    return parts


def _evaluate_command(report: Report, shown: SetRecord) -> str:
    words = ["python", "-m", "spot_fast.evaluate", *(str(report.runs[place].run.path) for place in shown.places)]
    words += ["--protocol", ",".join(t.protocol for t in report.runs[shown.places[0]].evaluation.tables), "--sizes"]
    words += ["--seed", report.settings["seed"], "--precision", report.settings["precision"]]
    if report.data:
        words += ["--data", report.data]
    if report.limit:
        words += ["--limit", str(report.limit)]
    return shlex.join(words)


def _protocol_table(report: Report, shown: SetRecord, protocol: str) -> Markup:
    """All metrics of every run under one protocol, then mean ± deviation of runs that differ in their seed only."""
    tables = {place: report.runs[place].evaluation.table(protocol) for place in shown.places}
    best = {
        name: max(
            (
                percent(row.scores[name])
                for scored in tables.values()
                for row in scored.rows
                if row.scores[name] is not None
            ),
            key=float,
            default=None,
        )
        for name in METRICS
    }

    def line(row: Row) -> Markup:
        cells = [(percent(row.scores[name]), best[name]) for name in METRICS]
        return tag(
            "tr",
            tag("th", row.title, scope="row"),
            [tag("td", cell, class_="best" if cell == top else None) for cell, top in cells],
        )

    def means(group: Sequence[int], shared: set[str]) -> list[Markup]:
        return [
            tag("tr", tag("th", title, scope="row"), [tag("td", spread(found[name])) for name in METRICS])
            for title, found in mean_rows([tables[place] for place in group])
            if title not in shared
        ]

    return _by_run(
        report,
        shown,
        None,
        [TITLES[name] for name in METRICS],
        {place: [(row.title, line(row)) for row in scored.rows] for place, scored in tables.items()},
        means,
    )


def _by_run(
    report: Report,
    shown: SetRecord,
    caption: str | None,
    heading: Sequence[str],
    lines: dict[int, list[tuple[str, Markup]]],
    means: Callable[[Sequence[int], set[str]], list[Markup]] | None = None,
) -> Markup:
    """A table with a part for each run. lines: of a run's place, (title, row). What is the same for every run, such as
    block masks, stands once, at the end; means: of runs that differ in their seed only, without those."""
    several = len(lines) > 1
    common = [
        line
        for line in lines[shown.places[0]]
        if several and not line[0].startswith(_TRAINED) and all(line in own for own in lines.values())
    ]
    shared = {title for title, _ in common}
    width = len(heading) + 1
    bodies = [
        _body(several and report.runs[place].name, width, [row for title, row in own if title not in shared])
        for place, own in lines.items()
    ]
    for group in shown.alike if means else []:
        name = f"mean ± std of {', '.join(report.runs[place].name for place in group)}"
        bodies.append(_body(name, width, means(group, shared)))
    if common:
        bodies.append(_body("without training, the same for every run", width, [row for _, row in common]))
    return table(caption, ["masks", *heading], bodies)


def _body(title: object, columns: int, lines: Sequence[Markup]) -> Markup:
    return tag("tbody", title and tag("tr", tag("th", title, colspan=columns, scope="rowgroup"), class_="run"), lines)


def _across(report: Report, shown: SetRecord, protocols: Sequence[str]) -> Markup:
    """mBO_i of every run's masks, a column for each protocol."""
    lines = {}
    for place in shown.places:
        evaluation = report.runs[place].evaluation
        lines[place] = [
            (
                title := _shared_title(rows),
                tag("tr", tag("th", title, scope="row"), [tag("td", percent(row.scores["mbo_i"])) for row in rows]),
            )
            for rows in zip(*(evaluation.table(name).rows for name in protocols), strict=True)
        ]
    return _by_run(report, shown, "mBO_i, percent", protocols, lines)


def _shared_title(rows: Sequence[Row]) -> str:
    """Block masks may have another number of columns under each protocol."""
    titles = {row.title for row in rows}
    return titles.pop() if len(titles) == 1 else "block masks, best columns [2]"


def sizes(report: Report, shown: SetRecord) -> object:
    """mBO_i by instance size, as a chart and as numbers."""
    records = [report.runs[place] for place in shown.places]
    if records[0].evaluation is None:
        return _no_masks(shown, "are no scores by size")
    rows = _size_rows(report, shown)
    instances = [count for _, count in records[0].evaluation.table("spot").rows[0].sizes]
    chart = figures.sizes_chart(rows, instances, source_of(report, records[0].evaluation.images, shown))
    lines = []
    for row in rows:
        cells = [
            percent(mean) if row.deviations is None or mean is None else spread((mean, deviation))
            for mean, deviation in zip(row.means, row.deviations or row.means, strict=True)
        ]
        lines.append(tag("tr", tag("th", row.name, scope="row"), [tag("td", cell) for cell in cells]))
    lines.append(tag("tr", tag("th", "instances", scope="row"), [tag("td", str(count)) for count in instances]))
    numbers = table("mBO_i, percent, by size in percent of the label map", ["masks", *BINS], [tag("tbody", lines)])
    return [tag("div", chart, class_="wide"), numbers]


def _size_rows(report: Report, shown: SetRecord) -> list[figures.SizeRow]:
    """Every kind of masks where there is one kind of run; otherwise decoder and slot masks of each kind. Runs that
    differ in their seed only are one kind, with mean and deviation."""
    rows = []
    kinds = [next((group for group in shown.alike if place in group), [place]) for place in shown.kinds]
    for colour, group in enumerate(kinds):
        tables = [report.runs[place].evaluation.table("spot") for place in group]
        own = tables[0].rows
        bins = [(row.title, [mean for mean, _ in row.sizes], None) for row in own]
        if len(group) > 1:
            bins = [
                (title, [c and c[0] for c in cells], [c[1] if c else 0.0 for c in cells])
                for title, cells in mean_sizes(tables)
            ]
        if len(kinds) == 1:
            return [figures.SizeRow(*size, place) for place, size in enumerate(bins)]
        name = report.runs[group[0]].name + (f" and {_more_seeds(len(group) - 1)}" if len(group) > 1 else "")
        last = max(i for i, row in enumerate(own) if row.masks == "decoder")
        slots = next(i for i, row in enumerate(own) if row.masks == "slots")
        for i, dashed in ((last, False), (slots, True)):
            title, means, deviations = bins[i]
            rows.append(figures.SizeRow(f"{name}, {title}", means, deviations, colour, dashed))
    return rows


def _more_seeds(count: int) -> str:
    return f"{count} more seed{'s' * (count > 1)}"
