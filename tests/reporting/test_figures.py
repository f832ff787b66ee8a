"""Charts: points lie where the numbers say, gaps stay gaps, tooltips give values, and the SVG belongs in a page."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from report_runs import log_lines
from spot_fast.evaluation.size_plot import SizeRow
from spot_fast.reporting import figures
from spot_fast.reporting.figures import Line, curves, heat_colours, heat_map, number, sizes_chart, training_curves
from spot_fast.reporting.records import Log


def parsed(svg):
    return ElementTree.fromstring(svg)


def drawn(svg):
    """(tag, points) of every stretch without a gap, of two points or more, outside of <defs>."""
    body = re.sub(r"<defs>.*?</defs>", "", svg, flags=re.S)
    paths = []
    for tag in re.findall(r"<path [^>]*>", body):
        for stretch in tag.split("M ")[1:]:
            points = [tuple(map(float, p)) for p in re.findall(r"(?:^|L )([\d.-]+) ([\d.-]+)", stretch)]
            paths.append((tag, points))
    return [(tag, points) for tag, points in paths if len(points) > 1]


def lines(svg, colour=0):
    """Points of the curves of a colour."""
    return [points for tag, points in drawn(svg) if f"stroke: var(--c{colour})" in tag]


def tooltips(svg):
    return re.findall(r"<g><title>(.*?)</title>", svg)


def chart(line_list, **options):
    return curves("<title>", line_list, "loss", "caption", **options).svg


def log(stage):
    records = log_lines(stage)
    return Log(*([line for line in records if line["kind"] == kind] for kind in ("train", "epoch", "validation")))


def test_points_are_drawn_to_scale():
    (points,) = lines(chart([Line("a", [0, 5, 10], [1.0, 3.0, 2.0])]))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.01) and y1 < y0  # up is larger


def test_a_logarithmic_axis_has_equal_decades_and_no_zero():
    (points,) = lines(chart([Line("a", [0, 1, 2, 3], [0.01, 0.1, 1.0, 0.0])], log=True))
    heights = [y for _, y in points]
    assert len(points) == 3 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.01)


def test_a_missing_value_is_a_gap_and_a_lone_point_a_dot():
    svg = chart([Line("a", range(5), [1, 2, None, float("nan"), 4])])
    (points,) = lines(svg)
    assert len(points) == 2 and len(re.findall(r"<use [^>]*fill: var\(--c0\)", svg)) == 1


def test_a_long_line_is_drawn_as_means():
    count = 10 * figures._MOST_POINTS
    x, y = figures._known(Line("a", range(count), [i % 2 for i in range(count)]), False)
    assert len(x) == figures._MOST_POINTS and set(y) == {0.5} and x[0] == 4.5


@pytest.mark.parametrize("values", [[7.0], [0.3, 0.3]])
@pytest.mark.parametrize("log", [False, True])
def test_little_to_draw_is_no_error(values, log):
    assert "<title>&lt;title&gt;</title>" in chart([Line("a", range(len(values)), values)], log=log)


@pytest.mark.parametrize("nothing", [[], [Line("a", [], [])], [Line("a", [1], [None])]])
def test_no_chart_without_a_value(nothing):
    assert curves("title", nothing, "loss", "caption") is None
    assert curves("title", [Line("a", [1], [-1.0])], "loss", "caption", log=True) is None


def test_markers_have_their_value_as_tooltip():
    svg = chart([Line("a & <b> $c$", [10, 20], [0.25, None], markers=True)])
    assert tooltips(svg) == ["a &amp; &lt;b&gt; $c$, 10: 0.25"]
    parsed(svg)


def test_charts_of_a_page_share_no_id_and_carry_no_style_of_their_own():
    one, other = (chart([Line("a", [0, 1], [0, value])]) for value in (1, 2))
    ids = [re.findall(r'\bid="([^"]*)"', svg) for svg in (one, other)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', one)) <= set(ids[0])
    assert not re.search(r"<style|<metadata|<!--|#0000[cd]", one) and "var(--soft)" in one
    assert one == chart([Line("a", [0, 1], [0, 1])])  # and are the same each time
    parsed(one)


def test_charts_exist_for_values_in_the_log_alone():
    def titles(runs):
        return [chart.title for chart in training_curves(runs)]

    first = ["Reconstruction loss", "Learning rate", "Gradient norm", "Pace", "Validation loss", "Validation mBO_i"]
    assert titles([("a", 1, log(1))]) == first
    assert titles([("a", 1, log(1)), ("b", 2, log(2))]) == [first[0], "Attention loss", *first[1:]]
    no_scores = log(1)
    no_scores.validation.clear()
    assert titles([("a", 1, no_scores)]) == first[:4]


def test_stage_two_shows_its_reconstruction_loss_and_not_the_sum():
    def heights(stage):
        points = lines(training_curves([("a", stage, Log(train=log(stage).train))])[0].svg)[0]
        return {y for _, y in points}

    assert len(heights(2)) == 1  # loss_rec of these lines is constant, loss is not
    assert len(heights(1)) > 1


def test_a_loss_of_the_decoders_own_has_a_chart():
    records = [{**line, "loss_denoise": 0.5} for line in log(1).train]
    assert "Loss: denoise" in [chart.title for chart in training_curves([("a", 1, Log(train=records))])]


def test_a_legend_names_every_line():
    legend = training_curves([("a<b", 1, log(1)), ("c", 1, log(1))])[-1].legend
    names = ["a<b, decoder", "a<b, slots", "c, decoder", "c, slots"]
    assert legend == [(name, i // 2, bool(i % 2)) for i, name in enumerate(names)]


@pytest.mark.parametrize("deviations", [None, [0.01] * 8])
def test_sizes_have_a_point_for_each_bin_with_instances(deviations):
    row = SizeRow("decoder [1]", [None, None, 0.2, 0.3, None, 0.5, 0.6, 0.7], deviations)
    chart = sizes_chart([row], [0, 0, 3, 4, 0, 5, 6, 7])
    more = " ± 1" if deviations else ""
    values = {"1–5": 20, "5–10": 30, "20–50": 50, "50–80": 60, "80–100": 70}
    assert tooltips(chart.svg) == [f"decoder, {name}: {value}{more}" for name, value in values.items()]
    assert ("standard deviation" in chart.caption) == bool(deviations) and chart.legend == [("decoder", 0, False)]


def test_numbers_are_short():
    wanted = {0: "0", 0.0123: "0.0123", 123.4: "123", 1234: "1,234", 2.5e-5: "2.5e-5", 1e7: "1e7", 1.0: "1"}
    assert {value: number(value) for value in wanted} == wanted


def test_heat_is_lighter_the_larger_the_value():
    light = heat_colours(np.linspace(0, 1, 51), 1.0) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    svg = heat_map("map", torch.tensor([[0.0, 0.5], [1.0, 2.0]]), 2.0)
    assert tooltips(svg) == [f"row {i}, column {j}: {v}" for i, j, v in ((1, 1, 0), (1, 2, 0.5), (2, 1, 1), (2, 2, 2))]
    ends = ["#" + bytes(c.tolist()).hex() for c in heat_colours(np.array([0.0, 2.0]), 2.0)]
    fills = re.findall(r"fill: (#[0-9a-f]{6})", svg)
    assert (fills[0], fills[-1]) == tuple(ends) and len(set(fills)) == 4
    parsed(heat_map("nothing", torch.zeros(1, 1), 0.0))
