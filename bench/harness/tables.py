"""Results of runs, as CSV and as Markdown tables: what the benchmarks of training share.

A `Result` is one trained and evaluated run. Scores are fractions in memory and in CSV, percent in tables; a spread is
the standard deviation over seeds with n - 1. Only runs with the same settings are ever averaged.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from safetensors import safe_open

from harness.machine import gpu_name
from spot_fast.config import option_names
from spot_fast.reproduction.results import cell

METRICS = ("mbo_i", "mbo_c", "miou", "fg_ari")
_TITLES = ("mBO_i", "mBO_c", "mIoU", "FG-ARI")
# Columns of a run; what a table must not mix is in `settings`, where it ran in `cpu` to `jobs`.
ABOUT = (
    "bench",
    "date",
    "cpu",
    "cores",
    "threads",
    "accelerator",
    "torch",
    "precision",
    "commit",
    "jobs",
    "options",
    "variant",
    "stage",
    "seed",
    "settings",
    "steps",
    "batch_size",
    "train_images",
    "val_images",
    "train_seconds",
)
# Files of a run folder.
CONFIG, MODEL, STATE, EVALUATION = "config.json", "model.safetensors", "training_state.safetensors", "evaluation.json"
_FIELDS = (*ABOUT, "masks", "orders", "columns", *METRICS)


class BenchError(Exception):
    """A sentence for whoever started the benchmark; exit code 2."""


@dataclass(frozen=True)
class Scores:
    """Fractions by metric, None where there was nothing to count; columns: of block masks, else 0."""

    values: dict[str, float | None]
    columns: int = 0


@dataclass(frozen=True)
class Result:
    """One run: `about` has a text for each of ABOUT; `scores` by (masks, orders averaged; 0 for other than decoder)."""

    about: dict[str, str]
    scores: dict[tuple[str, int], Scores]

    @property
    def seed(self) -> int:
        return int(self.about["seed"])

    @property
    def key(self) -> tuple[str, int, int]:
        """(variant, stage, seed)."""
        return self.about["variant"], int(self.about["stage"]), self.seed

    @property
    def minutes(self) -> float:
        return float(self.about["train_seconds"]) / 60


@dataclass(frozen=True)
class Row:
    """A line of a table: which masks of which runs. baseline: no training in it, so all seeds agree."""

    title: str
    variant: str
    stage: int
    masks: str
    orders: int = 0


# ---- numbers


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1), None for a single value; ValueError without values."""
    if not values:
        raise ValueError("spread needs at least one value")
    return mean(values), stdev(values) if len(values) > 1 else None


def select(results: Iterable[Result], variant: str, stage: int) -> list[Result]:
    """Runs of one variant and stage by seed; BenchError where their settings differ or a seed is there twice."""
    runs = sorted((r for r in results if r.key[:2] == (variant, stage)), key=lambda r: r.seed)
    settings = sorted({r.about["settings"] for r in runs})
    if len(settings) > 1:
        raise BenchError(
            f"{variant}, stage {stage} has runs of different settings ({', '.join(settings)}), which "
            "cannot be averaged: give files of one recipe"
        )
    seeds = [r.seed for r in runs]
    if len(set(seeds)) < len(seeds):
        raise BenchError(f"{variant}, stage {stage} has seed {max(seeds, key=seeds.count)} twice: give each run once")
    return runs


def column(runs: Iterable[Result], row: Row, metric: str) -> list[float | None]:
    """The metric of those runs that have the row's masks."""
    key = (row.masks, row.orders)
    return [r.scores[key].values[metric] for r in runs if key in r.scores]


# ---- tables


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """A Markdown table of mean ± std over seeds, in percent."""
    lines = ["| masks | " + " | ".join(_TITLES) + " |", "|---|" + "---|" * len(METRICS)]
    for row in rows:
        runs = select(results, row.variant, row.stage)
        lines.append(f"| {row.title} | " + " | ".join(cell(column(runs, row, name)) for name in METRICS) + " |")
    return "\n".join(lines)


def training(results: Sequence[Result], groups: Sequence[tuple[str, str, int]]) -> str:
    """A line for each (title, variant, stage): seeds, steps, images, minutes."""
    lines = []
    for title, variant, stage in groups:
        runs = select(results, variant, stage)
        if not runs:
            lines.append(f"- {title}: no finished run")
            continue
        about = runs[0].about
        centre, width = spread([r.minutes for r in runs])
        minutes = f"{centre:.1f}" + (f" ± {width:.1f}" if width is not None else "")
        seeds = ", ".join(str(r.seed) for r in runs)
        lines.append(
            f"- {title}: {about['steps']} steps of {about['batch_size']} in {minutes} minutes, "
            f"seed{'s' * (len(runs) > 1)} {seeds}, scored on {about['val_images']} images"
        )
    return "\n".join(lines)


def machines(results: Sequence[Result]) -> str:
    """Where the runs were trained."""
    found = []
    for r in results:
        a = r.about
        where = f"{a['accelerator']}, host " if a["accelerator"] else ""
        at_once = f", {a['jobs']} runs at once" if a["jobs"] not in ("", "1") else ""
        extra = f", with {a['options']}" if a["options"] else ""
        text = (
            f"{where}{a['cpu']}, {_count(a['cores'], 'core')} ({_count(a['threads'], 'thread')} a run{at_once}), "
            f"torch {a['torch']}, {a['precision']}, {a['date']}{extra}"
        )
        if text not in found:
            found.append(text)
    return "\n".join(f"Measured on {text}." for text in found)


def _count(number: str, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != "1")


# ---- run folders


def read_metadata(file: Path) -> dict[str, str]:
    """Metadata of a safetensors file."""
    with safe_open(file, framework="np") as opened:
        return opened.metadata() or {}


def read_run(folder: Path, about: dict[str, str]) -> Result:
    """The result in a run folder that is trained and evaluated; `about` has what the folder does not say."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (run,) = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["runs"]
    state = read_metadata(folder / STATE)
    settings = {name: value for name, value in config.items() if name not in (*option_names("resumable"), "seed")}
    settings |= {name: state.get(name) for name in ("images", "encoder_sha256")}  # whatever their paths were
    about = about | {
        "threads": state.get("threads", ""),
        "accelerator": gpu_name() if state.get("device") == "cuda" else "",
        "torch": state["torch"],
        "precision": str(config.get("precision", "float32")),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        "steps": state["step"],
        "batch_size": str(config["batch_size"]),
        "train_images": state.get("images", ""),
        "val_images": str(run["images"]),
        "train_seconds": state["seconds"],
    }
    scores = {
        (row["masks"], row["orders"] or 0): Scores({name: row[name] for name in METRICS}, row["columns"] or 0)
        for row in run["rows"]
    }
    return Result(about, scores)


# ---- CSV


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """One line for each kind of masks of each run; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
            writer.writeheader()
            for result in sorted(results, key=lambda r: r.key):
                for (masks, orders), scores in result.scores.items():
                    values = {n: "" if v is None else f"{v:.6f}" for n, v in scores.values.items()}
                    writer.writerow(
                        {
                            **result.about,
                            "masks": masks,
                            "orders": orders or "",
                            "columns": scores.columns or "",
                            **values,
                        }
                    )
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_csv(paths: Iterable[Path]) -> list[Result]:
    """Runs of all files; BenchError names a file that is not one of `write_csv`."""
    results = []
    for path in paths:
        runs: dict[tuple, Result] = {}
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for line in csv.DictReader(file):
                    result = Result({name: line[name] for name in ABOUT}, {})
                    result = runs.setdefault(result.key, result)
                    values = {name: float(line[name]) if line[name] else None for name in METRICS}
                    scores = Scores(values, int(line["columns"] or 0))
                    result.scores[line["masks"], int(line["orders"] or 0)] = scores
        except OSError as error:
            raise BenchError(f"{path} cannot be read ({error.strerror}): give a CSV file of this benchmark") from None
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise BenchError(f"{path} is not a result of this benchmark ({type(error).__name__}: {error})") from None
        results += runs.values()
    if not results:
        raise BenchError("there are no results in the files given")
    return results


def slug(text: str) -> str:
    """A name that is good in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
