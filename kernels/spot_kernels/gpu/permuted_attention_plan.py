"""Tiles of the permuted-attention kernels by chip, dtype, head width and number of tokens.

Static tables, checked by compiling for each chip: what fits its shared memory and spills no registers on sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spot_kernels.gpu import launch


class Tiles(NamedTuple):
    """Rows and columns of a tile of scores, in tokens."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """Tiles of the forward kernel, of the kernel for dq and of the kernel for dk and dv."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


# Beyond this many tokens taller tiles pay: the diagonal cuts fewer of them, and k and v are read less often.
_FEW_TOKENS = 512
# bfloat16 and float16. Three stages: rows are in flight for one tile and their positions in the order for the next.
_HALF = {
    "sm_80": Config(Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 3)),
    "sm_89": Config(Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 3)),
    "sm_90": Config(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
    "sm_100": Config(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 3)),
    "gfx942": Config(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(16, 64, 4, 1)),
    "interpreter": Config(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1)),
}
# float32. With tf32 tensor cores; exact without them, where a product keeps whole rows of its operands in registers, so
# that small tiles take many threads (heads wider than 64, and narrower ones); gfx942's matrix cores are exact.
_TF32 = Config(Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 4, 2))
_EXACT_WIDE = Config(Tiles(32, 32, 16, 1), Tiles(16, 16, 8, 1), Tiles(16, 32, 8, 1))
_EXACT_NARROW = Config(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))
_EXACT_GFX = Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))


def config(architecture: str, dtype: torch.dtype, precision: str, block_d: int, tokens: int) -> Config:
    """The tiles for heads padded to block_d channels; precision: of float32 products, "ieee" or "tf32"."""
    if architecture == "interpreter":
        return _HALF[architecture]
    if dtype == torch.float32:
        if architecture == "gfx942":
            return _EXACT_GFX
        return _TF32 if precision == "tf32" else _EXACT_WIDE if block_d > 64 else _EXACT_NARROW
    tiles = _HALF[architecture]
    if architecture == "sm_90" and block_d > 64:
        tiles = tiles._replace(keys=tiles.keys._replace(num_warps=8))
    if tokens > _FEW_TOKENS:
        rows, columns, warps, stages = tiles.forward
        tiles = tiles._replace(forward=Tiles(2 * rows, columns, 2 * warps, stages))
    return tiles


def common_arguments(q: torch.Tensor, order: torch.Tensor) -> tuple[tuple[int, ...], dict, Config]:
    """What all launches share: strides of the order, heads, tokens, width; compile-time constants; the tiles."""
    _, heads, tokens, width = q.shape
    block_d, precision = launch.power_of_2(width), launch.float32_precision(q.device)
    constants = {
        "BLOCK_D": block_d,
        "EVEN_D": block_d == width,
        "PRECISION": precision,
        "WIDEN": launch.widen(q.device),
    }
    tiles = config(launch.architecture(q.device), q.dtype, precision, block_d, tokens)
    return (order.stride(0) if order.dim() == 2 else 0, order.stride(-1), heads, tokens, width), constants, tiles
