"""The paper's Figures 3 and 7 of finished runs, each as a PNG and as the CSV of what it shows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import MODEL, load_run
from spot_fast.data import open_set
from spot_fast.evaluation.metrics import SIZE_BINS
from spot_fast.evaluation.size_plot import SizeRow, plot_sizes
from spot_fast.files import atomic_write, write_json
from spot_fast.recipes import DATA_SETS
from spot_fast.report import gradients
from spot_fast.reproduction.folders import Folders
from spot_fast.reproduction.plan import PlannedRow
from spot_fast.reproduction.results import scored
from spot_fast.system.devices import usable_device

_GRADIENTS = "patch_gradients.json"


def draw(
    name: str, title: str, rows: Sequence[PlannedRow], folders: Folders, stem: Path, protocol: str, device: str | None
) -> list[str]:
    """Writes `stem`.png and .csv of figure3 or figure7: the lines of Markdown that show it, [] without a finished run.

    protocol: the first is drawn.
    """
    make: Callable[..., bool] = {"figure3": _gradient_maps, "figure7": _sizes}[name]
    if not make(title, rows, folders, stem, protocol.split(",")[0], device):
        return [f"{title}: no run is finished"]
    return [f"![{title}]({stem.name}.png)"]


# ---- Figure 7


def _sizes(title: str, rows: Sequence[PlannedRow], folders: Folders, stem: Path, protocol: str, _: str | None) -> bool:
    drawn, lines, instances = [], [], None
    for colour, row in enumerate(rows):
        found = scored(row, folders, protocol)
        if not found:
            continue
        instances = [number for _, number in found[0].sizes]
        bins = [[value for value, _ in size] for size in zip(*(each.sizes for each in found), strict=True)]
        means = [None if None in values else mean(values) for values in bins]
        spreads = [stdev(values) if len(values) > 1 and None not in values else 0.0 for values in bins]
        name = f"{row.row.title}, {row.row.masks}"
        drawn.append(SizeRow(name, means, spreads if len(found) > 1 else None, colour))
        edges = zip(SIZE_BINS, SIZE_BINS[1:], means, spreads, instances, strict=False)
        lines += [(name, *(f"{100 * edge:g}" for edge in edge), _cell(m), _cell(s), n) for *edge, m, s, n in edges]
    if not drawn:
        return False
    data = DATA_SETS[rows[0].runs[0].config.preset].title
    plot_sizes(stem.with_suffix(".png"), f"{title}, {data}", drawn, instances)
    _write_csv(stem, ("masks", "above_percent", "to_percent", "mbo_i", "std", "instances"), lines)
    return True


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


# ---- Figure 3


def _gradient_maps(
    title: str, rows: Sequence[PlannedRow], folders: Folders, stem: Path, _: str, device: str | None
) -> bool:
    maps: dict[str, Tensor] = {}  # panel → [h, w]
    for row in rows:
        done = [folders.find(run).path for run in row.runs if folders.find(run).finished]
        if not done:
            continue
        norms = torch.stack([_norms(path, device) for path in done]).mean(0)
        side = round(norms.shape[1] ** 0.5)
        maps[f"{row.row.title},\ndefault order"] = norms[0].view(side, side)
        if len(norms) > 1:
            maps[f"{row.row.title},\nmean of {len(norms)} orders"] = norms.mean(0).view(side, side)
    if not maps:
        return False
    atomic_write(stem.with_suffix(".png"), lambda partial: _panels(title, maps, partial))
    lines = [
        (name.replace("\n", " "), i + 1, j + 1, f"{value:.6g}")
        for name, norms in maps.items()
        for i, line in enumerate(norms.tolist())
        for j, value in enumerate(line)
    ]
    _write_csv(stem, ("decoder", "row", "column", "gradient_norm"), lines)
    return True


def _norms(path: Path, device: str | None) -> Tensor:
    """Gradient norm per patch of each order [P, N], kept beside the run."""
    file, model = path / _GRADIENTS, path / MODEL
    if not file.is_file() or file.stat().st_mtime_ns < model.stat().st_mtime_ns:
        run = load_run(path)
        found = gradients(run, open_set(run.config, "val"), usable_device(device))
        write_json(file, {"images": found.images, "by_order": found.by_order.tolist()})
    return torch.tensor(json.loads(file.read_text(encoding="utf-8"))["by_order"])


def _panels(title: str, maps: dict[str, Tensor], file: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: no window, no state to clean up

    figure = Figure(figsize=(3.2 * len(maps), 3.8), layout="constrained")
    largest = max(norms.max().item() for norms in maps.values())
    for number, (name, norms) in enumerate(maps.items(), start=1):
        axes = figure.add_subplot(1, len(maps), number)
        shown = axes.imshow(norms.numpy(), cmap="inferno", vmin=0, vmax=largest)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    figure.colorbar(shown, ax=figure.axes, shrink=0.8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, format="png", dpi=120)


def _write_csv(stem: Path, heading: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([heading, *lines])

    atomic_write(stem.with_suffix(".csv"), write)
