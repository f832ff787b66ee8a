"""Triton kernels of gru_norm.

    r, z = σ(i_r + h_r), σ(i_z + h_z);  n = tanh(i_n + r h_n);  h' = (1 − z) n + z h
    x = (h' − mean) / √(variance + eps);  normed = x · weight + bias
    g = dnormed · weight;  dh' = dnew + (g − mean g − x mean(g x)) / √(variance + eps)
    dn = dh' (1 − z) (1 − n²);  dz = dh' (h − n) z (1 − z);  dr = dn h_n r (1 − r)
    di = (dr, dz, dn);  dh_· = (dr, dz, r dn);  dh = dh' z;  dweight = Σ_rows dnormed x;  dbias = Σ_rows dnormed

gates [M, 3U]; h, h' and normed [M, U]; weight, bias [U]; float32, bfloat16 or float16. A row fits one tile, and all
arithmetic is float32 in registers. Saved for backward: the gates, hidden and weight. Backward computes the cell and the
statistics again: two exponentials a value and two sums a row cost less than writing and reading what would be saved
instead (torch.nn.GRUCell keeps five values a unit). Its programs walk over rows with their part of dweight and dbias in
registers; a second kernel adds the parts in a fixed order.

Why the products stay outside. Counted, not measured, for the part of an iteration after the attention at SPOT's shape:
64 images of 7 slots are M = 448 rows, U = 256, MLP 1024, and W = 6 U² + 8 U² = 0.92 M weights, 1.8 MB in bfloat16.

    separate kernels   cell and LayerNorm are 2 launches that move 15 MU values (6 gates, h, h' twice, normed, 5 saved),
                       and 4 launches and 21 MU backward. MU values are 0.2 MB in bfloat16, at most 0.1 µs of an H200's
                       memory: the launches cost, about 2 µs each in a captured graph.
    gru_norm           1 launch and 9 MU, backward 2 launches and 16 MU. The four products keep their 2 MW = 0.8 GFLOP
                       (1 µs of tensor cores) and read every weight once.
    one kernel         saves the five launches around it too, but its rows are cut into tiles of 16 or more: 28 programs
                       on 132 multiprocessors, each reading all weights from L2, 51 MB in all. At about 64 bytes a cycle
                       that is 16 µs for one multiprocessor, more than the launches saved; and the weights' gradients
                       would still need four products over all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch
from spot_kernels.gpu.part_sums import sum_parts


@triton.jit
def _sigmoid(x):
    # div_rn: the plain division of GPUs is not correctly rounded
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """tanh accurate to float32's last places, also near 0, where 2 σ(2x) − 1 cancels; Triton has no portable tanh."""
    a = tl.abs(x)
    far = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * a) + 1.0)
    # the [7/6] Padé approximant, exact to 1e-13 below 0.75
    s = x * x
    over = x * (135135.0 + s * (17325.0 + s * (378.0 + s)))
    near = tl.div_rn(over, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    return tl.where(a < 0.75, near, tl.where(x < 0, -far, far))


@triton.jit
def _cell(gates_input, gates_hidden, hidden, stride_i, stride_g, stride_h, o_row, o_u, m, units):
    """r, z, n, h_n, h and h' of a tile [ROWS, BLOCK_U], float32; h' is 0 in padding."""
    # a row of gates holds r, z and n side by side, `units` apart
    p_i = gates_input + o_row[:, None] * stride_i + o_u[None, :]
    p_g = gates_hidden + o_row[:, None] * stride_g + o_u[None, :]
    b_h = tl.load(hidden + o_row[:, None] * stride_h + o_u[None, :], mask=m, other=0.0).to(tl.float32)
    b_ir = tl.load(p_i, mask=m, other=0.0).to(tl.float32)
    b_iz = tl.load(p_i + units, mask=m, other=0.0).to(tl.float32)
    b_in = tl.load(p_i + 2 * units, mask=m, other=0.0).to(tl.float32)
    b_hr = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
    b_hz = tl.load(p_g + units, mask=m, other=0.0).to(tl.float32)
    b_hn = tl.load(p_g + 2 * units, mask=m, other=0.0).to(tl.float32)
    b_r = _sigmoid(b_ir + b_hr)
    b_z = _sigmoid(b_iz + b_hz)
    b_n = _tanh(b_in + b_r * b_hn)
    return b_r, b_z, b_n, b_hn, b_h, (1.0 - b_z) * b_n + b_z * b_h


@triton.jit
def _standardise(b_new, m, units, eps):
    """x [ROWS, BLOCK_U], 0 in padding, and 1 / √(variance + eps) [ROWS, 1]."""
    # two passes over registers, mean before variance: E[x²] − E[x]² would cancel. Padding must not enter the variance
    b_c = tl.where(m, b_new - (tl.sum(b_new, 1) / units)[:, None], 0.0)
    b_inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_c * b_c, 1) / units + eps))[:, None]
    return tl.where(m, b_c * b_inverse, 0.0), b_inverse


@triton.jit
def _forward(
    gates_input,
    gates_hidden,
    hidden,
    weight,
    bias,
    new,
    normed,
    stride_i,
    stride_g,
    stride_h,
    rows,
    units,
    eps,
    ROWS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Grid: blocks of ROWS rows. new and normed are contiguous."""
    o_row, o_u = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_U)
    m_u = o_u < units
    m = (o_row < rows)[:, None] & m_u[None, :]
    # int64: the offset of a row passes 2^31 in large batches
    o_row = o_row.to(tl.int64)
    _, _, _, _, _, b_new = _cell(gates_input, gates_hidden, hidden, stride_i, stride_g, stride_h, o_row, o_u, m, units)
    # h' and normed [ROWS, BLOCK_U]; normed is that of h' before it is rounded
    o = o_row[:, None] * units + o_u[None, :]
    tl.store(new + o, b_new.to(new.dtype.element_ty), mask=m)
    b_x, _ = _standardise(b_new, m, units, eps)
    # weight and bias [BLOCK_U]
    b_w = tl.load(weight + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_u, mask=m_u, other=0.0).to(tl.float32)
    tl.store(normed + o, (b_x * b_w[None, :] + b_b[None, :]).to(normed.dtype.element_ty), mask=m)


@triton.jit
def _backward(
    grad_new,
    grad_normed,
    gates_input,
    gates_hidden,
    hidden,
    weight,
    grad_input,
    grad_hidden,
    grad_h,
    parts,
    stride_n,
    stride_o,
    stride_i,
    stride_g,
    stride_h,
    rows,
    units,
    blocks_each,
    eps,
    ROWS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    WITH_NEW: tl.constexpr,
    WITH_NORMED: tl.constexpr,
):
    """Grid: `blocks_each` blocks of ROWS rows a program. parts [2, programs, U]: dweight and dbias of each program."""
    program, o_u = tl.program_id(0), tl.arange(0, BLOCK_U)
    m_u = o_u < units
    if WITH_NORMED:
        # weight [BLOCK_U], kept for all rows; one sum for each row of a block, added up at the end
        b_w = tl.load(weight + o_u, mask=m_u, other=0.0).to(tl.float32)
        b_grad_w = tl.zeros((ROWS, BLOCK_U), dtype=tl.float32)
        b_grad_b = tl.zeros((ROWS, BLOCK_U), dtype=tl.float32)
    # several blocks a program, so that there are few parts of dweight and dbias to add
    for i in range(blocks_each):
        o_row = (program * blocks_each + i) * ROWS + tl.arange(0, ROWS)
        m = (o_row < rows)[:, None] & m_u[None, :]
        o_row = o_row.to(tl.int64)
        b_r, b_z, b_n, b_hn, b_h, b_new = _cell(
            gates_input, gates_hidden, hidden, stride_i, stride_g, stride_h, o_row, o_u, m, units
        )
        # dh' [ROWS, BLOCK_U], directly and through the LayerNorm
        b_grad = tl.zeros((ROWS, BLOCK_U), dtype=tl.float32)
        if WITH_NEW:
            b_grad += tl.load(grad_new + o_row[:, None] * stride_n + o_u[None, :], mask=m, other=0.0).to(tl.float32)
        if WITH_NORMED:
            b_x, b_inverse = _standardise(b_new, m, units, eps)
            b_o = tl.load(grad_normed + o_row[:, None] * stride_o + o_u[None, :], mask=m, other=0.0).to(tl.float32)
            b_grad_w += b_o * b_x
            b_grad_b += b_o
            b_g = b_o * b_w[None, :]
            b_mean, b_along = tl.sum(b_g, 1) / units, tl.sum(b_g * b_x, 1) / units
            b_grad += (b_g - b_mean[:, None] - b_x * b_along[:, None]) * b_inverse
        b_grad_n = b_grad * (1.0 - b_z) * (1.0 - b_n * b_n)
        b_grad_z = b_grad * (b_h - b_n) * b_z * (1.0 - b_z)
        b_grad_r = b_grad_n * b_hn * b_r * (1.0 - b_r)
        # [ROWS, BLOCK_U] to each third of both gates' rows
        tl.store(grad_h + o_row[:, None] * units + o_u[None, :], (b_grad * b_z).to(grad_h.dtype.element_ty), mask=m)
        p_i = grad_input + o_row[:, None] * (3 * units) + o_u[None, :]
        p_g = grad_hidden + o_row[:, None] * (3 * units) + o_u[None, :]
        tl.store(p_i, b_grad_r.to(grad_input.dtype.element_ty), mask=m)
        tl.store(p_g, b_grad_r.to(grad_input.dtype.element_ty), mask=m)
        tl.store(p_i + units, b_grad_z.to(grad_input.dtype.element_ty), mask=m)
        tl.store(p_g + units, b_grad_z.to(grad_input.dtype.element_ty), mask=m)
        tl.store(p_i + 2 * units, b_grad_n.to(grad_input.dtype.element_ty), mask=m)
        tl.store(p_g + 2 * units, (b_grad_n * b_r).to(grad_input.dtype.element_ty), mask=m)
    if WITH_NORMED:
        # [BLOCK_U] twice: no atomics, another kernel adds the parts
        p_parts = parts + program * units + o_u
        tl.store(p_parts, tl.sum(b_grad_w, 0), mask=m_u)
        tl.store(p_parts + tl.num_programs(0) * units, tl.sum(b_grad_b, 0), mask=m_u)


class _Config(NamedTuple):
    rows: int
    num_warps: int


def _forward_config(block_u: int) -> _Config:
    """Eight values a thread: a load is 16 bytes of bfloat16, and a row of 256 is summed within one warp."""
    rows = max(1, 256 // block_u)
    return _Config(rows, rows * block_u // 256)


def _backward_config(block_u: int) -> _Config:
    """Four values a thread, which holds more than twice as many tiles. Two rows of 256, for half as many parts."""
    rows = max(1, 512 // block_u)
    return _Config(rows, rows * block_u // 128)


def forward(
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    new: torch.Tensor,
    normed: torch.Tensor,
) -> None:
    """Fills new = h' in hidden's dtype and normed in the gates', both [M, U]; gates [M, 3U], hidden [M, U]."""
    gates_input, gates_hidden, hidden = (launch.rows_last(t) for t in (gates_input, gates_hidden, hidden))
    rows, units = hidden.shape
    launch.written("new", new, hidden.dtype, (rows, units), hidden.device)
    launch.written("normed", normed, gates_input.dtype, (rows, units), hidden.device)
    block_u = launch.power_of_2(units)
    config = _forward_config(block_u)
    launch.launch(
        _forward,
        (triton.cdiv(rows, config.rows),),
        gates_input,
        gates_hidden,
        hidden,
        weight.contiguous(),
        bias.contiguous(),
        new,
        normed,
        gates_input.stride(0),
        gates_hidden.stride(0),
        hidden.stride(0),
        rows,
        units,
        eps,
        num_warps=config.num_warps,
        num_stages=1,
        ROWS=config.rows,
        BLOCK_U=block_u,
    )


def backward(
    grad_new: torch.Tensor | None,
    grad_normed: torch.Tensor | None,
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad_input: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_h: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
) -> None:
    """Fills the gradients of the gates, hidden, weight and bias from those of new and normed (None: zero)."""
    gates_input, gates_hidden, hidden = (launch.rows_last(t) for t in (gates_input, gates_hidden, hidden))
    grad_new, grad_normed = (None if g is None else launch.rows_last(g) for g in (grad_new, grad_normed))
    rows, units = hidden.shape
    for name, grad, like, shape in (
        ("grad_input", grad_input, gates_input, (rows, 3 * units)),
        ("grad_hidden", grad_hidden, gates_hidden, (rows, 3 * units)),
        ("grad_h", grad_h, hidden, (rows, units)),
        ("grad_weight", grad_weight, weight, (units,)),
        ("grad_bias", grad_bias, weight, (units,)),
    ):
        launch.written(name, grad, like.dtype, shape, hidden.device)
    block_u = launch.power_of_2(units)
    config = _backward_config(block_u)
    blocks = triton.cdiv(rows, config.rows)
    # more programs would hide more latency, but each writes a part that the second kernel has to read
    blocks_each = max(1, triton.cdiv(blocks, 2 * launch.multiprocessors(hidden.device)))
    programs = triton.cdiv(blocks, blocks_each)
    parts = None
    if grad_normed is not None:
        parts = torch.empty((2, programs, units), device=hidden.device, dtype=torch.float32)
    launch.launch(
        _backward,
        (programs,),
        grad_new,
        grad_normed,
        gates_input,
        gates_hidden,
        hidden,
        weight.contiguous(),
        grad_input,
        grad_hidden,
        grad_h,
        parts,
        0 if grad_new is None else grad_new.stride(0),
        0 if grad_normed is None else grad_normed.stride(0),
        gates_input.stride(0),
        gates_hidden.stride(0),
        hidden.stride(0),
        rows,
        units,
        blocks_each,
        eps,
        num_warps=config.num_warps,
        num_stages=1,
        ROWS=config.rows,
        BLOCK_U=block_u,
        WITH_NEW=grad_new is not None,
        WITH_NORMED=grad_normed is not None,
    )
    if parts is None:
        grad_weight.zero_()
        grad_bias.zero_()
        return
    sum_parts(parts, grad_weight, grad_bias)
