"""The nine patch orders: equal to the authors', permutations of the grid at every size, as SPEC section 3 has them."""

import pytest
import torch

import golden_tensors
from spot_fast.model.patch_orders import patch_orders

GOLDEN = ["orders"]


def test_orders_of_the_14_grid_are_the_authors():
    golden_tensors.assert_close("orders", patch_orders(14))


@pytest.mark.parametrize("grid", [1, 2, 3, 7, 8, 16, 21, 24, 28, 32, 37])
def test_every_order_visits_every_patch_once(grid):
    orders = patch_orders(grid)
    assert orders.shape == (9, grid * grid) and orders.dtype == torch.int64
    assert torch.equal(orders.sort(-1).values, torch.arange(grid * grid).expand(9, -1))


@pytest.mark.parametrize("grid", [(2, 5), (7, 3), (1, 4), (4, 1)])
def test_every_order_of_a_rectangle_visits_every_patch_once(grid):
    orders = patch_orders(grid)
    patches = grid[0] * grid[1]
    assert torch.equal(orders.sort(-1).values, torch.arange(patches).expand(9, -1))
    assert orders[1].tolist() == [row * grid[1] + column for column in range(grid[1]) for row in range(grid[0])]
    assert torch.equal(patch_orders((3, 3)), patch_orders(3))


def test_nine_different_orders_from_two_patches_a_side():
    assert len({tuple(order.tolist()) for order in patch_orders(3)}) == 9


def test_orders_of_a_small_grid_written_out():
    """0 1 2 / 3 4 5 / 6 7 8, in the words of SPEC: rows, columns, their reversals, and the outward spiral."""
    assert patch_orders(3).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 3, 6, 1, 4, 7, 2, 5, 8],
        [2, 5, 8, 1, 4, 7, 0, 3, 6],
        [2, 1, 0, 5, 4, 3, 8, 7, 6],
        [8, 5, 2, 7, 4, 1, 6, 3, 0],
        [8, 7, 6, 5, 4, 3, 2, 1, 0],
        [6, 3, 0, 7, 4, 1, 8, 5, 2],
        [6, 7, 8, 3, 4, 5, 0, 1, 2],
        [4, 1, 0, 3, 6, 7, 8, 5, 2],
    ]


def test_standard_set_is_the_raster_order():
    assert torch.equal(patch_orders(4, "standard"), torch.arange(16)[None])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind 'spiral'"):
        patch_orders(4, "spiral")
    with pytest.raises(ValueError, match="grid 0"):
        patch_orders(0)
