"""Device functions that load and store rows of [N, width] matrices at raster positions read from a patch order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_order(order, stride, o_row, m_row, MASKED: tl.constexpr):
    """Raster positions of the tokens at positions o_row of the order, int64: offsets of large tensors pass 2^31."""
    if MASKED:
        return tl.load(order + o_row * stride, mask=m_row, other=0)
    return tl.load(order + o_row * stride)


@triton.jit
def load_rows(
    base,
    token,
    stride,
    m_row,
    width,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[rows, BLOCK_D] at the raster positions `token`; 0 beyond the width and, if MASKED, outside m_row."""
    o_d = tl.arange(0, BLOCK_D)
    p = base + token[:, None] * stride + o_d[None, :]
    # no mask where none is needed: whole tiles of full width load unconditionally
    if MASKED and EVEN_D:
        b = tl.load(p, mask=m_row[:, None], other=0.0)
    elif MASKED:
        b = tl.load(p, mask=m_row[:, None] & (o_d < width)[None, :], other=0.0)
    elif EVEN_D:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=(o_d < width)[None, :], other=0.0)
    if WIDEN:
        b = b.to(tl.float32)
    return b


@triton.jit
def narrow(b, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `b` in `dtype`, rounded to nearest.

    The interpreter truncates to bfloat16, so there the rounding is added to the bits first.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b.to(tl.int32, bitcast=True)
        b = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return b.to(dtype)


@triton.jit
def store_rows(base, token, stride, m_row, width, b, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """Stores float32 b [rows, BLOCK_D] at the raster positions `token`."""
    o_d = tl.arange(0, BLOCK_D)
    p = base + token[:, None] * stride + o_d[None, :]
    tl.store(p, narrow(b, base.dtype.element_ty, WIDEN), mask=m_row[:, None] & (o_d < width)[None, :])
