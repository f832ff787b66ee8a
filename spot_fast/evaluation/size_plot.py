"""mBO_i by the size of instances as an image (SPOT, Fig. 7). matplotlib is imported when a plot is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spot_fast.checkpoints.runs import atomic_write
from spot_fast.errors import UserError, one_line
from spot_fast.evaluation.metrics import SIZE_BINS
from spot_fast.system.optional import required

FORMATS = (".png", ".svg")


def check_target(path: Path) -> None:
    """UserError where a plot cannot be written to `path`: another ending, or no matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--size-plot {path} does not end in {' or '.join(FORMATS)}: name a file that does")
    required("matplotlib.figure", f"--size-plot {path}", "matplotlib")  # slow to import, and only plots need it


def plot_sizes(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, Sequence[float | None], Sequence[float]]],
    instances: Sequence[int],
) -> None:
    """Writes a line for each of `rows`: name, mBO_i of each of SIZE_BINS (fraction; None: no instance), deviation.

    Bins are equally wide; below each stands how many instances are in it. Notes in brackets are left out of the names.
    The file appears whole or not at all. UserError where it cannot be drawn or written.
    """
    try:
        _plot(path, title, rows, instances)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--size-plot {path} cannot be drawn ({one_line(error)}): mend matplotlib, or leave the option out"
        ) from error


def _plot(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, Sequence[float | None], Sequence[float]]],
    instances: Sequence[int],
) -> None:
    from matplotlib.figure import Figure  # not pyplot: no window, no state to clean up

    names = [
        f"{100 * low:g}–{100 * high:g} %\nn = {number}"
        for low, high, number in zip(SIZE_BINS, SIZE_BINS[1:], instances, strict=False)
    ]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, means, deviations in rows:
        places = [i for i, mean in enumerate(means) if mean is not None]
        heights = [100 * means[i] for i in places]
        spreads = [100 * deviations[i] for i in places] if any(deviations) else None
        axes.errorbar(places, heights, yerr=spreads, marker="o", capsize=3, label=name.partition(" [")[0])
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("size of the instance, percent of the label map")
    axes.set_ylabel("mBO_i, percent")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    kind = path.suffix.lower().removeprefix(".")
    atomic_write(path, lambda partial: figure.savefig(partial, format=kind, dpi=120))
