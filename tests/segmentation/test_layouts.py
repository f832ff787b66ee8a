"""Grids and windows of images: everything is covered, nothing is larger than allowed."""

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.errors import UserError
from spot_fast.segmentation.layouts import MAX_TOKENS, MAX_WINDOWS, fit_of, windows_of

SHAPES = [(64, 64), (640, 480), (100, 333), (1, 1), (5000, 1), (1, 5000)]


@pytest.mark.parametrize("size", [None, 64, 100, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_the_image_and_overlap_by_half(shape, size):
    layout = fit_of("tiles", 64, 8, size)(*shape)
    seen = np.zeros(layout.grid, int)
    for top, left in layout.corners:
        assert seen[top : top + 8, left : left + 8].shape == (8, 8)
        seen[top : top + 8, left : left + 8] += 1
    assert seen.min() >= 1 and len(layout.corners) <= MAX_WINDOWS and layout.tiled
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in layout.corners})
        assert starts[0] == 0 and starts[-1] == layout.grid[axis] - 8 and np.diff([*starts, starts[-1]]).max() <= 4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_grid_of_the_images_own_shape(shape):
    layout = fit_of("interpolate", 224, 16, 448)(*shape)
    assert min(layout.grid) == 28 and layout.grid[0] * layout.grid[1] <= MAX_TOKENS
    if shape == (640, 480):
        assert layout.grid == (28, 37) == layout.window and layout.corners == ((0, 0),)


def test_stretched_images_are_the_models_square():
    assert {fit_of("stretch", 64, 8)(*shape).grid for shape in SHAPES} == {(8, 8)}


def test_windows_are_parts_of_the_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    layout = fit_of("tiles", 64, 8, 96)(*image.size)
    windows = windows_of(image, layout, 8)
    assert windows.shape == (len(layout.corners), 3, 64, 64) and windows.dtype == torch.uint8
    whole = np.asarray(image.resize((layout.grid[1] * 8, layout.grid[0] * 8), Image.Resampling.BILINEAR))
    for window, (top, left) in zip(windows, layout.corners, strict=True):
        part = whole[8 * top : 8 * top + 64, 8 * left : 8 * left + 64]
        assert np.array_equal(window.permute(1, 2, 0).numpy(), part)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("tiles", 56, "use 64 .the model's square. to 288"),
        ("tiles", 296, "to 288"),
        ("interpolate", 520, "use 8 to 512"),
        ("interpolate", 1, "use 8 to 512"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name, size, message):
    with pytest.raises(UserError, match=message):
        fit_of(name, 64, 8, size)
