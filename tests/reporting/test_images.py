"""Images of a report: they carry their bytes, with the colours of labels and slots; names of the patch orders."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from spot_fast.model.patch_orders import patch_orders
from spot_fast.reporting import images
from spot_fast.reporting.introspection import PatchGradients
from spot_fast.segmentation.overlays import palette

GREY = Image.new("RGB", (32, 32), (128, 128, 128))


def decoded(image):
    data = base64.b64decode(image.src.partition(";base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_the_names_of_patch_orders_describe_their_paths():
    grid = 5
    orders = patch_orders(grid)
    assert len(images.ORDER_NAMES) == len(orders)
    for order, name in zip(orders.tolist()[:-1], images.ORDER_NAMES, strict=False):
        (row, column), (row2, column2) = divmod(order[0], grid), divmod(order[1], grid)
        arrow = {(0, 1): "→", (0, -1): "←", (1, 0): "↓", (-1, 0): "↑"}[row2 - row, column2 - column]
        across = arrow in "→←"
        corner = ("top" if row == 0 else "bottom") if across else ("left" if column == 0 else "right")
        assert name == f"{'rows' if across else 'columns'} {arrow}, from the {corner}"
    row, column = divmod(orders[-1, 0].item(), grid)
    assert images.ORDER_NAMES[-1].startswith("spiral") and (row, column) == (2, 2)


def test_truth_is_grey_in_the_background_and_black_where_void():
    truth = torch.zeros(8, 8, dtype=torch.int64)
    truth[:4, :4], truth[4:, 4:] = 9, -1
    pixels = decoded(images.truth_image(GREY, truth, "a"))
    quarter = images.PANEL // 4
    background, thing, void = (
        pixels[y, x] for y, x in ((quarter, 3 * quarter), (quarter, quarter), (3 * quarter, 3 * quarter))
    )
    assert np.ptp(background) < 12 and void.max() < background.min()
    assert thing.argmax() == palette(1)[0].argmax() and np.ptp(thing) > 40


def test_masks_have_the_colours_of_their_slots():
    masks = torch.zeros(16, 3)
    masks[:8, 2], masks[8:, 0] = 1, 1
    pixels = decoded(images.mask_image(GREY, masks, [1, 5, 0], "a"))
    top, bottom = pixels[images.PANEL // 4, 9], pixels[3 * images.PANEL // 4, 9]
    colours = palette(2)
    assert top.argmax() == colours[0].argmax() and bottom.argmax() == colours[1].argmax()


def test_a_soft_map_is_a_pixel_a_patch_and_as_bright_as_its_values():
    mask = torch.linspace(0, 0.5, 16)
    pixels = decoded(images.soft_image(mask, 0.5, 0, "a"))
    assert pixels.shape == (4, 4, 3)
    reds = pixels[..., 0].flatten()
    assert (np.diff(reds) > 0).all() and reds[-1] == palette(1)[0][0]


def test_gradient_maps_share_one_scale_and_report_their_unevenness():
    by_order = torch.ones(9, 16)
    by_order[0, 0] = 4
    large, small = images.gradient_panels("run", PatchGradients(by_order, 5))
    assert [panel.strong for panel in large] == ["order 0", "all 9 orders"] and len(small) == 9
    assert "the strongest patch has 4.0 times" in large[0].caption and "has 1.3 times" in large[1].caption
    weak, strong = decoded(small[1].image), decoded(small[0].image)
    assert np.array_equal(weak[0, 0], strong[3, 3]) and strong[0, 0].sum() > weak[0, 0].sum()
    large, small = images.gradient_panels("run", PatchGradients(by_order[:1], 5))
    assert len(large) == 1 and small == []
