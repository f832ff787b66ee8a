"""Figures of a report: images that carry their bytes, colours, names of the patch orders, what curves there are."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from report_runs import log_lines
from spot_fast.model.patch_orders import patch_orders
from spot_fast.reporting import figures as figures
from spot_fast.reporting.introspection import Gradients
from spot_fast.reporting.records import Log
from spot_fast.segmentation.overlays import palette

GREY = Image.new("RGB", (32, 32), (128, 128, 128))


def decoded(markup):
    (data,) = re.findall(r'src="data:image/(?:png|webp);base64,([^"]+)"', markup)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def log(stage):
    lines = log_lines(stage)
    return Log(*([line for line in lines if line["kind"] == kind] for kind in ("train", "epoch", "validation")))


def test_every_patch_order_has_the_name_of_its_way():
    grid = 5
    orders = patch_orders(grid)
    assert len(figures.ORDER_NAMES) == len(orders)
    for order, name in zip(orders.tolist()[:-1], figures.ORDER_NAMES, strict=False):
        (row, column), (row2, column2) = divmod(order[0], grid), divmod(order[1], grid)
        arrow = {(0, 1): "→", (0, -1): "←", (1, 0): "↓", (-1, 0): "↑"}[row2 - row, column2 - column]
        across = arrow in "→←"
        corner = ("top" if row == 0 else "bottom") if across else ("left" if column == 0 else "right")
        assert name == f"{'rows' if across else 'columns'} {arrow}, from the {corner}"
    row, column = divmod(orders[-1, 0].item(), grid)
    assert figures.ORDER_NAMES[-1].startswith("spiral") and (row, column) == (2, 2)


def test_truth_is_grey_where_nothing_is_and_black_where_nothing_counts():
    truth = torch.zeros(8, 8, dtype=torch.int64)
    truth[:4, :4], truth[4:, 4:] = 9, -1
    pixels = decoded(figures.truth_image(GREY, truth, "a"))
    quarter = figures.PANEL // 4
    background, thing, ignored = (
        pixels[y, x] for y, x in ((quarter, 3 * quarter), (quarter, quarter), (3 * quarter, 3 * quarter))
    )
    assert np.ptp(background) < 12 and ignored.max() < background.min()
    assert thing.argmax() == palette(1)[0].argmax() and np.ptp(thing) > 40


def test_masks_have_the_colours_of_their_slots():
    masks = torch.zeros(16, 3)
    masks[:8, 2], masks[8:, 0] = 1, 1
    pixels = decoded(figures.mask_image(GREY, masks, [1, 5, 0], "a"))
    top, bottom = pixels[figures.PANEL // 4, 9], pixels[3 * figures.PANEL // 4, 9]
    colours = palette(2)
    assert top.argmax() == colours[0].argmax() and bottom.argmax() == colours[1].argmax()


def test_a_soft_map_is_a_pixel_a_patch_and_as_bright_as_its_values():
    mask = torch.linspace(0, 0.5, 16)
    pixels = decoded(figures.soft_image(mask, 0.5, 0, "a"))
    assert pixels.shape == (4, 4, 3)
    reds = pixels[..., 0].flatten()
    assert (np.diff(reds) > 0).all() and reds[-1] == palette(1)[0][0]


def test_curves_are_those_there_is_something_to_draw_of():
    def titles(runs):
        return [re.search(r"<h3>(.*?)</h3>", part)[1] for part in figures.training_curves(runs)]

    first = ["Reconstruction loss", "Learning rate", "Gradient norm", "Pace", "Validation loss", "Validation mBO_i"]
    assert titles([("a", 1, log(1))]) == first
    assert titles([("a", 1, log(1)), ("b", 2, log(2))]) == [first[0], "Attention loss", *first[1:]]
    no_scores = log(1)
    no_scores.validation.clear()
    assert titles([("a", 1, no_scores)]) == first[:4]


def test_stage_two_shows_its_reconstruction_loss_and_not_the_sum():
    def heights(stage, lines):
        (part, *_) = figures.training_curves([("a", stage, Log(train=lines))])
        return {point.split(",")[1] for point in re.search(r'points="([^"]+)"', part)[1].split()}

    assert len(heights(2, log(2).train)) == 1  # loss_rec is the same all along, loss is not
    assert len(heights(1, log(1).train)) > 1


def test_a_loss_of_the_decoders_own_has_a_chart():
    records = [{**line, "loss_denoise": 0.5} for line in log(1).train]
    charts = figures.training_curves([("a", 1, Log(train=records))])
    assert any("Loss: denoise" in chart for chart in charts)


def test_gradient_maps_share_one_scale_and_say_how_even_they_are():
    by_order = torch.ones(9, 16)
    by_order[0, 0] = 4
    markup = figures.gradient_figure("run", Gradients(by_order, 5), "source")
    assert "the strongest patch has 4.0 times" in markup and "the strongest patch has 1.3 times" in markup
    assert markup.count("<svg") == 2 and markup.count("<img") == 1 + 9 and "> 4<" in markup
    alone = figures.gradient_figure("run", Gradients(by_order[:1], 5), "source")
    assert alone.count("<svg") == 1 and alone.count("<img") == 1 and "standard order only" in alone


@pytest.mark.parametrize("deviations", [None, [0.01] * 8])
def test_sizes_have_a_point_where_there_are_instances(deviations):
    row = figures.SizeRow("decoder [1]", [None, None, 0.2, 0.3, None, 0.5, 0.6, 0.7], deviations)
    markup = figures.sizes_chart([row], [0, 0, 3, 4, 0, 5, 6, 7], "source")
    said = re.findall(r"<title>decoder, ([^<]*)</title>", markup)
    more = " ± 1" if deviations else ""
    assert said == [f"1–5: 20{more}", f"5–10: 30{more}", f"20–50: 50{more}", f"50–80: 60{more}", f"80–100: 70{more}"]
    assert ("standard deviation" in markup) == bool(deviations)
