"""An experiment: all T iterations of slot attention in one kernel, against one launch for each step. Forward only.

    python bench/studies/whole_iterations.py             # check and resources anywhere, times on a GPU

One program per image keeps the slots on the chip through LayerNorm, q projection, attention, GRU and MLP, T times over.
T = 1 is the kernel for one iteration. It would serve where no gradient is needed: evaluation, teachers, and all but
the last iteration of a truncated gradient (`fixed_point`, `bi_level`).

Counted before it was measured, for one iteration at SPOT's shape (64 images, 196 tokens, 7 slots, U = 256, MLP 1024,
bfloat16):

    k and v                    12.8 MB, once each either way; here they may stay in L2 (both fit in 50 MB)
    weights                    (1 + 6 + 8)·U² = 0.98 M values, 2.0 MB: separate products read them once (0.5 µs at
                               4.3 TB/s); here every program reads all of them, 126 MB from L2. One multiprocessor takes
                               about 64 bytes a cycle, 115 GB/s: 17 µs, whatever the batch, as only 64 of 132 run
    products                   rows of one image fill 7 of a tile's 16, against 448 of 448
    launches saved             7 of 8 (q, attention, two gate products, gru_norm, two MLP products, residual add), about
                               2 µs each in a captured graph, so 14 µs

So it should lose or draw with 64 images, and win only where launches dominate and weights are few (small U). The
library therefore ships the fused attention step and gru_norm, with the products left to the vendor's library.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("kernels", "bench")]

from spot_kernels import SlotAttention, use_backend
from spot_kernels.gpu.launch import float32_precision, launch, power_of_2, widen


@triton.jit
def _product(a, weight, o_in, o_out, m_in, m_out, WIDTH, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """a [K, IN] times rows o_out of a weight [outputs, WIDTH], transposed: [K, OUT] in float32."""
    b_w = tl.load(weight + o_out[None, :] * WIDTH + o_in[:, None], mask=m_in[:, None] & m_out[None, :], other=0.0)
    if WIDEN:
        b_w = b_w.to(tl.float32)
    return tl.dot(a.to(b_w.dtype), b_w, input_precision=PRECISION)


@triton.jit
def _normalise(x, weight, bias, o_u, m_u, U, eps):
    mean = tl.sum(x, 1) / U
    centred = tl.where(m_u[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / U + eps)
    b_w = tl.load(weight + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_u, mask=m_u, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * b_w[None, :] + b_b[None, :]


@triton.jit
def slot_iterations_kernel(
    k,
    v,
    slots,
    scratch,
    out,
    w_q,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    w_1,
    b_1,
    w_2,
    b_2,
    ln_w,
    ln_b,
    mlp_w,
    mlp_b,
    N,
    K,
    U,
    HIDDEN,
    eps,
    ln_eps,
    T,
    K_PAD: tl.constexpr,
    U_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k, v [B, N, U] and slots [B, K, U] contiguous; scratch [B, 2, K, U]: q, and the slots between GRU and MLP."""
    image = tl.program_id(0).to(tl.int64)
    o_k, o_u, o_n, o_c = tl.arange(0, K_PAD), tl.arange(0, U_PAD), tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    m_k, m_u = o_k < K, o_u < U
    m_slot = m_k[:, None] & m_u[None, :]
    p_slot = o_k[:, None] * U + o_u[None, :]
    p_q = scratch + image * 2 * K * U
    p_h = p_q + K * U
    p_out = out + image * K * U
    k += image * N * U
    v += image * N * U
    b_slots = tl.load(slots + image * K * U + p_slot, mask=m_slot, other=0.0)
    tl.store(p_out + p_slot, b_slots, mask=m_slot)
    for _ in range(0, T):
        normed = _normalise(b_slots, ln_w, ln_b, o_u, m_u, U, ln_eps)
        # A tile in registers cannot be written piece by piece: q goes through scratch, which stays in the cache.
        for start in range(0, U, CHUNK):
            columns = start + o_c
            m_c = columns < U
            q_c = _product(normed, w_q, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            tl.store(p_q + o_k[:, None] * U + columns[None, :], q_c, mask=m_k[:, None] & m_c[None, :])
        tl.debug_barrier()
        b_q = tl.load(p_q + p_slot, mask=m_slot, other=0.0)

        acc = tl.zeros((K_PAD, U_PAD), tl.float32)
        sums = tl.zeros((K_PAD,), tl.float32)
        for start in range(0, N, BLOCK_N):
            tokens = start + o_n
            m_n = tokens < N
            p_tokens = tokens[:, None] * U + o_u[None, :]
            b_k = tl.load(k + p_tokens, mask=m_n[:, None] & m_u[None, :], other=0.0)
            b_v = tl.load(v + p_tokens, mask=m_n[:, None] & m_u[None, :], other=0.0)
            if WIDEN:
                b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
            logits = tl.dot(b_k, tl.trans(b_q).to(b_k.dtype), input_precision=PRECISION)
            logits = tl.where(m_k[None, :], logits, float("-inf"))
            a = tl.exp(logits - tl.max(logits, 1)[:, None])
            a = a / tl.sum(a, 1)[:, None] + eps
            a = tl.where(m_n[:, None] & m_k[None, :], a, 0.0)
            sums += tl.sum(a, 0)
            acc += tl.dot(tl.trans(a).to(b_v.dtype), b_v, input_precision=PRECISION)
        updates = acc / tl.where(m_k, sums, 1.0)[:, None]

        for start in range(0, U, CHUNK):
            columns = start + o_c
            m_c = columns < U
            m_kc = m_k[:, None] & m_c[None, :]
            p_kc = o_k[:, None] * U + columns[None, :]
            hidden = tl.load(p_out + p_kc, mask=m_kc, other=0.0)
            i_r = _product(updates, w_ih, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            h_r = _product(b_slots, w_hh, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            i_z = _product(updates, w_ih + U * U, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            h_z = _product(b_slots, w_hh + U * U, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            i_n = _product(updates, w_ih + 2 * U * U, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            h_n = _product(b_slots, w_hh + 2 * U * U, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            bias_r = tl.load(b_ih + columns, mask=m_c, other=0.0) + tl.load(b_hh + columns, mask=m_c, other=0.0)
            bias_z = tl.load(b_ih + U + columns, mask=m_c, other=0.0) + tl.load(b_hh + U + columns, mask=m_c, other=0.0)
            bias_i = tl.load(b_ih + 2 * U + columns, mask=m_c, other=0.0)
            bias_h = tl.load(b_hh + 2 * U + columns, mask=m_c, other=0.0)
            r = tl.sigmoid(i_r + h_r + bias_r[None, :])
            z = tl.sigmoid(i_z + h_z + bias_z[None, :])
            n = 2.0 * tl.sigmoid(2.0 * (i_n + bias_i[None, :] + r * (h_n + bias_h[None, :]))) - 1.0  # tanh
            tl.store(p_h + p_kc, (1.0 - z) * n + z * hidden, mask=m_kc)
        tl.debug_barrier()
        b_slots = tl.load(p_h + p_slot, mask=m_slot, other=0.0)

        normed = _normalise(b_slots, mlp_w, mlp_b, o_u, m_u, U, ln_eps)
        for start in range(0, HIDDEN, CHUNK):
            columns = start + o_c
            m_c = columns < HIDDEN
            bias = tl.load(b_1 + columns, mask=m_c, other=0.0)
            inner = _product(normed, w_1, o_u, columns, m_u, m_c, U, WIDEN, PRECISION)
            inner = tl.maximum(inner + bias[None, :], 0.0)
            b_slots += _product(inner, w_2, columns, o_u, m_c, m_u, HIDDEN, WIDEN, PRECISION)
        b_slots += tl.load(b_2 + o_u, mask=m_u, other=0.0)[None, :]
        b_slots = tl.where(m_slot, b_slots, 0.0)
        tl.store(p_out + p_slot, b_slots, mask=m_slot)
        tl.debug_barrier()


def slot_iterations(module: SlotAttention, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`module.iterations` iterations on k (scaled), v [B, N, U] and slots [B, K, U]: the refined slots in float32.

    One head, GRU and ReLU MLP, as SPOT's; weights are used in k's dtype.
    """
    batch, tokens, width = k.shape
    num_slots = slots.shape[1]
    slots = slots.float().contiguous()
    scratch = torch.empty(batch, 2, num_slots, width, device=k.device)
    out = torch.empty_like(slots)
    gru, first, last = module.gru, module.mlp[0], module.mlp[2]
    weights = [w.detach().to(k.dtype) for w in (module.project_q.weight, gru.weight_ih, gru.weight_hh)]
    launch(
        slot_iterations_kernel,
        (batch,),
        k.contiguous(),
        v.contiguous(),
        slots,
        scratch,
        out,
        *weights,
        gru.bias_ih,
        gru.bias_hh,
        first.weight.detach().to(k.dtype),
        first.bias,
        last.weight.detach().to(k.dtype),
        last.bias,
        module.norm_slots.weight,
        module.norm_slots.bias,
        module.norm_mlp.weight,
        module.norm_mlp.bias,
        tokens,
        num_slots,
        width,
        first.out_features,
        module.eps,
        module.norm_slots.eps,
        module.iterations,
        K_PAD=power_of_2(num_slots),
        U_PAD=power_of_2(width),
        BLOCK_N=32,
        CHUNK=32,
        WIDEN=widen(k.device),
        PRECISION=float32_precision(k.device),
        num_warps=8,
        num_stages=1,
    )
    return out


def inputs(batch: int, tokens: int, num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """A module of SPOT's kind in float32, and k, v, slots for it."""
    generator = torch.Generator().manual_seed(0)
    module = SlotAttention(width, width, mlp_hidden=4 * width).to(device).requires_grad_(False)
    k, v = (torch.randn(batch, tokens, width, generator=generator).to(device, dtype) for _ in range(2))
    return module, k * width**-0.5, v, torch.randn(batch, num_slots, width, generator=generator).to(device)


def step_by_step(module: SlotAttention, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The same with the library's operators, a launch or more for each."""
    for _ in range(module.iterations):
        slots = module._refine(k[:, None], v[:, None], slots, last=False)[0]
    return slots


def error(
    batch: int, tokens: int, num_slots: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Relative error (norms) of the kernel and of plain PyTorch in `dtype`, both against float64."""
    module, k, v, slots = inputs(batch, tokens, num_slots, width, dtype, device)
    with use_backend("torch"):
        exact = step_by_step(module.double(), k.double(), v.double(), slots.double())
        module.float()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            plain = step_by_step(module, k, v, slots)
    slots_of = slot_iterations(module, k, v, slots)
    return tuple(float((x.double() - exact).norm() / exact.norm()) for x in (slots_of, plain))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("no GPU: the check runs in tests/bench/test_whole_iterations.py, the times need one")
        return
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, bfloat16, 196 tokens, 7 slots of 256, 3 iterations, replayed as graphs")
    print("batch  error: kernel, PyTorch    µs: one kernel, step by step")
    for batch in (1, 8, 64, 256):
        ours, plain = error(batch, 196, 7, 256, torch.bfloat16, device)
        module, k, v, slots = inputs(batch, 196, 7, 256, torch.bfloat16, device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            calls = [functools.partial(run, module, k, v, slots) for run in (slot_iterations, step_by_step)]
            times = [1000 * triton.testing.do_bench_cudagraph(call, rep=200, return_mode="median") for call in calls]
        shown = f"{times[0]:8.1f} {times[1]:8.1f}" if ours <= 2 * plain else "FAILED"
        print(f"{batch:5d}  {ours:.2e} {plain:.2e}  {shown}")


if __name__ == "__main__":
    main()
