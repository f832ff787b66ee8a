"""Charts of a report as inline SVG, drawn by matplotlib.

The page has light and dark colours: charts are drawn with stand-ins that become the CSS variables of report.css. The
`gid` of an artist becomes its tooltip.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape
from torch import Tensor

from spot_fast.evaluation.size_plot import SizeRow, draw_sizes
from spot_fast.evaluation.tables import BINS
from spot_fast.reporting.records import Log, values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 8  # --c0 … --c7 of report.css
_STAND_INS = {f"#0000c{i}": f"var(--c{i})" for i in range(COLOURS)}
_SOFT, _LINE = "#0000d0", "#0000d1"
_STAND_INS |= {_SOFT: "var(--soft)", _LINE: "var(--line)"}
_MOST_POINTS = 300
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "spot_fast",  # the same ids each time
    "figure.figsize": (4.6, 2.75),
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": _SOFT,
    "axes.facecolor": "none",
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart; y is None where there is no value."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its caption; legend: (name, colour, dashed) of each line."""

    title: str
    svg: Markup
    caption: str
    legend: list[tuple[str, int, bool]]


def training_curves(runs: Sequence[tuple[str, int, Log]]) -> list[Chart]:
    """Losses, learning rate, gradient norm, pace and validation scores of (name, stage, log) of each run.

    Charts without a single value are left out.
    """

    def lines(kind: str, key: str, scale: float = 1.0, suffix: str = "", dashed: bool = False) -> list[Line]:
        curves = []
        for colour, (name, _, log) in enumerate(runs):
            records = getattr(log, kind)
            y = [None if v is None else scale * v for v in values_of(records, key)]
            curves.append(Line(name + suffix, [r["step"] for r in records], y, colour, dashed, kind == "validation"))
        return curves

    # Where `loss` is a sum of several terms, its part L_REC compares with other runs.
    reconstruction = [
        part if any(y is not None for y in part.y) else total
        for part, total in zip(lines("train", "loss_rec"), lines("train", "loss"), strict=True)
    ]
    losses = {name for _, _, log in runs for record in log.train for name in record if name.startswith("loss_")}
    decoder = lines("validation", "mbo_i_decoder", 100, ", decoder")
    slots = lines("validation", "mbo_i_slots", 100, ", slots", dashed=True)
    scores = [line for pair in zip(decoder, slots, strict=True) for line in pair]
    charts = [
        curves(
            "Reconstruction loss",
            reconstruction,
            "L_REC",
            "Mean squared error of the predicted features in training, the mean between two lines of the log. Lower "
            "is better.",
        ),
        curves(
            "Attention loss",
            lines("train", "loss_att"),
            "L_ATT",
            "Stage 2 only: cross-entropy of the student's slot attention against the teacher's masks, before it is "
            "weighted by λ.",
        ),
        *(
            curves(f"Loss: {name.removeprefix('loss_')}", lines("train", name), name, "A loss of the decoder's own.")
            for name in sorted(losses - {"loss_rec", "loss_att"})
        ),
        curves("Learning rate", lines("train", "lr"), "rate", "Warm-up, then a cosine."),
        curves(
            "Gradient norm",
            lines("train", "grad_norm"),
            "largest |g|",
            "Infinity norm of the gradient before clipping, on a logarithmic axis.",
            log=True,
        ),
        curves(
            "Pace",
            lines("train", "images_per_s"),
            "images/s",
            "Training images a second. Dips are validations and saved states, or other work on the machine.",
        ),
        curves(
            "Validation loss",
            lines("validation", "val_loss"),
            "L_REC",
            "Reconstruction loss in patch order 0 on the images of the quick validations in training.",
        ),
        curves(
            "Validation mBO_i",
            scores,
            "mBO_i, percent",
            "The quick validations in training: patch order 0, fewer images than the table of scores has.",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def curves(title: str, lines: Sequence[Line], y_label: str, caption: str, *, log: bool = False) -> Chart | None:
    """A chart over training steps; None without a value to draw. log: logarithmic y axis, of values above 0."""
    known = [(line, *_known(line, log)) for line in lines]
    known = [(line, x, y) for line, x, y in known if np.isfinite(y).any()]
    if not known:
        return None
    with _style():
        figure = _figure()
        axes = figure.add_subplot()
        for line, x, y in known:
            dashes = "--" if line.dashed else "-"
            axes.plot(x, y, dashes, color=f"C{line.colour % COLOURS}", marker="o" if line.markers else None)
            # matplotlib draws no line to a point between gaps, so it becomes a dot.
            gaps = np.pad(~np.isfinite(y), 1, constant_values=True)
            alone = gaps[:-2] & gaps[2:]
            axes.plot(x[alone], y[alone], "o", color=f"C{line.colour % COLOURS}", markersize=3)
            if line.markers:
                for step, value in zip(x, y, strict=True):
                    tip = f"{line.name}, {number(step)}: {number(value)}" if math.isfinite(value) else None
                    axes.plot([step], [value], "o", color=f"C{line.colour % COLOURS}", gid=_tooltip(tip))
        axes.locator_params(nbins=6)
        if log:
            _logarithmic(axes, np.concatenate([y for _, _, y in known]))
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: number(value))
        svg = _svg(figure, title)
    return Chart(title, svg, caption, [(line.name, line.colour % COLOURS, line.dashed) for line, _, _ in known])


def _known(line: Line, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y, NaN where there is no value to draw; of a long line means of equally many neighbours."""
    x = np.array(line.x, float)
    y = np.array([math.nan if v is None else v for v in line.y], float)
    y[~np.isfinite(y)] = math.nan
    size = -(-len(x) // _MOST_POINTS)
    if size > 1 and not line.markers:
        starts = np.arange(0, len(x), size)
        count = np.diff([*starts, len(x)])
        known = np.add.reduceat(np.isfinite(y).astype(int), starts)
        x = np.add.reduceat(x, starts) / count
        y = np.where(known > 0, np.add.reduceat(np.nan_to_num(y), starts) / np.maximum(known, 1), math.nan)
    if log:
        y = np.where(y > 0, y, math.nan)
    return x, y


def _logarithmic(axes, values: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    decades = math.log10(np.nanmax(values) / np.nanmin(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades <= 2 else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def sizes_chart(rows: Sequence[SizeRow], instances: Sequence[int]) -> Chart:
    """mBO_i by instance size, a line of points for each of `rows`, with the number of instances of each size."""
    with _style({"figure.figsize": (6.2, 3.4), "font.size": 8}):
        figure = _figure()
        axes = figure.add_subplot()
        draw_sizes(
            axes, [SizeRow(r.name, r.means, r.deviations, r.colour % COLOURS, r.dashed) for r in rows], instances
        )
        for row in rows:
            for i in row.bins:
                tip = f"{row.short_name}, {BINS[i]}: {number(100 * row.means[i])}"
                tip += f" ± {number(100 * row.deviations[i])}" if row.deviations else ""
                axes.plot([i], [100 * row.means[i]], "o", color=f"C{row.colour % COLOURS}", gid=_tooltip(tip))
        axes.set_xlim(-0.4, len(BINS) - 0.6)  # bins without instances as well
        svg = _svg(figure, "mBO_i by size of the instance")
    bars = " Bars are ± one standard deviation over the seeds." if any(row.deviations for row in rows) else ""
    caption = (
        "How well instances are segmented by their size (the paper's Fig. 7); n is their number, and sizes without "
        f"instances have no point. Few instances make a noisy point.{bars}"
    )
    legend = [(row.short_name, row.colour % COLOURS, row.dashed) for row in rows]
    return Chart("", svg, caption, legend)


def heat_map(title: str, values: Tensor, largest: float) -> Markup:
    """An <svg> with a square for each of `values` [h, w], dark at 0 and bright at `largest`, and values as tooltips."""
    from matplotlib.patches import Rectangle

    rows, columns = values.shape
    colours = heat_colours(values.numpy(), largest)
    with _style({"figure.figsize": (3, 3 * rows / columns), "figure.constrained_layout.use": False}):
        figure = _figure()
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0))
        axes.set_axis_off()
        for i in range(rows):
            for j in range(columns):
                tip = _tooltip(f"row {i + 1}, column {j + 1}: {number(values[i, j].item())}")
                axes.add_patch(Rectangle((j, i), 1, 1, color=colours[i, j] / 255, linewidth=0, gid=tip))
        return _svg(figure, title, "heat")


def heat_colours(values: np.ndarray, largest: float) -> np.ndarray:
    """uint8 [..., 3] of values from 0 to `largest`, each lighter than the smaller ones: it reads in grey as well."""
    from matplotlib import colormaps

    return colormaps["inferno"](values / largest if largest > 0 else np.zeros_like(values), bytes=True)[..., :3]


def number(value: float) -> str:
    """A few digits: 0.0123, 12.3, 1,234, 2.5e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


# ---- matplotlib and SVG


def _style(more: dict | None = None):
    from matplotlib import cycler, rc_context

    colours = cycler(color=[f"#0000c{i}" for i in range(COLOURS)])
    return rc_context(_STYLE | {"axes.prop_cycle": colours} | (more or {}))


def _figure() -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no window, no state to clean up

    return Figure()


_TOOLTIP = "tip:"


def _tooltip(text: str | None) -> str | None:
    return text and _TOOLTIP + text


def _svg(figure: Figure, title: str, class_: str = "chart") -> Markup:
    """The figure as an inline <svg>; `title` is for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    key = hashlib.sha256(f"{title}{text}".encode(errors="replace")).hexdigest()[:8]
    (box,) = re.findall(r'<svg [^>]*?viewBox="([^"]*)"', text)
    body = text[text.index(">", text.index("<svg ")) + 1 :]
    # Styles would apply to the whole page; metadata names a version of matplotlib.
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(rf'<g id="{_TOOLTIP}([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'<g id="[^"]*"/>', "", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    # Other charts of the page have shapes of the same name.
    body = re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', rf"\g<1>{key}\2", body).replace("xlink:href", "href")
    body = re.sub("|".join(_STAND_INS), lambda match: _STAND_INS[match[0]], body)
    return Markup(f'<svg class="{class_}" role="img" viewBox="{box}"><title>{escape(title)}</title>{body}')
