"""Line charts and heat maps as inline SVG. Lines have classes of the page (report.css), which has colours for light and
dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spot_fast.reporting.markup import Markup, tag

COLOURS = 8  # classes c0…c7 of the style sheet
_WIDTH, _HEIGHT = 440, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 42
_NAMES = 16  # more room below, for names of two lines
_MOST_POINTS = 300
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart: y is None where there is nothing; spread is half the height of an error bar."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    markers: bool = False
    spread: Sequence[float] | None = None

    def points(self) -> list[tuple[float, float]]:
        """Where there is something."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None and math.isfinite(y)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    names: Sequence[str] = (),
) -> Markup:
    """An <svg> of `lines`; without a title of its own to be seen, `title` is for screen readers.

    log: logarithmic y, for values above 0. zero: y begins at 0. names: of the places 0, 1, … on the x axis, each in
    lines parted by a newline. Lines of many points are drawn as means over equally many neighbours.
    """
    lines = [_thinned(line) for line in lines]
    points = [p for line in lines for p in line.points() if not log or p[1] > 0]
    x_low, x_high = (-0.4, len(names) - 0.6) if names else _range([x for x, _ in points])
    ends = [
        y + sign * s
        for line in lines
        if line.spread
        for y, s in zip(line.y, line.spread, strict=True)
        if y is not None
        for sign in (1, -1)
    ]
    y_ticks = (_log_ticks if log else _ticks)([y for _, y in points] + ends, zero)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    measure = math.log10 if log else float
    bottom = _HEIGHT - _BOTTOM - (_NAMES if names else 0)

    def px(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        part = (measure(y) - measure(y_low)) / (measure(y_high) - measure(y_low))
        return round(bottom - part * (bottom - _TOP), 1)

    drawn = []
    for tick in y_ticks:
        drawn += [
            tag("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=py(tick), y2=py(tick)),
            tag("text", number(tick), x=_LEFT - 6, y=py(tick) + 4, text_anchor="end"),
        ]
    if names:
        marks = [(i, name) for i, name in enumerate(names)]
    else:
        marks = [(tick, number(tick)) for tick in _ticks([x_low, x_high], False) if x_low <= tick <= x_high]
    for x, name in marks:
        drawn.append(tag("line", class_="axis", x1=px(x), x2=px(x), y1=bottom, y2=bottom + 4))
        for place, part in enumerate(name.split("\n")):
            drawn.append(
                tag(
                    "text",
                    part,
                    x=px(x),
                    y=bottom + 16 + 12 * place,
                    text_anchor="middle",
                    class_="small" if names else None,
                )
            )
    middle = (_TOP + bottom) / 2
    drawn += [
        tag("line", class_="axis", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom),
        tag("text", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 3, text_anchor="middle"),
        tag("text", y_label, x=0, y=0, text_anchor="middle", transform=f"translate(11 {middle}) rotate(-90)"),
    ]
    drawn += [_drawn(line, px, py, log, names) for line in lines]
    return tag(
        "svg",
        tag("title", title),
        drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        class_="chart",
        xmlns="http://www.w3.org/2000/svg",
    )


def _drawn(line: Line, px, py, log: bool, names: Sequence[str]) -> Markup:
    """The stretches of a line that have no gap, its error bars and its markers with what they say when pointed at."""
    stretches: list[list[str]] = [[]]
    marks = []
    spreads = line.spread or [0.0] * len(line.x)
    for x, y, spread in zip(line.x, line.y, spreads, strict=True):
        if y is None or not math.isfinite(y) or (log and y <= 0):
            stretches.append([])
            continue
        stretches[-1].append(f"{px(x)},{py(y)}")
        if spread:
            marks.append(tag("line", class_="bar", x1=px(x), x2=px(x), y1=py(y - spread), y2=py(y + spread)))
        if line.markers:
            where = names[int(x)].split("\n")[0] if names else number(x)
            value = number(y) + (f" ± {number(spread)}" if spread else "")
            marks.append(tag("circle", tag("title", f"{line.name}, {where}: {value}"), cx=px(x), cy=py(y), r=3.2))
    paths = [
        tag("polyline", points=" ".join(s))
        if len(s) > 1
        else tag("circle", cx=s[0].split(",")[0], cy=s[0].split(",")[1], r=2)
        for s in stretches
        if s
    ]
    classes = f"line c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    return tag("g", paths, marks, class_=classes)


def _thinned(line: Line) -> Line:
    """At most `_MOST_POINTS` points, each the mean of as many neighbours; a marker or an error bar is never merged."""
    size = -(-len(line.x) // _MOST_POINTS)
    if size <= 1 or line.markers or line.spread:
        return line
    x, y = [], []
    for start in range(0, len(line.x), size):
        part = line.y[start : start + size]
        known = [v for v in part if v is not None and math.isfinite(v)]
        x.append(sum(line.x[start : start + size]) / len(part))
        y.append(sum(known) / len(known) if known else None)
    return Line(line.name, x, y, line.colour, line.dashed)


def legend(lines: Sequence[Line]) -> Markup:
    """What the lines are, as a list of its own: it may be longer than a chart is wide."""
    keys = [
        tag(
            "li",
            tag(
                "svg",
                tag(
                    "g",
                    tag("line", x1=0, x2=26, y1=5, y2=5),
                    line.markers and tag("circle", cx=13, cy=5, r=3.2),
                    class_=f"line c{line.colour % COLOURS}" + (" dashed" if line.dashed else ""),
                ),
                viewBox="0 0 26 10",
                aria_hidden="true",
            ),
            " ",
            line.name,
        )
        for line in lines
    ]
    return tag("ul", keys, class_="legend")


def heat_map(title: str, values: Sequence[Sequence[float]], most: float) -> Markup:
    """An <svg> of a square per value; 0 is dark and `most` bright. Each square says its value when pointed at."""
    rows, columns = len(values), len(values[0])
    squares = [
        tag(
            "rect",
            tag("title", f"row {i + 1}, column {j + 1}: {number(value)}"),
            x=j,
            y=i,
            width=1,
            height=1,
            fill=heat_colour(value / most if most > 0 else 0.0),
        )
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    ]
    return tag(
        "svg",
        tag("title", title),
        squares,
        viewBox=f"0 0 {columns} {rows}",
        role="img",
        class_="heat",
        shape_rendering="crispEdges",
        xmlns="http://www.w3.org/2000/svg",
    )


# Dark violet over red to pale yellow, each step lighter than the one before: reads in grey as well.
_HEAT = ((20, 14, 54), (87, 21, 108), (158, 42, 99), (217, 73, 63), (247, 130, 18), (246, 190, 60), (252, 250, 180))


def heat_colour(value: float) -> str:
    """#rrggbb of a value from 0 to 1; what lies beyond has the colour of the end."""
    place = min(max(value, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(place), len(_HEAT) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def number(value: float) -> str:
    """A few digits: 0.0123, 12.3, 1,234, 2.5e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(values: Sequence[float], zero: bool) -> list[float]:
    """Round numbers around `values`, the first at or below the least, the last at or above the largest."""
    low, high = _range([0.0, *values] if zero else values)
    rough = (high - low) / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(values: Sequence[float], zero: bool) -> list[float]:
    """Powers of ten around `values`; where they are few, with 2 and 5 times each."""
    above_zero = [v for v in values if v > 0] or [1.0]
    low, high = min(above_zero), max(above_zero)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        return [10.0**i for i in range(first, max(last, first + 1) + 1)]
    fine = [m * 10.0**i for i in range(first, last + 1) for m in (1, 2, 5)]
    below = max((i for i, t in enumerate(fine) if t <= low), default=0)
    above = min((i for i, t in enumerate(fine) if t >= high), default=len(fine) - 1)
    return fine[below : max(above, below + 1) + 1]
