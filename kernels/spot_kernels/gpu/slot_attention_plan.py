"""Tiles, splits and precisions of the slot-attention kernels by chip, shape and dtype.

Static tables and rules, checked by compiling for each chip: what fits its shared memory and spills no registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from spot_kernels.gpu import launch


class Plan(NamedTuple):
    """The tiles and blocks of a launch.

    heads, slots: of a tile, padded; its rows are heads × slots. columns: of a tile. whole: whether these are whole
    rows; otherwise a program computes one part of its rows. joint: whether the heads need `joint_statistics`. tokens:
    of a block; num_stages blocks are in flight at once.
    """

    heads: int
    slots: int
    columns: int
    whole: bool
    joint: bool
    tokens: int
    num_warps: int
    num_stages: int


# Bytes of the largest tile of slots in a backward program, which holds four such tiles beside its blocks of tokens.
# A forward program holds half as many.
TILE_BYTES = {"sm_80": 16384, "sm_89": 8192, "sm_90": 32768, "sm_100": 32768, "gfx942": 8192, "interpreter": 32768}
# Fewest tokens a program at which a split pays for its second launch, forward and backward.
LEAST_TOKENS = (256, 256)


def plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, products: dict, backward: bool, maps: bool = False) -> Plan:
    """The plan of a launch; `products` are its `precisions`, k and v have unit stride in channels.

    maps: whether a backward launch has gradients of attn or logits as well.
    """
    _, heads, slots, width = q.shape
    architecture = launch.architecture(q.device)
    # float16 tiles are multiplied with their weights in float32
    size = 2 if k.dtype == torch.bfloat16 else 4
    most = TILE_BYTES[architecture] * (1 if backward else 2) // size
    if maps and architecture in ("sm_90", "sm_100"):
        # the largest tile leaves no registers for them
        most //= 2
    widest = 256
    # without tensor cores whole rows of operands are held in registers: more than 64 columns would not fit
    exact = k.dtype == torch.float32 and products["PRECISION"] == "ieee" and architecture.startswith("sm_")
    if exact:
        widest = 64
    across = launch.power_of_2(heads, 1)
    down, columns = launch.power_of_2(slots, max(1, 16 // across)), launch.power_of_2(heads * width)
    fits = across * down <= 64 and columns <= widest and across * down * columns <= most
    joint = heads > 1 and not (fits and k.stride(1) == v.stride(1) == width)
    if joint:
        across, down, columns = 1, launch.power_of_2(slots), launch.power_of_2(width)
    whole, rows = columns, across * down
    columns = min(columns, widest, most // rows)
    tile = rows * columns * size
    if architecture == "interpreter":
        # small blocks, so that a small test has several
        return Plan(across, down, columns, columns == whole, joint, 16, 4, 1)
    if exact:
        return Plan(across, down, columns, columns == whole, joint, 16 if backward and rows > 32 else 32, 8, 2)
    if columns > 64:
        tokens, num_warps = _tokens_of_wide_tiles(architecture, k.dtype, rows, tile, backward), 8
    elif rows > 32:
        tokens, num_warps = (16, 4) if architecture == "gfx942" else (32, 8)
    else:
        tokens, num_warps = 64, 8 if backward and architecture != "gfx942" else 4
    if k.dtype == torch.float32 or architecture in ("sm_89", "gfx942") or architecture == "sm_80" and tokens == 64:
        num_stages = 2
    elif k.dtype == torch.float16 and tokens == 64 and columns > 64:
        num_stages = 2
    else:
        num_stages = 3 if columns <= 64 or tokens == 64 or tile > 16384 or architecture == "sm_80" else 4
    return Plan(across, down, columns, columns == whole, joint, tokens, num_warps, num_stages)


def _tokens_of_wide_tiles(architecture: str, dtype: torch.dtype, rows: int, tile: int, backward: bool) -> int:
    """Tokens of a block with more than 64 columns, for eight warps; tile: bytes of one of slots."""
    if architecture == "gfx942":
        return 16 if backward or dtype == torch.float32 else 32
    if dtype == torch.float32:
        # keys and values need twice the memory
        return 16 if rows > 32 or backward and tile >= 32768 else 32
    # eight tokens a warp; a block has as many barriers as one of 32, or fewer
    if dtype == torch.bfloat16 and rows <= 32 and not (architecture == "sm_89" and backward):
        return 64
    if dtype == torch.float16 and rows <= 16 and not backward and architecture in ("sm_90", "sm_100"):
        return 64
    return 16 if backward and tile >= 32768 else 32


def splits(programs: int, tokens: int, device: torch.device, backward: bool) -> tuple[int, int]:
    """The number of programs over which the tokens of a sample are split, and the tokens of each.

    Two programs a multiprocessor, and only where there are fewer programs than multiprocessors without a split, and
    enough tokens. Counted for SPOT's shape in bf16, (64, 196, 7, 256): 64 programs have four blocks of 64 tokens each,
    three of them in flight, and a block is a chain of two products, a softmax and three barriers, about 0.7 µs forward
    and twice as much backward. Halves of 98 tokens would save two blocks of each program, 1.4 and 2.8 µs, and the
    launch that adds their sums costs 2.8 µs (`_sum_parts` of the cross-attention on an H200). `bench/sweep.py` tries
    other numbers.
    """
    wanted = launch.multiprocessors(device)
    least = LEAST_TOKENS[backward]
    number = 1 if programs >= wanted else max(1, min(2 * wanted // max(programs, 1), tokens // least))
    # halves of what does not fill whole blocks are as long as any: a block may be cut anywhere
    span = max(triton.cdiv(tokens, number), 1)
    return max(triton.cdiv(tokens, span), 1), span


def precisions(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Precision of products of inputs (PRECISION) and with weights (WEIGHTS), and the weights' rounding (ROUND)."""
    widen, architecture = launch.widen(device), launch.architecture(device)
    precision = launch.float32_precision(device)
    weights, rounding = precision, "tf32" if precision == "tf32" else "none"
    if dtype == torch.bfloat16 and not widen:
        rounding = "bf16"
    elif dtype == torch.float16 and architecture not in ("interpreter", "gfx942"):
        # in float16 a weight below 6e-8 would vanish, and eps with it; in tf32 float16 values are exact and weights
        # have the range of float32
        weights, rounding = "tf32", "tf32"
    return {"PRECISION": precision, "WEIGHTS": weights, "ROUND": rounding, "WIDEN": widen}
