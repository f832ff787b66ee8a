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
# Fewest tokens a program at which a split pays for its second launch.
LEAST_TOKENS = 256


def plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, products: dict, backward: bool) -> Plan:
    """The plan of a launch; `products` are its `precisions`, k and v have unit stride in channels."""
    _, heads, slots, width = q.shape
    architecture = launch.architecture(q.device)
    # float16 tiles are multiplied with their weights in float32
    size = 2 if k.dtype == torch.bfloat16 else 4
    most = TILE_BYTES[architecture] * (1 if backward else 2) // size
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
        return Plan(across, down, columns, columns == whole, joint, 32 if rows <= 32 else 16, 8, 2)
    if columns > 64:
        # float32 keys and values need twice the memory
        full = backward and tile >= 32768 or architecture == "gfx942" and k.dtype == torch.float32
        tokens, num_warps = 16 if full else 32, 8
    elif rows > 32:
        tokens, num_warps = (16, 4) if architecture == "gfx942" else (32, 8)
    else:
        tokens, num_warps = 64, 4
    if k.dtype == torch.float32 or architecture in ("sm_89", "gfx942"):
        num_stages = 2
    else:
        num_stages = 3 if columns <= 64 or tile > 16384 or architecture == "sm_80" else 4
    return Plan(across, down, columns, columns == whole, joint, tokens, num_warps, num_stages)


def splits(programs: int, tokens: int, block: int, device: torch.device) -> tuple[int, int]:
    """The number of programs over which the tokens of a sample are split, and the tokens of each.

    Two programs a multiprocessor, and only where there are fewer programs than multiprocessors without a split. Counted
    for SPOT's shape in bf16, (64, 196, 7, 256): 64 programs keep three blocks of 32 KB each in flight, 6 MB together,
    and memory needs about 4 MB (4 TB/s times a latency of 1 µs) to run at full speed. All of k and v is 3 µs of memory
    traffic: halves of 98 tokens would gain less than the second launch costs.
    """
    wanted = launch.multiprocessors(device)
    number = 1 if programs >= wanted else min(2 * wanted // max(programs, 1), tokens // LEAST_TOKENS)
    blocks = triton.cdiv(tokens, block)
    span = triton.cdiv(blocks, max(number, 1)) * block
    return max(triton.cdiv(tokens, max(span, 1)), 1), span


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
