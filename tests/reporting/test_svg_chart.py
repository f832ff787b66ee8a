"""Charts as SVG: points where the numbers say, gaps, ticks, and nothing that is not well-formed."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from spot_fast.reporting import svg_chart
from spot_fast.reporting.svg_chart import Line, heat_colour, heat_map, legend, line_chart, number

SVG = "{http://www.w3.org/2000/svg}"


def chart(lines, **options):
    return ElementTree.fromstring(line_chart("<title>", lines, x_label="step", y_label="loss", **options))


def polylines(root):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in root.iter(f"{SVG}polyline")
    ]


def grid(root):
    """Value of each tick of the y axis → its height."""
    texts = {float(t.get("y")) - 4: t.text for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"}
    return {
        float(texts[float(line.get("y1"))].replace(",", "")): float(line.get("y1"))
        for line in root.iter(f"{SVG}line")
        if line.get("class") == "grid"
    }


def test_points_lie_between_the_ticks_where_their_values_do():
    root = chart([Line("a", [0, 5, 10], [1.0, 3.0, 2.0])])
    (points,) = polylines(root)
    heights = grid(root)
    assert points[0][1] == heights[1] and points[1][1] == heights[3] and points[2][1] == heights[2]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)


def test_logarithmic_axis():
    root = chart([Line("a", [0, 1, 2, 3], [0.01, 0.1, 0.0, 1.0])], log=True)
    heights = grid(root)
    (points,) = polylines(root)
    assert points[0][1] == heights[0.01] and points[1][1] == heights[0.1]
    assert heights[0.01] - heights[0.1] == pytest.approx(heights[0.1] - heights[1.0], abs=0.2)
    assert len(points) == 2  # 0 has no place on it: the line has a gap there


def test_a_missing_value_is_a_gap():
    root = chart([Line("a", range(5), [1, 2, None, float("nan"), 4])])
    assert [len(line) for line in polylines(root)] == [2]
    assert len(list(root.iter(f"{SVG}circle"))) == 1  # a point alone is a dot


def test_markers_say_their_value_and_bars_their_deviation():
    root = chart([Line("a & b", [0, 1], [10, None], markers=True, spread=[2, 0])], names=["x\nn=1", "y\nn=0"])
    (marker,) = [c for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert marker.find(f"{SVG}title").text == "a & b, x: 10 ± 2"
    (bar,) = [line for line in root.iter(f"{SVG}line") if line.get("class") == "bar"]
    assert float(bar.get("y1")) > float(marker.get("cy")) > float(bar.get("y2"))
    assert {"x", "n=1", "y", "n=0"} <= {t.text for t in root.iter(f"{SVG}text")}


def test_a_long_line_is_drawn_as_means():
    count = 10 * svg_chart._MOST_POINTS
    (points,) = polylines(chart([Line("a", range(count), [i % 2 for i in range(count)])]))
    assert len(points) == svg_chart._MOST_POINTS and len({y for _, y in points}) == 1


@pytest.mark.parametrize("lines", [[], [Line("a", [], [])], [Line("a", [3], [7.0])], [Line("a", [1, 2], [0.3, 0.3])]])
@pytest.mark.parametrize("log", [False, True])
def test_little_to_draw_is_no_error(lines, log):
    root = chart(lines, log=log)
    assert root.find(f"{SVG}title").text == "<title>"


@pytest.mark.parametrize("values", [[0.41, 1.02], [0, 1e-3], [-3, 250], [99.7, 99.8], [1e6, 3e6]])
def test_ticks_are_round_and_enclose(values):
    ticks = svg_chart._ticks(values, False)
    assert ticks[0] <= min(values) and ticks[-1] >= max(values) and 3 <= len(ticks) <= 7
    assert svg_chart._ticks(values, True)[0] <= 0


def test_numbers_are_short():
    wanted = {0: "0", 0.0123: "0.0123", 123.4: "123", 1234: "1,234", 2.5e-5: "2.5e-5", 1e7: "1e7", 1.0: "1"}
    assert {value: number(value) for value in wanted} == wanted


def test_heat_is_lighter_the_larger_the_value():
    def light(colour):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lights = [light(heat_colour(i / 50)) for i in range(51)]
    assert lights == sorted(lights) and heat_colour(-1) == heat_colour(0) and heat_colour(7) == heat_colour(1)
    root = ElementTree.fromstring(heat_map("map", [[0.0, 0.5], [1.0, 2.0]], 2.0))
    squares = [(r.get("x"), r.get("y"), r.get("fill")) for r in root.iter(f"{SVG}rect")]
    assert squares[0] == ("0", "0", heat_colour(0)) and squares[3] == ("1", "1", heat_colour(1)) and len(squares) == 4
    ElementTree.fromstring(heat_map("nothing", [[0.0]], 0.0))


def test_a_legend_names_every_line():
    names = re.findall(r"</svg> ([^<]*)</li>", legend([Line("a<b", [], []), Line("c", [], [], 1, True)]))
    assert names == ["a&lt;b", "c"]
