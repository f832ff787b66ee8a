"""The page of a report: its sections in words, tables and figures. No script, nothing to load, readable without either.

A section that has nothing to show says so in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from spot_fast.checkpoints.runs import MODEL
from spot_fast.config import Config
from spot_fast.evaluation.tables import percent
from spot_fast.reporting import figures as figures
from spot_fast.reporting.markup import Markup, tag
from spot_fast.reporting.parts import count_of, missing, orders_words, set_line, source_of, table
from spot_fast.reporting.records import ImageRecord, Report, RunRecord, SetRecord
from spot_fast.reporting.svg_chart import number
from spot_fast.reporting.tables import scores, sizes
from spot_fast.training.console import duration

_STYLE = Path(__file__).with_name("report.css")
# No script runs and nothing is fetched, whatever a name in the page may say.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_EXAMPLES = ("best", "median", "worst")  # of each the first image is looked into


def page(report: Report) -> str:
    """The whole document."""
    names = ", ".join(record.name for record in report.runs)
    sections = [
        _section("runs", "What was trained, and how fast", _runs(report)),
        _section("curves", "Curves", _curves(report)),
        _section("scores", "Scores", _for_sets(report, scores)),
        _section("sizes", "Scores by instance size", _for_sets(report, sizes)),
        _section("gallery", "Gallery", _for_sets(report, _gallery)),
        _section("orders", "Masks by patch order", _for_sets(report, _orders)),
        _section("iterations", "Attention by iteration", _for_sets(report, _iterations)),
        _section("gradients", "Gradient norm per patch", _for_sets(report, _gradients)),
        _section("settings", "All settings", _settings(report)),
    ]
    contents = tag(
        "nav",
        tag("ul", [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections]),
        aria_label="contents",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"SPOT report: {names}"),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("header", tag("h1", f"SPOT report: {names}"), _lead(report), _facts(report), contents),
        tag("main", [content for _, _, content in sections]),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _section(key: str, title: str, content: object) -> tuple[str, str, Markup]:
    return key, title, tag("section", tag("h2", title), content, id=key)


def _for_sets(report: Report, part: Callable[[Report, SetRecord], object]) -> list[object]:
    """`part` of every validation set, below the set's name where there are several."""
    several = len(report.sets) > 1
    return [
        [
            several and tag("h3", f"{shown.image_set.name}: {', '.join(report.runs[i].name for i in shown.places)}"),
            part(report, shown),
        ]
        for shown in report.sets
    ]


# ---- the beginning


def _lead(report: Report) -> list[Markup]:
    """A sentence or two about each run: what it is, what it scores, what there is to beat."""
    return [tag("p", _sentence(report, record), class_="lead") for record in report.runs]


def _sentence(report: Report, record: RunRecord) -> list[object]:
    config, log = record.run.config, record.log
    steps = record.run.metadata.get("step")
    text = f": stage {config.stage} on {config.recipe}, seed {config.seed}"
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
            f" mBO_i on {count_of(record.evaluation.images)}: decoder masks {percent(decoder.scores['mbo_i'])} "
            f"({orders_words(decoder.orders)}), slot masks {percent(others['slots'].scores['mbo_i'])}; to be beaten: "
            f"block masks {percent(others['blocks'].scores['mbo_i'])}, k-means on the same features "
            f"{percent(others['kmeans'].scores['mbo_i'])}."
        )
    if log.skipped:
        steps = "1 step was" if len(log.skipped) == 1 else f"{len(log.skipped)} steps were"
        text += f" {steps} left out because loss or gradient was not finite."
    return [tag("strong", record.name), text]


def _seconds(record: RunRecord) -> float | None:
    try:
        return float(record.state["seconds"])
    except (KeyError, ValueError):
        return None


def _facts(report: Report) -> Markup:
    facts = {
        "made by": tag("code", report.command, class_="command"),
        "date": report.about["date"],
        "with": report.about["versions"],
        "on": report.about["device"],
        "precision": f"{report.settings['precision']}; gradients float32",
        "seed": f"{report.settings['seed']}, of slot noise, k-means and the random images",
        "images": "; ".join(set_line(report, shown) for shown in report.sets),
    }
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in facts.items()], class_="facts")


# ---- runs


def _runs(report: Report) -> object:
    described = [_described(record) for record in report.runs]
    rows = []
    for name in described[0]:
        cells = [facts[name] or "–" for facts in described]
        if not any(facts[name] for facts in described):
            continue
        rows.append(
            tag(
                "tr",
                tag("th", name, scope="row"),
                [tag("td", cell) for cell in cells],
                class_="differs" if len(set(cells)) > 1 else None,
            )
        )
    several = len(report.runs) > 1 and tag("p", "Shaded rows differ between the runs.")
    heading = ["", *(record.name for record in report.runs)]
    return [several, table(None, heading, [tag("tbody", rows)], "settings")]


def _described(record: RunRecord) -> dict[str, str | None]:
    """What was trained and how fast, in words; None where it is not known or has no meaning."""
    config, state, metadata = record.run.config, record.state, record.run.metadata
    model = record.run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(
        p.numel() for p in model.encoder.parameters() if p.requires_grad
    )
    decoder = {
        "transformer": f"transformer, {config.dec_blocks} blocks of {config.dec_heads} heads, "
        f"{orders_words(model.num_orders)}",
        "mlp": f"MLP, hidden width {config.dec_mlp_hidden}",
    }.get(config.decoder, config.decoder)  # a registered decoder goes by its own name
    if config.cappa:
        decoder += f", CapPa {config.cappa}"
    last = (record.log.train or record.log.epoch or [{}])[-1]
    finished = datetime.fromtimestamp((record.run.path / MODEL).stat().st_mtime).astimezone()
    return {
        "data": config.preset + (f", {int(state['images']):,} images" if state.get("images", "").isdigit() else ""),
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
        if record.pace
        else None,
        "peak memory": f"{last['peak_memory'] / 1e9:.1f} GB" if last.get("peak_memory") else None,
        "MFU": f"{last['mfu']:.0%}" if last.get("mfu") else None,
        "torch": state.get("torch"),
        "finished": finished.strftime("%Y-%m-%d %H:%M"),
        "folder": str(record.run.path),
    }


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
    no_log = silent and missing(f"{', '.join(silent)}: there is no metrics.jsonl in the folder, so no curves.")
    return [no_log, logged and tag("div", figures.training_curves(logged), class_="charts")]


def _settings(report: Report) -> object:
    rows = []
    for field in fields(Config):
        values = [str(getattr(record.run.config, field.name)) for record in report.runs]
        rows.append(
            tag(
                "tr",
                tag("th", field.name, scope="row"),
                [tag("td", value) for value in values],
                tag("td", field.metadata["help"]),
                class_="differs" if len(set(values)) > 1 else None,
            )
        )
    heading = ["", *(record.name for record in report.runs), "what it is"]
    return tag(
        "details", tag("summary", "config.json of every run"), table(None, heading, [tag("tbody", rows)], "settings")
    )


# ---- images


def _gallery(report: Report, shown: SetRecord) -> object:
    if not shown.images:
        return missing(f"No image of {shown.image_set.name} can be read.")
    names = [report.runs[place].name for place in shown.places]
    shown_images = [
        figures.gallery_image(
            p.chosen.why,
            p.chosen.label,
            p.chosen.score,
            p.pixels,
            p.truth and p.truth.instances,
            list(zip(names, p.looks, strict=True)),
        )
        for p in shown.images
    ]
    if shown.images[0].truth is None:
        how = "Drawn at random. Each slot has a colour, the same in decoder and slot masks."
    else:
        mean = ", a mean over the runs" if len(names) > 1 else ""
        how = (
            f"Chosen by the mBO_i of the decoder masks, of all patch orders where there are several{mean}, protocol "
            "spot; numbers are mBO_i in percent. A slot has the colour of the object that it covers best, one to "
            "one, grey being the background; other colours have no partner. Black pixels of the truth are not "
            "counted."
        )
    return [
        tag("p", how, " ", tag("small", source_of(report, len(shown.images), shown), class_="source")),
        tag("div", shown_images, class_="gallery many" if len(names) > 1 else "gallery"),
    ]


def _examples(shown: SetRecord) -> list[ImageRecord]:
    """The images that are looked into: the first best, median and worst, or two of any."""
    first = {}
    for image in shown.images:
        first.setdefault(image.chosen.why, image)
    return [first[why] for why in _EXAMPLES if why in first] or shown.images[:2]


def _looked_into(report: Report, shown: SetRecord, draw: Callable[[ImageRecord, int, str], Markup | None]) -> list:
    """`draw` of the examples for one run of each kind, under its name where there are several."""
    parts: list[object] = []
    for place in shown.kinds:
        drawn = []
        for image in _examples(shown):
            score = image.chosen.score
            label = f"{image.chosen.why}: {image.chosen.label}" if score is not None else image.chosen.label
            drawn.append(draw(image, shown.places.index(place), label))
        if any(drawn):
            parts += [len(shown.places) > 1 and tag("h3", report.runs[place].name), drawn]
    return parts


def _orders(report: Report, shown: SetRecord) -> object:
    if not shown.images:
        return missing(f"No image of {shown.image_set.name} can be read.")
    with_orders = [place for place in shown.kinds if report.runs[place].run.model.num_orders > 1]
    without = [report.runs[place].name for place in shown.kinds if place not in with_orders]
    alone = without and missing(
        f"{', '.join(without)}: the decoder has one patch order, so there is nothing to average."
    )
    drawn = _looked_into(
        report, shown, lambda image, run, label: figures.order_masks(label, image.pixels, image.looks[run])
    )
    how = tag(
        "p",
        "Decoder masks when the patches are predicted in each order, and the average of the soft masks, "
        "which is what “all orders” scores. Numbers are mBO_i in percent.",
        " ",
        tag("small", source_of(report, len(_examples(shown)), shown), class_="source"),
    )
    return [alone, drawn and [how, drawn]]


def _iterations(report: Report, shown: SetRecord) -> object:
    if not shown.images:
        return missing(f"No image of {shown.image_set.name} can be read.")
    drawn = _looked_into(
        report,
        shown,
        lambda image, run, label: figures.attention_iterations(label, image.pixels, image.looks[run]),
    )
    how = tag(
        "p",
        "Slot attention in each iteration: left which slot has most of each patch, then every slot's soft "
        "map at the resolution of the patches, black is 0, with its share of the image. The last "
        "iteration gives the slot masks.",
        " ",
        tag("small", source_of(report, len(_examples(shown)), shown), class_="source"),
    )
    return [how, drawn]


def _gradients(report: Report, shown: SetRecord) -> object:
    drawn = []
    for place in shown.kinds:
        record = report.runs[place]
        if record.gradients is not None:
            source = source_of(report, record.gradients.images, shown, "float32")
            drawn.append(figures.gradient_figure(record.name, record.gradients, source))
    if drawn:
        return [tag("p", figures.GRADIENTS_EXPLAINED), drawn]
    return missing("Left out: --gradient-images is 0, or no image can be read.")
