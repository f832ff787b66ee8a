"""Grids of images of any shape: the image's own shape, never more patches than allowed."""

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.errors import UserError
from spot_fast.segmentation.grids import MAX_TOKENS, fit_of, resized

SHAPES = [(64, 64), (640, 480), (100, 333), (1, 1), (5000, 1), (1, 5000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_interpolate_keeps_the_images_shape(shape):
    grid = fit_of("interpolate", 224, 16, 448)(*shape)
    assert min(grid) == 28 and grid[0] * grid[1] <= MAX_TOKENS
    if shape == (640, 480):
        assert grid == (28, 37)


def test_stretch_is_the_models_square():
    assert {fit_of("stretch", 64, 8)(*shape) for shape in SHAPES} == {(8, 8)}


def test_resized_images_have_the_grids_patches():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    pixels = resized(image, (12, 22), 8)
    assert pixels.shape == (3, 96, 176) and pixels.dtype == torch.uint8
    expected = np.asarray(image.resize((176, 96), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [520, 1])
def test_sizes_out_of_range_are_named(size):
    with pytest.raises(UserError, match="use 8 to 512"):
        fit_of("interpolate", 64, 8, size)
