"""The patch orders in which the autoregressive decoder predicts (SPOT, section 3.3)."""

from __future__ import annotations

import torch

ORDER_SETS = {"standard": 1, "spot9": 9}


def _spiral(grid: torch.Tensor) -> torch.Tensor:
    """Outward spiral, from near the centre to a corner: the inward spiral of the grid turned by 90°, reversed."""
    parts = []
    # Turning the grid brings the next side to the top, where a row is taken off.
    while grid.numel():
        grid = torch.rot90(grid)
        parts.append(grid[0])
        grid = grid[1:]
    return torch.cat(parts).flip(0)


def patch_orders(grid: int | tuple[int, int], kind: str = "spot9") -> torch.Tensor:
    """Patch orders of a square or (height, width) grid: raster indices in decoding sequence, LongTensor [P, N].

    `standard` is the raster order alone. `spot9` has, in this sequence: rows left→right from the top, columns
    downwards from the left, columns downwards from the right, rows right→left from the top, columns upwards from the
    right, rows right→left from the bottom, columns upwards from the left, rows left→right from the bottom, spiral.
    """
    if kind not in ORDER_SETS:
        raise ValueError(f"kind {kind!r} is not an order set: use one of {', '.join(ORDER_SETS)}")
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if min(height, width) < 1:
        raise ValueError(f"grid {grid} is not a number of patches: it must be at least 1")
    raster = torch.arange(height * width).view(height, width)
    if kind == "standard":
        return raster.reshape(1, -1)
    columns, right, bottom = raster.t(), raster.flip(1), raster.flip(0)
    orders = [raster, columns, columns.flip(0), right, columns.flip(0, 1), raster.flip(0, 1), columns.flip(1), bottom]
    return torch.stack([order.reshape(-1) for order in orders] + [_spiral(raster)])
