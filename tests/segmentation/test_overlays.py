"""Label maps, overlays and contact sheets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spot_fast.segmentation import overlays


@pytest.mark.parametrize("height, width", [(50, 70), (7, 31), (8, 8), (1, 1)])
def test_labels_are_the_argmax_of_bilinear_maps(height, width):
    masks = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    maps = F.interpolate(masks.T.reshape(1, 5, 8, 8), (height, width), mode="bilinear")
    labels = overlays.labels_at(masks, height, width)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, maps[0].argmax(0).numpy())


def test_ties_go_to_the_lower_slot():
    assert not overlays.labels_at(torch.zeros(4, 3), 5, 5).any()


@pytest.mark.parametrize("shape", [(5, 2), (4, 0), (4, 257)])
def test_bad_masks(shape):
    with pytest.raises(ValueError, match=r"masks has shape \[[45], \d+\]: expected \[G \* G, K\]"):
        overlays.labels_at(torch.zeros(shape), 4, 4)


def test_indexed_png_keeps_labels(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    overlays.indexed_png(labels).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.asarray(image.convert("RGB"))[0, 3], overlays.palette()[3])


def test_labels_of_a_rectangular_grid():
    masks = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    maps = F.interpolate(masks.T.reshape(1, 4, 2, 6), (9, 31), mode="bilinear")
    assert np.array_equal(overlays.labels_at(masks, 9, 31, (2, 6)), maps[0].argmax(0).numpy())
    with pytest.raises(ValueError, match=r"expected \[3 \* 5, K\]"):
        overlays.labels_at(masks, 9, 31, (3, 5))


def test_overlay_tints_by_label():
    masks = F.one_hot(torch.tensor([0, 1, 0, 1]), 2).float()  # left and right half
    panel = np.asarray(overlays.overlay(Image.new("RGB", (10, 10), "black"), masks, (40, 40))).astype(int)
    for column, colour in ((5, 0), (35, 1)):
        assert np.abs(panel[20, column] - overlays.palette()[colour] / 2).max() <= 1
    assert panel[20, 19:21].max() > 200  # the outline between them


@pytest.mark.parametrize(
    "size, expected",
    [
        ((64, 64), (320, 320)),
        ((4000, 3000), (640, 480)),
        ((400, 300), (400, 300)),
        ((5000, 1), (640, 1)),
    ],
)
def test_panel_size(size, expected):
    assert overlays.panel_size(*size) == expected


def test_sheet_holds_every_panel():
    def row(*colours):
        return [("name", Image.new("RGB", (20, 30), colour)) for colour in colours]

    sheet = overlays.contact_sheet([row("red", "lime"), row("blue", "red"), row("red", "red")], columns=2)
    pixels = np.asarray(sheet).reshape(-1, 3).tolist()
    for colour, panels in (([255, 0, 0], 4), ([0, 255, 0], 1), ([0, 0, 255], 1)):
        assert pixels.count(colour) == panels * 600
    mixed = overlays.contact_sheet([row("red"), [("other", Image.new("RGB", (50, 10), "lime"))]])
    assert mixed.width == 70 and np.asarray(mixed).reshape(-1, 3).tolist().count([0, 255, 0]) == 500
    with pytest.raises(ValueError, match="at least one row"):
        overlays.contact_sheet([])


@pytest.mark.parametrize("height, width", [(50, 70), (7, 31), (1, 5000), (5000, 1), (300, 3)])
def test_bands_change_no_label(monkeypatch, height, width):
    """A large label map is computed a band of rows at a time, to save memory."""
    masks = torch.rand(48, 5, generator=torch.Generator().manual_seed(0))
    whole = overlays.labels_at(masks, height, width, (8, 6))
    monkeypatch.setattr(overlays, "_BAND", 200)
    assert np.array_equal(overlays.labels_at(masks, height, width, (8, 6)), whole)
