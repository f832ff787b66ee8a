"""Scores of finished runs as the paper's tables: Markdown with the paper's figures beside ours, and CSV.

Scores are fractions in evaluations and CSV, percent in tables, where a spread is the standard deviation over seeds with
n - 1, as the paper's.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from spot_fast.evaluation.metrics import METRICS, SPOT_METRICS
from spot_fast.evaluation.protocols import chosen
from spot_fast.evaluation.tables import TITLES
from spot_fast.files import atomic_write
from spot_fast.recipes import DATA_SETS
from spot_fast.reproduction.execution import evaluation
from spot_fast.reproduction.folders import Folders
from spot_fast.reproduction.plan import Plan, PlannedRow
from spot_fast.reproduction.runs import RunSpec
from spot_fast.reproduction.tables import TABLES, Table

_ABOUT = ("steps", "batch_size", "train_images", "minutes", "device", "precision", "torch", "commit", "date", "jobs")
_MASKS = ("table", "row", "masks", "preset", "stage", "seed", "protocol", *METRICS, "columns", "val_images", "run")
FIELDS = (*_MASKS, *_ABOUT, "options")


@dataclass(frozen=True)
class Scored:
    """Masks of a run under one protocol. values: fractions, None where there was nothing to count.

    sizes: mBO_i and number of the instances in each size bin.
    """

    run: RunSpec
    values: dict[str, float | None]
    sizes: list[tuple[float | None, int]]
    columns: int
    images: int


def scored(row: PlannedRow, folders: Folders, protocol: str) -> list[Scored]:
    """The row's masks in each run that is trained and evaluated."""
    found = []
    for run in row.runs:
        here = folders.find(run)
        result = evaluation(here.path, protocol) if here.finished else None
        if result is None:
            continue
        (scores,) = result["runs"]
        tables = {table["protocol"]: table["rows"] for table in scores["tables"]}
        if masks := _masks(tables[protocol], row.row.masks):
            values = {name: masks[name] for name in METRICS}
            sizes = [(size["mbo_i"], size["instances"]) for size in masks["sizes"]]
            found.append(Scored(run, values, sizes, masks["columns"] or 0, scores["images"]))
    return found


def _masks(rows: Sequence[dict], kind: str) -> dict | None:
    """The row of an evaluation that a kind of masks in `tables.Row` means."""
    if kind in ("decoder", "ensemble"):
        of_decoder = sorted((row for row in rows if row["masks"] == "decoder"), key=lambda row: row["orders"])
        return of_decoder[0 if kind == "decoder" else -1]
    if kind == "one block":
        return next((row for row in rows if row["masks"] == "layout" and row["num_masks"] == 1), None)
    if kind == "blocks":
        published = [row for row in rows if row["masks"] == "layout" and row["num_masks"] > 1]
        return next(iter(published), None) or _masks(rows, "best blocks")
    wanted = {"best blocks": "blocks"}.get(kind, kind)
    return next((row for row in rows if row["masks"] == wanted), None)


# ---- Markdown


def markdown(plan: Plan, folders: Folders, protocols: str) -> str:
    """All tables but the figures under each protocol, with what was trained and where below them."""
    names = [each.name for each in chosen(protocols)]
    parts = []
    for name, rows in plan.tables.items():
        if TABLES[name].figure:
            continue
        for protocol in names:
            more = f", protocol {protocol}" if len(names) > 1 else ""
            title = f"## {TABLES[name].title}\n\n{DATA_SETS[plan.preset].title}{more}, percent\n\n"
            parts.append(title + _table(TABLES[name], plan, rows, folders, protocol))
    if machines := _machines(plan, folders):
        parts.append(machines)
    return "\n\n".join(parts)


def paper_data(table: Table, preset: str) -> str | None:
    """The data set whose figures stand beside ours: the preset's where the paper has them."""
    known = list(dict.fromkeys(data for row in table.rows for data in row.paper))
    return preset if preset in known else next(iter(known), None)


def _table(table: Table, plan: Plan, rows: Sequence[PlannedRow], folders: Folders, protocol: str) -> str:
    data = paper_data(table, plan.preset)
    heading = ["", "masks", *(TITLES[name] for name in METRICS)]
    if data:
        where = "paper" if data == plan.preset else f"paper ({DATA_SETS[data].title})"
        first, *others = (TITLES[name] for name in SPOT_METRICS)
        heading += [f"{where}: {first}", *others]
    lines = [[*heading, "seeds"]]
    for row in rows:
        found = scored(row, folders, protocol)
        cells = [row.row.title, _masks_name(row.row.masks, found)]
        cells += [cell([each.values[name] for each in found]) for name in METRICS]
        if data:
            cells += [_paper(text) for text in row.row.paper.get(data, ("",) * len(SPOT_METRICS))]
        lines.append([*cells, _seeds(row, found, folders)])
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    text = "\n".join([head, "|" + "---|" * len(lines[0]), *body])
    return f"{text}\n\n{table.note}" if table.note else text


def _masks_name(masks: str, found: Sequence[Scored]) -> str:
    if masks in ("blocks", "one block"):
        columns = {each.columns for each in found} - {0}
        return (
            f"in {' or '.join(map(str, sorted(columns)))} columns" if masks == "blocks" and columns else "whole image"
        )
    return {"ensemble": "decoder, mean of orders", "decoder": "decoder, order 0"}.get(masks, masks)


def _seeds(row: PlannedRow, found: Sequence[Scored], folders: Folders) -> str:
    return f"{len(found)} of {len(row.runs)}" if len(found) < len(row.runs) else str(len(found))


def cell(values: Sequence[float | None]) -> str:
    """Fractions as percent, mean ± standard deviation; – where one is missing. Without ± where all are the same."""
    if not values or None in values:
        return "–"
    if len(set(values)) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def _paper(text: str) -> str:
    return "–" if text == "-" else text.replace("±", " ± ")


def _machines(plan: Plan, folders: Folders) -> str:
    """Where and how long the runs were trained, a line for each kind of machine."""
    lines: dict[str, list[float]] = {}
    for run in plan.runs:
        about = _about(run, folders)
        if about is None:
            continue
        at_once = f", {about['jobs']} runs at once" if about["jobs"] not in ("", "1") else ""
        text = ", ".join(
            filter(
                None,
                [
                    about["device"] + at_once,
                    f"torch {about['torch']}" if about["torch"] else "",
                    about["precision"],
                    about["date"],
                    f"commit {about['commit']}" if about["commit"] else "",
                ],
            )
        )
        lines.setdefault(text, []).append(float(about["minutes"] or 0))
    return "\n".join(f"- {len(all_)} runs, {sum(all_):.0f} minutes: {text}" for text, all_ in lines.items())


def _about(run: RunSpec, folders: Folders) -> dict[str, str] | None:
    """A finished run's texts of `_ABOUT`; None of another."""
    here = folders.find(run)
    if not here.finished:
        return None
    facts, noted = here.facts, folders.about(run)
    threads = facts.get("threads", "")
    device = noted.get("gpu") or facts.get("device", "") if facts.get("device") == "cuda" else noted.get("cpu") or "CPU"
    return {
        "steps": facts.get("step", ""),
        "batch_size": str(here.config.batch_size),
        "train_images": facts.get("images", ""),
        "minutes": f"{here.seconds / 60:.2f}" if facts else "",
        "device": f"{device} ({threads} thread{'s' * (threads != '1')})" if threads else device,
        "precision": here.config.precision,
        "torch": facts.get("torch", ""),
        **{name: noted.get(name, "") for name in ("commit", "date", "jobs")},
    }


# ---- CSV


def write_csv(path: Path, plan: Plan, folders: Folders, protocols: str) -> None:
    """A line for each row of a table, seed and protocol that is scored."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(_lines(plan, folders, protocols))

    atomic_write(path, write)


def _lines(plan: Plan, folders: Folders, protocols: str) -> Iterator[dict[str, object]]:
    for name, rows in plan.tables.items():
        if TABLES[name].figure:
            continue
        for row in rows:
            for protocol in chosen(protocols):
                for each in scored(row, folders, protocol.name):
                    yield {
                        "table": name,
                        "row": row.row.title,
                        "masks": row.row.masks,
                        "preset": plan.preset,
                        "stage": each.run.config.stage,
                        "seed": each.run.config.seed,
                        "protocol": protocol.name,
                        **{key: "" if value is None else f"{value:.6f}" for key, value in each.values.items()},
                        "columns": each.columns or "",
                        "val_images": each.images,
                        "run": folders.find(each.run).path.name,
                        **_about(each.run, folders),
                        "options": shlex.join(each.run.words),
                    }
