"""The page of a report: its sections in words, tables and figures. No script, nothing to load, readable without either.

A section that has nothing to show says so in one sentence.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from . import report_figures as figures
from .checkpoint import MODEL
from .config import Config
from .evaluation import Row
from .evaluation_report import (
    BINS,
    NOTES,
    TITLES,
    mean_rows,
    mean_sizes,
    percent,
    spread,
    unlabelled_line,
)
from .markup import Markup, tag
from .metrics import METRICS
from .progress import duration
from .protocols import PROTOCOLS
from .report_data import PictureRecord, Report, RunRecord, SetRecord
from .svg_chart import number

_STYLE = Path(__file__).with_name("report.css")
# No script runs and nothing is fetched, whatever a name in the page may say.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_EXAMPLES = ("best", "median", "worst")  # of each the first picture is looked into


def page(report: Report) -> str:
    """The whole document."""
    names = ", ".join(record.name for record in report.runs)
    sections = [
        _section("runs", "What was trained, and how fast", _runs(report)),
        _section("curves", "Curves", _curves(report)),
        _section("scores", "Scores", _for_sets(report, _scores)),
        _section("sizes", "Scores by instance size", _for_sets(report, _sizes)),
        _section("gallery", "Gallery", _for_sets(report, _gallery)),
        _section("orders", "Masks by patch order", _for_sets(report, _orders)),
        _section("iterations", "Attention by iteration", _for_sets(report, _iterations)),
        _section("gradients", "Gradient norm per patch", _for_sets(report, _gradients)),
        _section("settings", "All settings", _settings(report)),
    ]
    contents = tag("nav", tag("ul", [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections]),
                   aria_label="contents")  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"SPOT report: {names}"),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    body = tag("body", tag("header", tag("h1", f"SPOT report: {names}"), _lead(report), _facts(report), contents),
               tag("main", [content for _, _, content in sections]))  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _section(key: str, title: str, content: object) -> tuple[str, str, Markup]:
    return key, title, tag("section", tag("h2", title), content, id=key)


def _for_sets(report: Report, part: Callable[[Report, SetRecord], object]) -> list[object]:
    """`part` of every validation set, under its name where there are several."""
    several = len(report.sets) > 1
    return [
        [several and tag("h3", f"{shown.image_set.name}: {', '.join(report.runs[i].name for i in shown.places)}"),
         part(report, shown)]
        for shown in report.sets
    ]  # fmt: skip


def _missing(text: str) -> Markup:
    return tag("p", text, class_="missing")


def _table(caption: str | None, heading: Sequence[object], bodies: Sequence[object],
           class_: str | None = None) -> Markup:  # fmt: skip
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in heading]))
    return tag("div", tag("table", caption and tag("caption", caption), head, bodies, class_=class_), class_="scroll")


# ---- the beginning


def _lead(report: Report) -> list[Markup]:
    """A sentence or two about each run: what it is, what it scores, what there is to beat."""
    return [tag("p", _sentence(report, record), class_="lead") for record in report.runs]


def _sentence(report: Report, record: RunRecord) -> list[object]:
    config, log = record.run.config, record.log
    steps = record.run.metadata.get("step")
    text = f": stage {config.stage} on {config.preset}, seed {config.seed}"
    text += f", {config.epochs} epochs" + (f", {int(steps):,} steps of {config.batch_size}" if steps else "")
    if seconds := _seconds(record):
        text += f" in {duration(seconds)}"
    if record.pace:
        text += f" ({number(record.pace)} images/s)"
    text += "."
    if record.evaluation is not None:
        rows = record.evaluation.table("spot").rows
        decoder = [row for row in rows if row.masks == "decoder"][-1]
        others = {kind: next(row for row in rows if row.masks == kind) for kind in ("slots", "blocks", "kmeans")}
        text += (
            f" mBO_i on {_pictures(record.evaluation.images)}: decoder masks {percent(decoder.scores['mbo_i'])} "
            f"({_orders_words(decoder.orders)}), slot masks {percent(others['slots'].scores['mbo_i'])}; to be beaten: "
            f"block masks {percent(others['blocks'].scores['mbo_i'])}, k-means on the same features "
            f"{percent(others['kmeans'].scores['mbo_i'])}."
        )
    if log.skipped:
        steps = "1 step was" if len(log.skipped) == 1 else f"{len(log.skipped)} steps were"
        text += f" {steps} left out because loss or gradient was not finite."
    return [tag("strong", record.name), text]


def _orders_words(orders: int | None) -> str:
    return "patch order 0" if orders == 1 else f"all {orders} patch orders"


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _seconds(record: RunRecord) -> float | None:
    try:
        return float(record.state["seconds"])
    except (KeyError, ValueError):
        return None


def _facts(report: Report) -> Markup:
    facts = {
        "made by": tag("code", report.command, class_="command"), "date": report.about["date"],
        "with": report.about["versions"],
        "on": report.about["device"], "precision": f"{report.settings['precision']}; gradients float32",
        "seed": f"{report.settings['seed']}, of slot noise, k-means and the random pictures",
        "pictures": "; ".join(_set_line(report, shown) for shown in report.sets),
    }  # fmt: skip
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in facts.items()], class_="facts")


def _set_line(report: Report, shown: SetRecord) -> str:
    evaluation = report.runs[shown.places[0]].evaluation
    if evaluation is None:
        return f"{shown.image_set.name}, without masks"
    count = len(shown.image_set)
    if evaluation.images == count:
        return f"{_pictures(count)} of {shown.image_set.name}"
    what = f"{count:,} pictures of {shown.image_set.name}"
    first = f"the first {min(report.limit, count):,} of " if report.limit else ""
    return first + what + (f", {evaluation.images:,} of them readable" if evaluation.skipped else "")


def _source(report: Report, pictures: int, shown: SetRecord, precision: str | None = None) -> str:
    precision = precision or report.settings["precision"]
    return (f"{_pictures(pictures)} of {shown.image_set.name} · seed {report.settings['seed']} · {precision} · "
            f"{report.about['versions']} · {report.about['date']}")  # fmt: skip


# ---- runs


def _runs(report: Report) -> object:
    described = [_described(record) for record in report.runs]
    rows = []
    for name in described[0]:
        cells = [facts[name] or "–" for facts in described]
        if not any(facts[name] for facts in described):
            continue
        rows.append(tag("tr", tag("th", name, scope="row"), [tag("td", cell) for cell in cells],
                        class_="differs" if len(set(cells)) > 1 else None))  # fmt: skip
    several = len(report.runs) > 1 and tag("p", "Shaded rows differ between the runs.")
    heading = ["", *(record.name for record in report.runs)]
    return [several, _table(None, heading, [tag("tbody", rows)], "settings")]


def _described(record: RunRecord) -> dict[str, str | None]:
    """What was trained and how fast, in words; None where it is not known or has no meaning."""
    config, state, metadata = record.run.config, record.state, record.run.metadata
    model = record.run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(
        p.numel() for p in model.encoder.parameters() if p.requires_grad)  # fmt: skip
    decoder = (f"transformer, {config.dec_blocks} blocks of {config.dec_heads} heads, "
               f"{_orders_words(model.num_orders)}" if config.decoder == "transformer" else
               f"MLP, hidden width {config.dec_mlp_hidden}")  # fmt: skip
    if config.cappa:
        decoder += f", CapPa {config.cappa}"
    last = (record.log.train or record.log.epoch or [{}])[-1]
    finished = datetime.fromtimestamp((record.run.path / MODEL).stat().st_mtime).astimezone()
    return {
        "data": config.preset + (f", {int(state['images']):,} pictures" if state.get("images", "").isdigit() else ""),
        "stage": str(config.stage),
        "teacher": metadata.get("teacher"),
        "seed": str(config.seed),
        "encoder": f"{metadata.get('encoder', config.encoder)}, weights {metadata.get('encoder_sha256', '')[:12]}",
        "grid": f"{model.encoder.grid} × {model.encoder.grid} patches of {config.image_size} pixels a side",
        "slots": f"{config.num_slots} of width {config.slot_dim}, {config.slot_iterations} iterations, "
                 f"{config.slot_init}, gradients {config.truncation}",
        "decoder": decoder,
        "parameters": f"{trained / 1e6:.1f} M trained",
        "length": f"{config.epochs} epochs" + (f", {int(metadata['step']):,} steps" if "step" in metadata else ""),
        "batch": f"{config.batch_size}" + (f", in {config.accumulate} parts" if config.accumulate > 1 else ""),
        "learning rate": f"{number(config.lr)} → {number(config.lr_low)}, warm-up {config.warmup_steps:,} steps",
        "λ of L_ATT": number(config.att_weight) if config.stage == 2 else None,
        "precision": config.precision,
        "compiled": config.compile,
        "device": _device_words(state),
        "time": duration(seconds) if (seconds := _seconds(record)) else None,
        "pace": f"{number(record.pace)} images/s, {1000 * config.batch_size / record.pace:,.0f} ms a step (median)"
                if record.pace else None,
        "peak memory": f"{last['peak_memory'] / 1e9:.1f} GB" if last.get("peak_memory") else None,
        "MFU": f"{last['mfu']:.0%}" if last.get("mfu") else None,
        "torch": state.get("torch"),
        "finished": finished.strftime("%Y-%m-%d %H:%M"),
        "folder": str(record.run.path),
    }  # fmt: skip


def _device_words(state: dict[str, str]) -> str | None:
    if "device" not in state:
        return None
    words = [state["device"]]
    if state["device"] == "cpu" and "threads" in state:
        words.append(f"{state['threads']} thread{'s' * (state['threads'] != '1')}")
    if state.get("processes", "1") != "1":
        words.append(f"{state['processes']} processes")
    return ", ".join(words)


def _curves(report: Report) -> object:
    logged = [(record.name, record.run.config.stage, record.log) for record in report.runs if record.log]
    silent = [record.name for record in report.runs if not record.log]
    missing = silent and _missing(f"{', '.join(silent)}: there is no metrics.jsonl in the folder, so no curves.")
    return [missing, logged and tag("div", figures.training_curves(logged), class_="charts")]


def _settings(report: Report) -> object:
    rows = []
    for field in fields(Config):
        values = [str(getattr(record.run.config, field.name)) for record in report.runs]
        rows.append(tag("tr", tag("th", field.name, scope="row"), [tag("td", value) for value in values],
                        tag("td", field.metadata["help"]),
                        class_="differs" if len(set(values)) > 1 else None))  # fmt: skip
    heading = ["", *(record.name for record in report.runs), "what it is"]
    return tag("details", tag("summary", "config.json of every run"),
               _table(None, heading, [tag("tbody", rows)], "settings"))  # fmt: skip


# ---- scores


def _no_masks(shown: SetRecord, what: str) -> Markup:
    return _missing(f"{shown.image_set.name} has no masks to compare with, so there {what}.")


def _scores(report: Report, shown: SetRecord) -> object:
    records = [report.runs[place] for place in shown.places]
    if records[0].evaluation is None:
        return _no_masks(shown, "are no scores")
    protocols = [scored.protocol for scored in records[0].evaluation.tables]
    parts: list[object] = [
        tag("p", f"Percent, {_set_line(report, shown)}, protocol spot. In bold the best of a column. Block masks "
                 "and k-means need no training: a model has to beat both."),
        _protocol_table(report, shown, "spot"),
        tag("ul", [tag("li", note) for note in NOTES], class_="notes"),
    ]  # fmt: skip
    for record in records:
        evaluation = record.evaluation
        if line := unlabelled_line(evaluation.table("spot")):
            parts.append(tag("p", f"{record.name}: {line}.", class_="notes"))
        if evaluation.skipped:
            some = "; ".join(f"{label}: {reason}" for label, reason in list(evaluation.skipped.items())[:10])
            parts.append(tag("p", f"{record.name}: skipped {len(evaluation.skipped)} that cannot be read: {some}",
                             class_="notes"))  # fmt: skip
    others = [name for name in protocols if name != "spot"]
    if others:
        parts += [
            tag("h3", "Under other protocols"),
            tag("p", "Published scores are not all counted alike. Here is mBO_i of the same masks, counted as these "
                     "code bases count; the other metrics are below."),
            _across(report, shown, protocols),
        ]  # fmt: skip
        for name in others:
            about = tag("p", f"{PROTOCOLS[name].about} [{PROTOCOLS[name].source}]", class_="notes")
            parts.append(tag("details", tag("summary", f"All metrics under {name}"), about,
                             _protocol_table(report, shown, name)))  # fmt: skip
    losses = "; ".join(
        f"{record.name} " + ", ".join(f"{loss:.4f} ({_orders_words(orders)})"
                                      for orders, loss in record.evaluation.reconstruction.items())
        for record in records)  # fmt: skip
    parts += [tag("p", f"Reconstruction loss: {losses}. Evaluation took "
                       f"{1000 * records[0].evaluation.seconds_per_image:.1f} ms a picture, "
                       f"{1000 * records[0].evaluation.metric_seconds_per_image:.1f} of them metrics.", class_="notes"),
              tag("p", "The same tables on a terminal: ",
                  tag("code", _evaluate_command(report, shown), class_="command"), class_="notes")]  # fmt: skip
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
        name: max((percent(row.scores[name]) for scored in tables.values() for row in scored.rows
                   if row.scores[name] is not None), key=float, default=None)
        for name in METRICS
    }  # fmt: skip

    def line(row: Row) -> Markup:
        cells = [(percent(row.scores[name]), best[name]) for name in METRICS]
        return tag("tr", tag("th", row.title, scope="row"),
                   [tag("td", cell, class_="best" if cell == top else None) for cell, top in cells])  # fmt: skip

    def means(group: Sequence[int], shared: set[str]) -> list[Markup]:
        return [tag("tr", tag("th", title, scope="row"), [tag("td", spread(scores[name])) for name in METRICS])
                for title, scores in mean_rows([tables[place] for place in group]) if title not in shared]  # fmt: skip

    return _by_run(report, shown, None, [TITLES[name] for name in METRICS],
                   {place: [(row.title, line(row)) for row in scored.rows] for place, scored in tables.items()},
                   means)  # fmt: skip


def _by_run(
    report: Report, shown: SetRecord, caption: str | None, heading: Sequence[str],
    lines: dict[int, list[tuple[str, Markup]]],
    means: Callable[[Sequence[int], set[str]], list[Markup]] | None = None,
) -> Markup:  # fmt: skip
    """A table with a part for each run. lines: of a run's place, (title, row). What is the same for every run, such as
    block masks, stands once, at the end; means: of runs that differ in their seed only, without those."""
    several = len(lines) > 1
    common = [line for line in lines[shown.places[0]] if several and all(line in own for own in lines.values())]
    shared = {title for title, _ in common}
    width = len(heading) + 1
    bodies = [_body(several and report.runs[place].name, width, [row for title, row in own if title not in shared])
              for place, own in lines.items()]  # fmt: skip
    for group in shown.alike if means else []:
        name = f"mean ± std of {', '.join(report.runs[place].name for place in group)}"
        bodies.append(_body(name, width, means(group, shared)))
    if common:
        bodies.append(_body("without training, the same for every run", width, [row for _, row in common]))
    return _table(caption, ["masks", *heading], bodies)


def _body(title: object, columns: int, lines: Sequence[Markup]) -> Markup:
    return tag("tbody", title and tag("tr", tag("th", title, colspan=columns, scope="rowgroup"), class_="run"), lines)


def _across(report: Report, shown: SetRecord, protocols: Sequence[str]) -> Markup:
    """mBO_i of every run's masks, a column for each protocol."""
    lines = {}
    for place in shown.places:
        evaluation = report.runs[place].evaluation
        lines[place] = [
            (title := _shared_title(rows), tag("tr", tag("th", title, scope="row"),
                                               [tag("td", percent(row.scores["mbo_i"])) for row in rows]))
            for rows in zip(*(evaluation.table(name).rows for name in protocols), strict=True)
        ]  # fmt: skip
    return _by_run(report, shown, "mBO_i, percent", protocols, lines)


def _shared_title(rows: Sequence[Row]) -> str:
    """Block masks may have another number of columns under each protocol."""
    titles = {row.title for row in rows}
    return titles.pop() if len(titles) == 1 else "block masks, best columns [2]"


def _sizes(report: Report, shown: SetRecord) -> object:
    records = [report.runs[place] for place in shown.places]
    if records[0].evaluation is None:
        return _no_masks(shown, "are no scores by size")
    rows = _size_rows(report, shown)
    instances = [count for _, count in records[0].evaluation.table("spot").rows[0].sizes]
    chart = figures.sizes_chart(rows, instances, _source(report, records[0].evaluation.images, shown))
    lines = []
    for row in rows:
        cells = [percent(mean) if row.deviations is None or mean is None else spread((mean, deviation))
                 for mean, deviation in zip(row.means, row.deviations or row.means, strict=True)]  # fmt: skip
        lines.append(tag("tr", tag("th", row.name, scope="row"), [tag("td", cell) for cell in cells]))
    lines.append(tag("tr", tag("th", "instances", scope="row"), [tag("td", str(count)) for count in instances]))
    numbers = _table("mBO_i, percent, by size in percent of the label map", ["masks", *BINS], [tag("tbody", lines)])
    return [tag("div", chart, class_="wide"), numbers]


def _size_rows(report: Report, shown: SetRecord) -> list[figures.SizeRow]:
    """Every kind of masks where there is one kind of run; otherwise decoder and slot masks of each kind. Runs that
    differ in their seed only are one kind, with mean and deviation."""
    rows = []
    kinds = [next((group for group in shown.alike if place in group), [place]) for place in shown.kinds]
    for colour, group in enumerate(kinds):
        tables = [report.runs[place].evaluation.table("spot") for place in group]
        own = tables[0].rows
        sizes = [(row.title, [mean for mean, _ in row.sizes], None) for row in own]
        if len(group) > 1:
            sizes = [(title, [c and c[0] for c in cells], [c[1] if c else 0.0 for c in cells])
                     for title, cells in mean_sizes(tables)]  # fmt: skip
        if len(kinds) == 1:
            return [figures.SizeRow(*size, place) for place, size in enumerate(sizes)]
        name = report.runs[group[0]].name + (f" and {_more_seeds(len(group) - 1)}" if len(group) > 1 else "")
        last = max(i for i, row in enumerate(own) if row.masks == "decoder")
        slots = next(i for i, row in enumerate(own) if row.masks == "slots")
        for i, dashed in ((last, False), (slots, True)):
            title, means, deviations = sizes[i]
            rows.append(figures.SizeRow(f"{name}, {title}", means, deviations, colour, dashed))
    return rows


def _more_seeds(count: int) -> str:
    return f"{count} more seed{'s' * (count > 1)}"


# ---- pictures


def _gallery(report: Report, shown: SetRecord) -> object:
    if not shown.pictures:
        return _missing(f"No picture of {shown.image_set.name} can be read.")
    names = [report.runs[place].name for place in shown.places]
    shown_pictures = [
        figures.gallery_picture(p.chosen.why, p.chosen.label, p.chosen.score, p.pixels, p.truth and p.truth.instances,
                                list(zip(names, p.looks, strict=True)))
        for p in shown.pictures
    ]  # fmt: skip
    if shown.pictures[0].truth is None:
        how = "Drawn at random. Each slot has a colour, the same in decoder and slot masks."
    else:
        mean = ", a mean over the runs" if len(names) > 1 else ""
        how = (f"Chosen by the mBO_i of the decoder masks, of all patch orders where there are several{mean}, protocol "
               "spot; numbers are mBO_i in percent. A slot has the colour of the object that it covers best, one to "
               "one, grey being the background; other colours have no partner. Black pixels of the truth are not "
               "counted.")  # fmt: skip
    return [tag("p", how, " ", tag("small", _source(report, len(shown.pictures), shown), class_="source")),
            tag("div", shown_pictures, class_="gallery many" if len(names) > 1 else "gallery")]  # fmt: skip


def _examples(shown: SetRecord) -> list[PictureRecord]:
    """The pictures that are looked into: the first best, median and worst, or two of any."""
    first = {}
    for picture in shown.pictures:
        first.setdefault(picture.chosen.why, picture)
    return [first[why] for why in _EXAMPLES if why in first] or shown.pictures[:2]


def _looked_into(report: Report, shown: SetRecord, draw: Callable[[PictureRecord, int, str], Markup | None]) -> list:
    """`draw` of the examples for one run of each kind, under its name where there are several."""
    parts: list[object] = []
    for place in shown.kinds:
        drawn = []
        for picture in _examples(shown):
            score = picture.chosen.score
            label = f"{picture.chosen.why}: {picture.chosen.label}" if score is not None else picture.chosen.label
            drawn.append(draw(picture, shown.places.index(place), label))
        if any(drawn):
            parts += [len(shown.places) > 1 and tag("h3", report.runs[place].name), drawn]
    return parts


def _orders(report: Report, shown: SetRecord) -> object:
    with_orders = [place for place in shown.kinds if report.runs[place].run.model.num_orders > 1]
    without = [report.runs[place].name for place in shown.kinds if place not in with_orders]
    missing = without and _missing(f"{', '.join(without)}: the decoder has one patch order, so there is nothing to "
                                   "average.")  # fmt: skip
    drawn = _looked_into(report, shown, lambda picture, run, label: figures.order_masks(
        label, picture.pixels, picture.looks[run]))  # fmt: skip
    how = tag("p", "Decoder masks when the patches are predicted in each order, and the average of the soft masks, "
                   "which is what “all orders” scores. Numbers are mBO_i in percent.", " ",
              tag("small", _source(report, len(_examples(shown)), shown), class_="source"))  # fmt: skip
    return [missing, drawn and [how, drawn]]


def _iterations(report: Report, shown: SetRecord) -> object:
    if not shown.pictures:
        return _missing(f"No picture of {shown.image_set.name} can be read.")
    drawn = _looked_into(report, shown, lambda picture, run, label: figures.attention_iterations(
        label, picture.pixels, picture.looks[run]))  # fmt: skip
    how = tag("p", "Slot attention in each iteration: left which slot has most of each patch, then every slot's soft "
                   "map at the resolution of the patches, black is 0, with its share of the picture. The last "
                   " iteration gives the slot masks.", " ",
              tag("small", _source(report, len(_examples(shown)), shown), class_="source"))  # fmt: skip
    return [how, drawn]


def _gradients(report: Report, shown: SetRecord) -> object:
    drawn = []
    for place in shown.kinds:
        record = report.runs[place]
        if record.gradients is not None:
            source = _source(report, record.gradients.pictures, shown, "float32")
            drawn.append(figures.gradient_figure(record.name, record.gradients, source))
    if drawn:
        return [tag("p", figures.GRADIENTS_EXPLAINED), drawn]
    return _missing("Left out: --gradient-images is 0, or no picture can be read.")
