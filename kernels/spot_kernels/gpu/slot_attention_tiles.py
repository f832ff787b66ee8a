"""Device functions that the slot-attention kernels share: indices, loads, products and the softmax of a tile.

Queries, updates and their gradients are tiles [ROWS, COLUMNS] of rows (head, slot) and columns (head, channel), blocks
of tokens [TOKENS, COLUMNS], weights and logits [ROWS, TOKENS]. Their rows are few, 16 for up to 16 slots, so that the
warps of a program share out the tokens: each warp has all rows of its tokens, and the softmax over them stays within
it, without a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(weights, ROUND: tl.constexpr):
    """Weights in the precision of the product they enter, so that their sum is of exactly what is multiplied."""
    if ROUND == "bf16":
        weights = weights.to(tl.bfloat16)
    elif ROUND == "tf32":
        # tensor cores truncate these 13 bits, which makes every weight smaller: round to nearest instead
        bits = weights.to(tl.int32, bitcast=True) + 0x1000
        weights = (bits & -0x2000).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def operand(tile, ROUND: tl.constexpr):
    """A tile of the inputs in the dtype of the weights it is multiplied by."""
    if ROUND != "bf16":
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_tile(x, rows, columns, mask, WIDEN: tl.constexpr):
    """x at the offsets rows + columns, 0 outside the mask; float32 if WIDEN (the interpreter's bfloat16 is wrong)."""
    tile = tl.load(x + (rows[:, None] + columns[None, :]), mask=mask, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def inner_products(
    x,
    x_rows,
    stride_x,
    m_x,
    y,
    y_rows,
    m_y,
    width,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """x yᵀ [rows of x, rows of y] in float32, for rows wider than a tile."""
    product = tl.zeros([x_rows.shape[0], y_rows.shape[0]], tl.float32)
    # COLUMNS channels of both at a time
    for first in range(0, width, COLUMNS):
        o_c = first + tl.arange(0, COLUMNS)
        m_c = o_c < width
        b_x = load_tile(x, x_rows, o_c * stride_x, m_x[:, None] & m_c[None, :], WIDEN)
        b_y = load_tile(y, y_rows, o_c, m_y[:, None] & m_c[None, :], WIDEN)
        product = tl.dot(b_x, tl.trans(b_y), product, input_precision=PRECISION)
    return product


@triton.jit
def row_products(x, x_rows, stride_x, y, y_rows, mask, width, COLUMNS: tl.constexpr):
    """Σ x y over the channels of each row, in float32."""
    product = tl.zeros([x_rows.shape[0]], tl.float32)
    # [rows, COLUMNS] of both at a time
    for first in range(0, width, COLUMNS):
        o_c = first + tl.arange(0, COLUMNS)
        m_rc = mask[:, None] & (o_c < width)[None, :]
        b_x = load_tile(x, x_rows, o_c * stride_x, m_rc, True)
        product += tl.sum(b_x * load_tile(y, y_rows, o_c, m_rc, True), 1)
    return product


@triton.jit
def tile_indices(
    heads, slots, width, HEADS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):
    """The sample, heads, slots and channels of the rows and columns of this program's tiles, and their masks.

    With several heads the tile is block-diagonal: m_rc is false where row and column belong to different heads.
    """
    i_program = tl.program_id(0)
    if HEADS == 1:
        i_b, i_h, group = (i_program // heads).to(tl.int64), (i_program % heads).to(tl.int64), 1
    else:
        i_b, i_h, group = i_program.to(tl.int64), tl.cast(0, tl.int64), heads
    o_r, o_c = tl.arange(0, HEADS * SLOTS), tl.arange(0, COLUMNS)
    if not WHOLE:
        o_c += tl.program_id(2) * COLUMNS
    r_head, r_slot = o_r // SLOTS, o_r % SLOTS
    m_r, m_c = (r_head < group) & (r_slot < slots), o_c < group * width
    m_rc, c_in = m_r[:, None] & m_c[None, :], o_c
    if HEADS > 1:
        c_head = o_c // width
        m_rc, c_in = m_rc & (r_head[:, None] == c_head[None, :]), o_c - c_head * width
    return i_b, i_h, r_head, r_slot, m_r, o_c, c_in, m_c, m_rc


@triton.jit
def softmax(b_l, m_r, m_t, peak, mass, o_n, JOINT: tl.constexpr):
    """a from logits [ROWS, TOKENS]: over the rows, or with the joint kernel's statistics of all heads. 0 in padding."""
    b_l = tl.where(m_r[:, None], b_l, float("-inf"))
    if JOINT:
        b_peak = tl.load(peak + o_n, mask=m_t, other=0.0)
        b_mass = tl.load(mass + o_n, mask=m_t, other=1.0)
        b_a = tl.exp(b_l - b_peak[None, :]) / b_mass[None, :]
    else:
        b_a = tl.exp(b_l - tl.max(b_l, 0)[None, :])
        b_a = b_a / tl.sum(b_a, 0)[None, :]
    return b_a
