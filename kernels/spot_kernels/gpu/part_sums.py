"""Adds up the parts of two vectors' gradients that programs have written, always in one sequence: no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

# Parts and units of a tile: 32 bytes of a row are one sector of memory, and few units make many programs.
_PARTS, _UNITS = 256, 8


@triton.jit
def _sum_parts(parts, grad_weight, grad_bias, programs, units, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr):
    """grad_weight and grad_bias [U] from parts [2, programs, U]. Grid: blocks of units."""
    o_p, o_u = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < units
    b_w = tl.zeros((BLOCK_P, BLOCK_U), dtype=tl.float32)
    b_b = tl.zeros((BLOCK_P, BLOCK_U), dtype=tl.float32)
    # [BLOCK_P, BLOCK_U] parts of each at a time, always in the same order
    for start in range(0, programs, BLOCK_P):
        m = (start + o_p < programs)[:, None] & m_u[None, :]
        p = parts + (start + o_p)[:, None] * units + o_u[None, :]
        b_w += tl.load(p, mask=m, other=0.0)
        b_b += tl.load(p + programs * units, mask=m, other=0.0)
    tl.store(grad_weight + o_u, tl.sum(b_w, 0).to(grad_weight.dtype.element_ty), mask=m_u)
    tl.store(grad_bias + o_u, tl.sum(b_b, 0).to(grad_bias.dtype.element_ty), mask=m_u)


def sum_parts(parts: torch.Tensor, grad_weight: torch.Tensor, grad_bias: torch.Tensor) -> None:
    """Fills grad_weight and grad_bias [U], contiguous, with the sums of parts [2, programs, U] float32."""
    programs, units = parts.shape[1:]
    launch.launch(
        _sum_parts,
        (triton.cdiv(units, _UNITS),),
        parts,
        grad_weight,
        grad_bias,
        programs,
        units,
        num_warps=8,
        num_stages=1,
        BLOCK_P=_PARTS,
        BLOCK_U=_UNITS,
    )
