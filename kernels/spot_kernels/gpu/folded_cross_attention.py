"""Triton kernels of folded_cross_attention and folded_cross_map.

    s = scale · x aᵀ;  p = softmax over each head's slots of s;  out = p v;  map = mean of p over heads
    dp = do vᵀ + dmap / H;  ds = scale · p (dp − Σ_slots p dp);  dx = ds a;  da = dsᵀ x;  dv = pᵀ do

x and out [B, N, D], a and v [B, H, K, D], map [B, N, K] float32; float32, bfloat16 or float16. Saved for backward: x,
a, v and p in x's dtype.

All heads' slots lie side by side as the columns of one tile, HEADS × SLOTS, each padded to a power of two; at most 128
in all, 64 in float32, whose products without tensor cores need more registers. So the logits of a block of tokens are
one product that reads x once, the softmax of a row is complete in one step, and the output of all heads is one product,
too: it is written once, already summed over the heads. p and ds are [B, N, columns] with zeros in the padding: rows of
whole 16-byte words, a twelfth of x for six heads of seven slots.

Forward and the gradient of x: a program takes a block of tokens of one sample. It sums its logits (or dp) over tiles of
channels, then spreads p (or ds) over tiles of channels. Both kernels do the same work on other operands. a and v of a
sample are read by all its programs, so they come from the cache.
Gradients of a and v: a program takes a tile of channels of one sample and walks over all tokens, so that both sums stay
in registers: no atomics, the same bits at every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spot_kernels.gpu import launch

_LOG2_E = 1.4426950408889634


@triton.jit
def _columns(p_rows, stride_h, stride_k, heads, slots, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """Pointers to the row of each column [HEADS · SLOTS], and which of them are there."""
    o_c = tl.arange(0, HEADS * SLOTS)
    o_h, o_k = o_c // SLOTS, o_c % SLOTS
    return p_rows + o_h.to(tl.int64) * stride_h + o_k.to(tl.int64) * stride_k, (o_h < heads) & (o_k < slots)


@triton.jit
def _products(
    p_x,
    p_a,
    m_x,
    m_a,
    width,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x aᵀ [BLOCK_N, COLUMNS] over the whole width; p_x and p_a point at the rows."""
    b_s = tl.zeros((BLOCK_N, COLUMNS), dtype=tl.float32)
    # BLOCK_D channels of both at a time
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        # [BLOCK_N, BLOCK_D], [COLUMNS, BLOCK_D]
        b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0)
        b_a = tl.load(p_a[:, None] + o_d[None, :], mask=m_a[:, None] & m_d[None, :], other=0.0)
        if WIDEN:
            b_x, b_a = b_x.to(tl.float32), b_a.to(tl.float32)
        b_s = tl.dot(b_x, tl.trans(b_a), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _spread(b_p, p_v, p_out, m_v, m_out, width, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """Writes p v [BLOCK_N, width], of p [BLOCK_N, COLUMNS]; p_v and p_out point at the rows."""
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        # [COLUMNS, BLOCK_D]
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_v[:, None] & m_d[None, :], other=0.0)
        if WIDEN:
            b_v = b_v.to(tl.float32)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION).to(p_out.dtype.element_ty)
        tl.store(p_out[:, None] + o_d[None, :], b_out, mask=m_out[:, None] & m_d[None, :])


@triton.jit
def _forward(
    x,
    a,
    v,
    out,
    mean_map,
    saved,
    stride_xb,
    stride_xn,
    stride_ab,
    stride_ah,
    stride_ak,
    stride_vb,
    stride_vh,
    stride_vk,
    heads,
    tokens,
    slots,
    width,
    blocks,
    rows,
    scale_log2,
    map_scale,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_MAP: tl.constexpr,
    SAVE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: batch × blocks of `rows` ≤ BLOCK_N tokens."""
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    o_row = tl.arange(0, BLOCK_N)
    o_n = (pid % blocks) * rows + o_row
    m_n = (o_row < rows) & (o_n < tokens)
    o_n = o_n.to(tl.int64)
    p_x = x + batch * stride_xb + o_n * stride_xn
    p_a, m_c = _columns(a + batch * stride_ab, stride_ah, stride_ak, heads, slots, HEADS, SLOTS)
    b_s = _products(p_x, p_a, m_n, m_c, width, BLOCK_N, HEADS * SLOTS, BLOCK_D, WIDEN, PRECISION)
    # softmax over the last axis of [BLOCK_N, HEADS, SLOTS]
    o_h, o_k = tl.arange(0, HEADS), tl.arange(0, SLOTS)
    b_s = tl.where((o_k < slots)[None, None, :], tl.reshape(b_s, (BLOCK_N, HEADS, SLOTS)), float("-inf"))
    # subtract the maximum before scaling: differences of large logits are exact, their scaled values are not. exp2 is
    # one instruction, and log2 e is in the scale
    b_e = tl.exp2((b_s - tl.max(b_s, 2, keep_dims=True)) * scale_log2)
    # heads of the padding have logits of 0, and must not add to the map
    b_p = tl.where((o_h < heads)[None, :, None], b_e / tl.sum(b_e, 2, keep_dims=True), 0.0)
    if WITH_MAP:
        # [BLOCK_N, SLOTS]
        p_map = mean_map + (batch * tokens + o_n[:, None]) * slots + o_k[None, :]
        tl.store(p_map, tl.sum(b_p, 1) * map_scale, mask=m_n[:, None] & (o_k < slots)[None, :])
    b_p = tl.reshape(b_p, (BLOCK_N, HEADS * SLOTS))
    if SAVE:
        p_saved = saved + (batch * tokens + o_n[:, None]) * (HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)[None, :]
        tl.store(p_saved, b_p.to(saved.dtype.element_ty), mask=m_n[:, None])
    if WITH_OUT:
        p_v, m_c = _columns(v + batch * stride_vb, stride_vh, stride_vk, heads, slots, HEADS, SLOTS)
        p_out = out + (batch * tokens + o_n) * width
        _spread(b_p, p_v, p_out, m_c, m_n, width, BLOCK_D, WIDEN, PRECISION)


@triton.jit
def _backward_tokens(
    grad_out,
    grad_map,
    a,
    v,
    saved,
    grad_s,
    grad_x,
    stride_gb,
    stride_gn,
    stride_mb,
    stride_mn,
    stride_mk,
    stride_ab,
    stride_ah,
    stride_ak,
    stride_vb,
    stride_vh,
    stride_vk,
    heads,
    tokens,
    slots,
    width,
    blocks,
    rows,
    scale,
    map_scale,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WITH_MAP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ds [B, N, columns] and dx. Grid: batch × blocks of `rows` ≤ BLOCK_N tokens."""
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    o_row, o_k, o_c = tl.arange(0, BLOCK_N), tl.arange(0, SLOTS), tl.arange(0, HEADS * SLOTS)
    o_n = (pid % blocks) * rows + o_row
    m_n = (o_row < rows) & (o_n < tokens)
    o_n = o_n.to(tl.int64)
    o_saved = (batch * tokens + o_n[:, None]) * (HEADS * SLOTS) + o_c[None, :]
    # p [BLOCK_N, COLUMNS], zero in the padding, so that ds is zero there, too
    b_p = tl.load(saved + o_saved, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_p = tl.reshape(b_p, (BLOCK_N, HEADS, SLOTS))
    # p was rounded: with sums over slots of 1 again, what is common to all dp of a head cancels below
    b_p = b_p / tl.maximum(tl.sum(b_p, 2, keep_dims=True), 1e-30)
    # dp [BLOCK_N, HEADS, SLOTS] from the output and from the map
    b_grad_p = tl.zeros((BLOCK_N, HEADS, SLOTS), dtype=tl.float32)
    if WITH_OUT:
        p_g = grad_out + batch * stride_gb + o_n * stride_gn
        p_v, m_c = _columns(v + batch * stride_vb, stride_vh, stride_vk, heads, slots, HEADS, SLOTS)
        b_s = _products(p_g, p_v, m_n, m_c, width, BLOCK_N, HEADS * SLOTS, BLOCK_D, WIDEN, PRECISION)
        b_grad_p = tl.reshape(b_s, (BLOCK_N, HEADS, SLOTS))
    if WITH_MAP:
        # dmap [BLOCK_N, SLOTS], the same for all heads
        p_map = grad_map + batch * stride_mb + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk
        b_map = tl.load(p_map, mask=m_n[:, None] & (o_k < slots)[None, :], other=0.0)
        b_grad_p += (b_map.to(tl.float32) * map_scale)[:, None, :]
    b_grad_s = b_p * (b_grad_p - tl.sum(b_p * b_grad_p, 2, keep_dims=True)) * scale
    # rounded once: dx and da are made of the same numbers
    b_grad_s = tl.reshape(b_grad_s, (BLOCK_N, HEADS * SLOTS)).to(grad_s.dtype.element_ty)
    tl.store(grad_s + o_saved, b_grad_s, mask=m_n[:, None])
    p_a, m_c = _columns(a + batch * stride_ab, stride_ah, stride_ak, heads, slots, HEADS, SLOTS)
    p_grad_x = grad_x + (batch * tokens + o_n) * width
    _spread(b_grad_s, p_a, p_grad_x, m_c, m_n, width, BLOCK_D, WIDEN, PRECISION)


@triton.jit
def _backward_slots(
    x,
    grad_out,
    saved,
    grad_s,
    grad_a,
    grad_v,
    stride_xb,
    stride_xn,
    stride_gb,
    stride_gn,
    batches,
    heads,
    tokens,
    slots,
    width,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_OUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da and dv, laid out as [H, B, K, D]. Grid: batch, tiles of BLOCK_D channels."""
    batch = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, HEADS * SLOTS), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_grad_a = tl.zeros((HEADS * SLOTS, BLOCK_D), dtype=tl.float32)
    if WITH_OUT:
        b_grad_v = tl.zeros((HEADS * SLOTS, BLOCK_D), dtype=tl.float32)
    # all tokens of the sample, BLOCK_N at a time, always in the same order
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        m_token = m_n[:, None] & m_d[None, :]
        o_n = o_n.to(tl.int64)
        o_saved = (batch * tokens + o_n[:, None]) * (HEADS * SLOTS) + o_c[None, :]
        # ds [BLOCK_N, COLUMNS] and x [BLOCK_N, BLOCK_D]
        b_s = tl.load(grad_s + o_saved, mask=m_n[:, None], other=0.0)
        b_x = tl.load(x + batch * stride_xb + o_n[:, None] * stride_xn + o_d[None, :], mask=m_token, other=0.0)
        if WIDEN:
            b_s, b_x = b_s.to(tl.float32), b_x.to(tl.float32)
        b_grad_a = tl.dot(tl.trans(b_s), b_x, b_grad_a, input_precision=PRECISION)
        if WITH_OUT:
            # p [BLOCK_N, COLUMNS] and do [BLOCK_N, BLOCK_D]
            b_p = tl.load(saved + o_saved, mask=m_n[:, None], other=0.0)
            p_g = grad_out + batch * stride_gb + o_n[:, None] * stride_gn + o_d[None, :]
            b_g = tl.load(p_g, mask=m_token, other=0.0)
            if WIDEN:
                b_p, b_g = b_p.to(tl.float32), b_g.to(tl.float32)
            b_grad_v = tl.dot(tl.trans(b_p), b_g, b_grad_v, input_precision=PRECISION)
    o_h, o_k = o_c // SLOTS, o_c % SLOTS
    m_row = ((o_h < heads) & (o_k < slots))[:, None] & m_d[None, :]
    o_row = ((o_h.to(tl.int64) * batches + batch) * slots + o_k)[:, None] * width + o_d[None, :]
    tl.store(grad_a + o_row, b_grad_a.to(grad_a.dtype.element_ty), mask=m_row)
    if WITH_OUT:
        tl.store(grad_v + o_row, b_grad_v.to(grad_v.dtype.element_ty), mask=m_row)


class _Config(NamedTuple):
    """Tokens of a block, channels of a tile."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def _forward_config(architecture: str, dtype: torch.dtype, columns: int) -> _Config:
    if dtype == torch.float32:
        # without tensor cores a product keeps rows of its operands in registers, so they have to be short
        return _Config(32, 32, 4 if columns <= 32 else 8, 1)
    if architecture == "gfx942":
        return _Config(64, 64, 4, 1)
    if architecture in ("sm_80", "sm_89"):
        return _Config(64 if columns <= 64 else 32, 64, 4, 3)
    # 64 tokens: the least for a warp group's product on sm_90. 196 of them in four blocks of 49 are two programs on
    # each of 128 multiprocessors at batch 64, all at once
    return _Config(64, 128 if columns <= 64 else 64, 4, 3)


def _tokens_config(architecture: str, dtype: torch.dtype, columns: int) -> _Config:
    if dtype == torch.float32:
        return _Config(16, 16, 4, 1)
    return _forward_config(architecture, dtype, columns)


def _slots_config(architecture: str, dtype: torch.dtype, columns: int) -> _Config:
    if dtype == torch.float32:
        return _Config(16, 32, 4 if columns <= 32 else 8, 1)
    if architecture == "gfx942":
        return _Config(32, 64, 4, 1)
    # both sums fill 2 × columns × block_d float32 registers of a program
    return _Config(32, 64, 8, 3) if columns > 64 else _Config(32, 128, 8, 3)


class _Problem(NamedTuple):
    """Sizes of a call and of its tiles."""

    batch: int
    heads: int
    tokens: int
    slots: int
    width: int
    tile_heads: int
    tile_slots: int

    @property
    def columns(self) -> int:
        return self.tile_heads * self.tile_slots

    def blocks(self, block_n: int) -> tuple[int, int]:
        """Blocks of tokens, and the tokens of each: as equal as can be, since the largest one decides the time."""
        blocks = max(1, triton.cdiv(self.tokens, block_n))
        return blocks, triton.cdiv(self.tokens, blocks)


def _problem(x: torch.Tensor, a: torch.Tensor) -> _Problem:
    batch, heads, slots, width = a.shape
    tile_heads, tile_slots = launch.power_of_2(heads, 1), launch.power_of_2(slots, 1)
    # at least 16 columns, the least of a product
    return _Problem(batch, heads, x.shape[1], slots, width, tile_heads, max(tile_slots, 16 // tile_heads))


def _options(problem: _Problem, config: _Config, device: torch.device) -> dict:
    """What all launches share of their compile-time constants and options."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "BLOCK_N": config.block_n,
        "HEADS": problem.tile_heads,
        "SLOTS": problem.tile_slots,
        "BLOCK_D": min(config.block_d, launch.power_of_2(problem.width)),
        "WIDEN": launch.widen(device),
        "PRECISION": launch.float32_precision(device),
    }


def forward(
    x: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None,
    mean_map: torch.Tensor | None,
    saved: torch.Tensor | None,
) -> None:
    """Fills out [B, N, D], mean_map [B, N, K] float32 and saved [B, N, columns] of x [B, N, D], a and v [B, H, K, D].

    Results are contiguous; each may be None; v is None without `out`.
    """
    x, a, v = launch.rows_last(x), launch.rows_last(a), None if v is None else launch.rows_last(v)
    problem = _problem(x, a)
    batch, heads, tokens, slots, width = problem[:5]
    if out is not None:
        launch.written("out", out, x.dtype, tuple(x.shape), x.device)
    if mean_map is not None:
        launch.written("map", mean_map, torch.float32, (batch, tokens, slots), x.device)
    if saved is not None:
        launch.written("p", saved, x.dtype, (batch, tokens, problem.columns), x.device)
    config = _forward_config(launch.architecture(x.device), x.dtype, problem.columns)
    blocks, rows = problem.blocks(config.block_n)
    launch.launch(
        _forward,
        (batch * blocks if tokens else 0,),
        x,
        a,
        v,
        out,
        mean_map,
        saved,
        *x.stride()[:2],
        *a.stride()[:3],
        *_strides(v),
        heads,
        tokens,
        slots,
        width,
        blocks,
        rows,
        scale * _LOG2_E,
        1 / heads,
        WITH_OUT=out is not None,
        WITH_MAP=mean_map is not None,
        SAVE=saved is not None,
        **_options(problem, config, x.device),
    )


def backward(
    grad_out: torch.Tensor | None,
    grad_map: torch.Tensor | None,
    x: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor | None,
    saved: torch.Tensor,
    scale: float,
    grad_x: torch.Tensor,
    grad_a: torch.Tensor,
    grad_v: torch.Tensor | None,
) -> None:
    """Fills the gradients of x, a and v from those of out and map (None: zero); saved: p as `forward` left it.

    Those of a and v are laid out as [H, B, K, D]. For the map alone v, grad_out and grad_v are None.
    """
    if grad_out is None and grad_v is not None:
        grad_v.zero_()
    x, a, v = launch.rows_last(x), launch.rows_last(a), None if grad_out is None else launch.rows_last(v)
    grad_out = None if grad_out is None else launch.rows_last(grad_out)
    problem = _problem(x, a)
    batch, heads, tokens, slots, width = problem[:5]
    saved = launch.dense("p", saved, x.dtype, (batch, tokens, problem.columns), x.device)
    launch.written("grad_x", grad_x, x.dtype, tuple(x.shape), x.device)
    for name, grad in (("grad_a", grad_a), ("grad_v", grad_v)):
        if grad is not None:
            launch.written(name, grad.transpose(0, 1), x.dtype, (heads, batch, slots, width), x.device)
    # the interpreter cannot round to bfloat16
    dtype = torch.float32 if launch.widen(x.device) else x.dtype
    grad_s = torch.empty((batch, tokens, problem.columns), dtype=dtype, device=x.device)
    architecture = launch.architecture(x.device)
    config = _tokens_config(architecture, x.dtype, problem.columns)
    blocks, rows = problem.blocks(config.block_n)
    launch.launch(
        _backward_tokens,
        (batch * blocks if tokens else 0,),
        grad_out,
        grad_map,
        a,
        v,
        saved,
        grad_s,
        grad_x,
        *_strides(grad_out)[:2],
        *_strides(grad_map),
        *a.stride()[:3],
        *_strides(v),
        heads,
        tokens,
        slots,
        width,
        blocks,
        rows,
        scale,
        1 / heads,
        WITH_OUT=grad_out is not None,
        WITH_MAP=grad_map is not None,
        **_options(problem, config, x.device),
    )
    config = _slots_config(architecture, x.dtype, problem.columns)
    options = _options(problem, config, x.device)
    launch.launch(
        _backward_slots,
        (batch, triton.cdiv(width, options["BLOCK_D"])),
        x,
        grad_out,
        saved,
        grad_s,
        grad_a,
        grad_v,
        *x.stride()[:2],
        *_strides(grad_out)[:2],
        batch,
        heads,
        tokens,
        slots,
        width,
        WITH_OUT=grad_out is not None,
        **options,
    )


def _strides(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """The first three strides (a fourth, if any, is 1); zeros for an argument that is None."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]
