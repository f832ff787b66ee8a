"""Words and tables that several sections of a report share."""

from __future__ import annotations

from collections.abc import Sequence

from spot_fast.reporting.markup import Markup, tag
from spot_fast.reporting.records import Report, SetRecord


def missing(text: str) -> Markup:
    """The sentence in place of what there is nothing to show of."""
    return tag("p", text, class_="missing")


def table(
    caption: str | None, heading: Sequence[object], bodies: Sequence[object], class_: str | None = None
) -> Markup:
    """A table of parts that are <tbody>; where it is wider than the page, it scrolls by itself."""
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in heading]))
    return tag("div", tag("table", caption and tag("caption", caption), head, bodies, class_=class_), class_="scroll")


def orders_words(orders: int | None) -> str:
    return "patch order 0" if orders == 1 else f"all {orders} patch orders"


def count_of(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def set_line(report: Report, shown: SetRecord) -> str:
    """How many images of which set were scored."""
    evaluation = report.runs[shown.places[0]].evaluation
    if evaluation is None:
        return f"{shown.image_set.name}, without masks"
    count = len(shown.image_set)
    if evaluation.images == count:
        return f"{count_of(count)} of {shown.image_set.name}"
    what = f"{count:,} images of {shown.image_set.name}"
    first = f"the first {min(report.limit, count):,} of " if report.limit else ""
    return first + what + (f", {evaluation.images:,} of them readable" if evaluation.skipped else "")


def source_of(report: Report, images: int, shown: SetRecord, precision: str | None = None) -> str:
    """The small print below a figure: how many images, and all that its numbers depend on."""
    precision = precision or report.settings["precision"]
    return (
        f"{count_of(images)} of {shown.image_set.name} · seed {report.settings['seed']} · {precision} · "
        f"{report.about['versions']} · {report.about['date']}"
    )
