"""Triton kernels of clipped_adam and infinity_norm.

    g  = gradient · min(1, limit / (norm + 1e-6))
    m  = β1 m + (1 − β1) g;  v = β2 v + (1 − β2) g²;  t = step + 1
    w -= rate / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)

w, m, v float32 [T]; gradients [S] and [T − S], each in its own dtype; float32 arithmetic in the order of PyTorch's own
fused Adam on CUDA, with its fused multiply-adds. Nothing is saved.

Both are bound by memory: 41 M parameters with bfloat16 gradients and copy are 82 MB for the norm and 1.15 GB for the
update, 20 and 272 µs at an H200's 4.2 TB/s. Powers of the betas come from a table, so there is no float64 arithmetic;
the host reads neither the norm nor whether the step is bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

# Elements with one owner, which bounds a block; as in spot_kernels.clipped_adam.
UNIT = 1024


@triton.jit
def _largest(tensor, parts, size, offset, BLOCK: tl.constexpr):
    """The bits of each program's largest absolute value, to parts from `offset` on. Grid: programs, each every n-th
    block.

    Without its sign a float's bits are ordered as an integer's, and a NaN's are above infinity's: an integer maximum
    keeps NaN, which a maximum of floats on a GPU drops.
    """
    b_most = tl.zeros((BLOCK,), dtype=tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        o = start + tl.arange(0, BLOCK)
        # [BLOCK]; float32 holds every value of the smaller types
        b_x = tl.load(tensor + o, mask=o < size, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(parts + offset + tl.program_id(0), tl.max(b_most, 0))


@triton.jit
def _largest_part(parts, norm, count, BLOCK: tl.constexpr):
    """norm float32 [] from all parts. One program."""
    b_most = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_most = tl.maximum(b_most, tl.load(parts + o, mask=o < count, other=0))
    tl.store(norm, tl.max(b_most, 0).to(tl.float32, bitcast=True))


@triton.jit
def _clipped_adam(
    weights,
    gradients,
    others,
    exp_avg,
    exp_avg_sq,
    copy,
    steps,
    present,
    owners,
    places,
    corrections,
    rate,
    norm,
    bad,
    size,
    split,
    copied,
    known,
    limit,
    beta1,
    beta2,
    eps,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    WITH_OTHERS: tl.constexpr,
    WITH_PLACES: tl.constexpr,
    WITH_COPY: tl.constexpr,
    WITH_PRESENT: tl.constexpr,
    WITH_NORM: tl.constexpr,
    WITH_BAD: tl.constexpr,
):
    """Grid: blocks of BLOCK elements, which have one owner. gradients [split], others the rest; copy [copied].

    With places, gradients hold the units in another sequence: places [T / UNIT] is where each begins.
    """
    # int64: T may pass 2^31
    first = tl.program_id(0).to(tl.int64) * BLOCK
    owner = tl.load(owners + first // UNIT)
    go = True
    if WITH_BAD:
        go = tl.load(bad) != 1.0
    if WITH_PRESENT:
        go = go & (tl.load(present + owner) != 0.0)
    # a block that keeps its values reads none of them
    if go:
        o = first + tl.arange(0, BLOCK)
        m = o < size
        # 4 elements a thread for every dtype: with 8 of bfloat16 tiles would change their layout in shared memory
        o_g = tl.max_contiguous(o, 4)
        # gradient [BLOCK]; a block lies in one of the two tensors
        if WITH_PLACES:
            # units lie anywhere, but whole and aligned
            place = tl.multiple_of(tl.load(places + first // UNIT) + first % UNIT, 16)
            o_place = tl.max_contiguous(place + tl.arange(0, BLOCK), 4)
            b_g = tl.load(gradients + o_place, mask=m, other=0.0).to(tl.float32)
        elif WITH_OTHERS:
            if first < split:
                b_g = tl.load(gradients + o_g, mask=m, other=0.0).to(tl.float32)
            else:
                b_g = tl.load(others + (o_g - split), mask=m, other=0.0).to(tl.float32)
        else:
            b_g = tl.load(gradients + o_g, mask=m, other=0.0).to(tl.float32)
        if WITH_NORM:
            b_g = b_g * tl.minimum(tl.div_rn(limit, tl.load(norm) + 1e-6), 1.0)
        # moments [BLOCK]; (1 − β) x as x − β x, as PyTorch has it
        b_m = tl.load(exp_avg + o, mask=m, other=0.0)
        b_m = tl.fma(beta1, b_m, tl.fma(-beta1, b_g, b_g))
        b_g2 = b_g * b_g
        b_v = tl.load(exp_avg_sq + o, mask=m, other=0.0)
        b_v = tl.fma(beta2, b_v, tl.fma(-beta2, b_g2, b_g2))
        # from the last entry on both corrections are 1
        t = tl.minimum(tl.load(steps + owner).to(tl.int32) + 1, known - 1)
        size_of_step = tl.div_rn(tl.load(rate), tl.load(corrections + t))
        # div_rn and sqrt_rn: the plain ones of GPUs are not correctly rounded
        b_d = tl.div_rn(tl.sqrt_rn(b_v), tl.load(corrections + known + t)) + eps
        b_w = tl.load(weights + o, mask=m, other=0.0) - tl.div_rn(size_of_step * b_m, b_d)
        tl.store(exp_avg + o, b_m, mask=m)
        tl.store(exp_avg_sq + o, b_v, mask=m)
        tl.store(weights + o, b_w, mask=m)
        if WITH_COPY:
            tl.store(copy + o_g, b_w.to(copy.dtype.element_ty), mask=o < copied)


class _Config(NamedTuple):
    block: int
    num_warps: int


def _norm_config() -> _Config:
    """16 values a thread, two loads of 16 bytes of bfloat16 in flight each."""
    return _Config(4096, 8)


def _update_config() -> _Config:
    """8 values a thread: 16 bytes of bfloat16, twice that of each float32 tensor."""
    return _Config(1024, 4)


def infinity_norm(tensors: Sequence[torch.Tensor], norm: torch.Tensor) -> None:
    """Fills norm, float32 [], with the largest absolute value of one or two flat tensors."""
    device = tensors[0].device
    launch.written("norm", norm, torch.float32, (), device)
    config = _norm_config()
    # several programs a multiprocessor: enough loads in flight, and few parts
    most = 8 * launch.multiprocessors(device)
    programs = [min(triton.cdiv(tensor.numel(), config.block), most) for tensor in tensors]
    parts = torch.empty(sum(programs), dtype=torch.int32, device=device)
    for number, (tensor, count) in enumerate(zip(tensors, programs, strict=True)):
        launch.launch(
            _largest,
            (count,),
            tensor,
            parts,
            tensor.numel(),
            sum(programs[:number]),
            num_warps=config.num_warps,
            num_stages=1,
            BLOCK=config.block,
        )
    launch.launch(_largest_part, (1,), parts, norm, parts.numel(), num_warps=4, num_stages=1, BLOCK=1024)


def clipped_adam(
    weights: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    rate: torch.Tensor,
    owners: torch.Tensor,
    corrections: torch.Tensor,
    copy: torch.Tensor | None,
    norm: torch.Tensor | None,
    bad: torch.Tensor | None,
    present: torch.Tensor | None,
    places: torch.Tensor | None,
    limit: float,
    betas: Sequence[float],
    eps: float,
) -> None:
    """Updates weights and moments [T] and copy; steps are not counted up. Arguments as `spot_kernels.clipped_adam`."""
    size = weights.numel()
    for name, tensor in (("weights", weights), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        launch.written(name, tensor, torch.float32, (size,), weights.device)
    if copy is not None:
        launch.written("copy", copy, copy.dtype, (copy.numel(),), weights.device)
    first, others = gradients[0], gradients[1] if len(gradients) > 1 else None
    config = _update_config()
    launch.launch(
        _clipped_adam,
        (triton.cdiv(size, config.block),),
        weights,
        first.contiguous(),
        None if others is None else others.contiguous(),
        exp_avg,
        exp_avg_sq,
        copy,
        steps,
        present,
        owners,
        places,
        corrections,
        rate,
        norm if limit > 0 else None,
        bad,
        size,
        first.numel(),
        0 if copy is None else copy.numel(),
        corrections.shape[1],
        limit,
        *betas,
        eps,
        num_warps=config.num_warps,
        num_stages=1,
        BLOCK=config.block,
        UNIT=UNIT,
        WITH_OTHERS=others is not None,
        WITH_PLACES=places is not None,
        WITH_COPY=copy is not None,
        WITH_PRESENT=present is not None,
        WITH_NORM=limit > 0,
        WITH_BAD=bad is not None,
    )
