"""mBO_i by instance size as an image (SPOT, Fig. 7). matplotlib is slow to import, so only plots import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spot_fast.errors import UserError, one_line
from spot_fast.evaluation.metrics import SIZE_BINS
from spot_fast.files import atomic_write
from spot_fast.system.optional import required

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class SizeRow:
    """One line of the plot.

    name: notes in brackets at its end are left out. means: mBO_i as a fraction for each of SIZE_BINS, None without an
    instance. deviations: over runs that differ only in their seed. colour: number in the colour cycle.
    """

    name: str
    means: Sequence[float | None]
    deviations: Sequence[float] | None = None
    colour: int = 0
    dashed: bool = False

    @property
    def short_name(self) -> str:
        return self.name.partition(" [")[0]

    @property
    def bins(self) -> list[int]:
        """Indices of the size bins with instances."""
        return [i for i, mean in enumerate(self.means) if mean is not None]


def check_target(path: Path) -> None:
    """UserError where a plot cannot be written to `path`: another ending, or no matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--size-plot {path} does not end in {' or '.join(FORMATS)}: name a file that does")
    required("matplotlib.figure", f"--size-plot {path}", "matplotlib")


def plot_sizes(path: Path, title: str, rows: Sequence[SizeRow], instances: Sequence[int]) -> None:
    """Writes a plot of `rows` atomically; instances: their number in each size bin.

    UserError where it cannot be drawn or written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no state to clean up

        figure = Figure(figsize=(9, 4.8), layout="constrained")
        axes = figure.add_subplot()
        draw_sizes(axes, rows, instances)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
        kind = path.suffix.lower().removeprefix(".")
        atomic_write(path, lambda partial: figure.savefig(partial, format=kind, dpi=120))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--size-plot {path} cannot be drawn ({one_line(error)}): mend matplotlib, or leave the option out"
        ) from error


def draw_sizes(axes: Axes, rows: Sequence[SizeRow], instances: Sequence[int]) -> None:
    """Draws a line for each row over size bins of equal width, labelled with their number of instances."""
    for row in rows:
        heights = [100 * row.means[i] for i in row.bins]
        spreads = [100 * row.deviations[i] for i in row.bins] if row.deviations and any(row.deviations) else None
        axes.errorbar(
            row.bins,
            heights,
            yerr=spreads,
            marker="o",
            capsize=3,
            label=row.short_name,
            color=f"C{row.colour}",
            linestyle="--" if row.dashed else "-",
        )
    labels = [
        f"{100 * low:g}–{100 * high:g} %\nn = {count}"
        for low, high, count in zip(SIZE_BINS, SIZE_BINS[1:], instances, strict=False)
    ]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("size of the instance, percent of the label map")
    axes.set_ylabel("mBO_i, percent")
    axes.set_ylim(bottom=0)
