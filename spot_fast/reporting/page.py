"""Renders a report as one self-contained HTML file: no script, nothing to load, readable without either."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spot_fast.evaluation.protocols import PROTOCOLS
from spot_fast.evaluation.tables import NOTES, percent, unlabelled_line
from spot_fast.reporting import descriptions as words
from spot_fast.reporting import tables
from spot_fast.reporting.figures import number, sizes_chart, training_curves
from spot_fast.reporting.images import gallery_panels, gradient_panels, heat_scale, iteration_rows, order_panels
from spot_fast.reporting.records import ImageRecord, Report, SetRecord

_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = ("best", "median", "worst")  # the first image of each is shown in every order and iteration
# Lone surrogates and control characters of file names: no HTML file may hold them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


# What is drawn for each validation set, in order.
SET_PARTS = ("scores", "gallery", "patch orders", "attention by iteration", "gradient norm")


def page(report: Report, begin: Callable[[str], object] = lambda part: None) -> str:
    """The whole document. begin: told what is drawn next, the curves and `SET_PARTS` of each set."""
    begin("curves")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    logged = [(record.name, record.run.config.stage, record.log) for record in report.runs if record.log]
    facts = [words.run_facts(record) for record in report.runs]
    text = environment.get_template("page.html").render(
        report=report,
        leads=[(record.name, words.run_sentence(record)) for record in report.runs],
        scored="; ".join(words.set_words(report, shown) for shown in report.sets),
        facts=[(name, [of_run[name] or "–" for of_run in facts]) for name in facts[0] if any(f[name] for f in facts)],
        curves=training_curves(logged),
        unlogged=[record.name for record in report.runs if not record.log],
        notes=NOTES,
        protocols=PROTOCOLS,
        heat_scale=heat_scale(),
        sets=[_set(report, shown, begin) for shown in report.sets],
        settings=tables.settings_rows(report),
    )
    return _UNPRINTABLE.sub("\ufffd", text.lstrip())


def _set(report: Report, shown: SetRecord, begin: Callable[[str], object]) -> dict:
    """What the template shows of one validation set."""
    runs = [report.runs[index] for index in shown.run_indices]
    one_order = [index for index in shown.distinct if report.runs[index].run.model.num_orders == 1]
    several = [i for i in shown.distinct if i not in one_order]
    with_gradients = [index for index in shown.distinct if report.runs[index].gradients]
    drawing = (
        lambda: None if runs[0].evaluation is None else _scores(report, shown),
        lambda: [(image.choice, gallery_panels(image, [run.name for run in runs])) for image in shown.images],
        lambda: _examples_by_run(report, shown, several, order_panels),
        lambda: _examples_by_run(report, shown, shown.distinct, iteration_rows),
        lambda: [_gradients(report, shown, index) for index in with_gradients],
    )
    drawn = {}
    for part, draw in zip(SET_PARTS, drawing, strict=True):
        begin(part)
        drawn[part] = draw()
    return {
        "name": shown.image_set.name,
        "runs": runs,
        "scores": drawn["scores"],
        "images": drawn["gallery"],
        "with_truth": any(image.truth is not None for image in shown.images),
        "source": words.source_words(report, len(shown.images), shown),
        "examples_source": words.source_words(report, len(_examples(shown)), shown),
        "orders": drawn["patch orders"],
        "one_order": [report.runs[index].name for index in one_order],
        "iterations": drawn["attention by iteration"],
        "gradients": drawn["gradient norm"],
    }


def _scores(report: Report, shown: SetRecord) -> dict:
    runs = [report.runs[index] for index in shown.run_indices]
    evaluation = runs[0].evaluation
    protocols = [scored.protocol for scored in evaluation.tables]
    rows, instances = tables.size_rows(report, shown), tables.instances_by_size(report, shown)
    return {
        "images": words.set_words(report, shown),
        "by_protocol": {name: tables.protocol_table(report, shown, name) for name in protocols},
        "mbo": tables.mbo_table(report, shown, protocols),
        "unlabelled": [(r.name, line) for r in runs if (line := unlabelled_line(r.evaluation.table("spot")))],
        "skipped": [(record.name, words.skipped_words(record)) for record in runs if record.evaluation.skipped],
        "losses": "; ".join(words.loss_words(record) for record in runs),
        "milliseconds": (1000 * evaluation.seconds_per_image, 1000 * evaluation.metric_seconds_per_image),
        "command": words.evaluate_command(report, shown),
        "size_chart": sizes_chart(rows, instances),
        "size_table": tables.size_table(rows, instances),
        "used_table": tables.used_table(report, shown),
        "source": words.source_words(report, evaluation.images, shown),
    }


def _examples(shown: SetRecord) -> list[ImageRecord]:
    """The first best, median and worst image; without scores the first two."""
    first = {}
    for image in shown.images:
        first.setdefault(image.choice.why, image)
    return [first[why] for why in _EXAMPLES if why in first] or shown.images[:2]


def _examples_by_run(report: Report, shown: SetRecord, indices: Sequence[int], panels: Callable) -> list[tuple]:
    """(run name, [(label, largest attention, panels)] of the examples) for each run of `indices`."""
    by_run = []
    for index in indices:
        examples = []
        for image in _examples(shown):
            choice, of_run = image.choice, image.introspections[shown.run_indices.index(index)]
            label = choice.label if choice.score is None else f"{choice.why}: {choice.label}"
            examples.append((label, of_run.iterations.max().item(), panels(label, image.pixels, of_run)))
        by_run.append((report.runs[index].name, examples))
    return by_run


def _gradients(report: Report, shown: SetRecord, index: int) -> dict:
    record = report.runs[index]
    large, small = gradient_panels(record.name, record.gradients)
    return {
        "name": record.name,
        "large": large,
        "small": small,
        "largest": record.gradients.by_order.max().item(),
        "source": words.source_words(report, record.gradients.images, shown, "float32"),
    }
