"""Runs and measurements of a report in words."""

from __future__ import annotations

import shlex
from datetime import datetime

from spot_fast.checkpoints.runs import MODEL
from spot_fast.evaluation.tables import percent
from spot_fast.reporting.figures import number
from spot_fast.reporting.records import Report, RunRecord, SetRecord
from spot_fast.training.console import duration


def orders_words(orders: int | None) -> str:
    return "patch order 0" if orders == 1 else f"all {orders} patch orders"


def images_words(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def run_sentence(record: RunRecord) -> str:
    """What was trained, its scores, and the baselines to beat."""
    config, log = record.run.config, record.log
    steps = record.run.metadata.get("step")
    text = f"stage {config.stage} on {config.recipe}, seed {config.seed}"
    text += f", {config.epochs} epochs" + (f", {int(steps):,} steps of {config.batch_size}" if steps else "")
    if record.seconds:
        text += f" in {duration(record.seconds)}"
    if record.pace:
        text += f" ({number(record.pace)} images/s)"
    text += "."
    if record.evaluation is not None:
        rows = record.evaluation.table("spot").rows
        decoder = [row for row in rows if row.masks == "decoder"][-1]
        others = {kind: next(row for row in rows if row.masks == kind) for kind in ("slots", "blocks", "kmeans")}
        text += (
            f" mBO_i on {images_words(record.evaluation.images)}: decoder masks {percent(decoder.scores['mbo_i'])} "
            f"({orders_words(decoder.orders)}), slot masks {percent(others['slots'].scores['mbo_i'])}; to be beaten: "
            f"block masks {percent(others['blocks'].scores['mbo_i'])}, k-means on the same features "
            f"{percent(others['kmeans'].scores['mbo_i'])}."
        )
    if log.skipped:
        steps = "1 step was" if len(log.skipped) == 1 else f"{len(log.skipped)} steps were"
        text += f" {steps} left out because loss or gradient was not finite."
    return text


def run_facts(record: RunRecord) -> dict[str, str | None]:
    """Settings and speed of a run; None where unknown or meaningless."""
    config, state, metadata = record.run.config, record.state, record.run.metadata
    model = record.run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(
        p.numel() for p in model.encoder.parameters() if p.requires_grad
    )
    decoder = {
        "transformer": f"transformer, {config.dec_blocks} blocks of {config.dec_heads} heads, "
        f"{orders_words(model.num_orders)}",
        "masked": f"masked transformer, {config.dec_blocks} blocks of {config.dec_heads} heads",
        "mlp": f"MLP, hidden width {config.dec_mlp_hidden}"
        + f", top {config.mlp_top_k} slots of each token" * (config.mlp_top_k > 0),
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
        "time": duration(record.seconds) if record.seconds else None,
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


def loss_words(record: RunRecord) -> str:
    """The run's reconstruction losses."""
    losses = record.evaluation.reconstruction.items()
    return f"{record.name} " + ", ".join(f"{loss:.4f} ({orders_words(orders)})" for orders, loss in losses)


def skipped_words(record: RunRecord, most: int = 10) -> str:
    """The first images that could not be scored, with the reasons."""
    skipped = list(record.evaluation.skipped.items())
    return f"skipped {len(skipped)} that cannot be read: " + "; ".join(f"{k}: {reason}" for k, reason in skipped[:most])


def set_words(report: Report, shown: SetRecord) -> str:
    """How many images of which set were scored."""
    evaluation = report.runs[shown.run_indices[0]].evaluation
    if evaluation is None:
        return f"{shown.image_set.name}, without masks"
    count = len(shown.image_set)
    if evaluation.images == count:
        return f"{images_words(count)} of {shown.image_set.name}"
    first = f"the first {min(report.limit, count):,} of " if report.limit else ""
    readable = f", {evaluation.images:,} of them readable" if evaluation.skipped else ""
    return f"{first}{count:,} images of {shown.image_set.name}{readable}"


def source_words(report: Report, images: int, shown: SetRecord, precision: str | None = None) -> str:
    """The small print of a figure: the number of images, and everything that its numbers depend on."""
    return (
        f"{images_words(images)} of {shown.image_set.name} · seed {report.settings['seed']} · "
        f"{precision or report.settings['precision']} · {report.about['versions']} · {report.about['date']}"
    )


def evaluate_command(report: Report, shown: SetRecord) -> str:
    """The command line that prints the same tables on a terminal."""
    runs = [report.runs[index] for index in shown.run_indices]
    words = ["python", "-m", "spot_fast.evaluate", *(str(record.run.path) for record in runs)]
    words += ["--protocol", ",".join(table.protocol for table in runs[0].evaluation.tables), "--sizes"]
    words += ["--seed", report.settings["seed"], "--precision", report.settings["precision"]]
    if report.data:
        words += ["--data", report.data]
    if report.limit:
        words += ["--limit", str(report.limit)]
    return shlex.join(words)
