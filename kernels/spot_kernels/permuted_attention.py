"""Causal self-attention in a given patch order, in raster layout: `permuted_causal_attention`.

An order σ lists raster indices in the sequence in which tokens are predicted; rank = σ⁻¹. Tokens never move: token i
sees token j iff rank[j] ≤ rank[i], with logits scaled by d^-1/2.

q, k, v [B, H, N, d], float64, float32, bfloat16 or float16 (the kernels take the last three). The order is an int64
tensor on their device, [N] for all samples or [B, N] for one each. Saved for the backward pass: q, k, v, order, out and
the log-sum-exp of each row in two float32 parts.

Work, with e bytes an element: forward 2 B H N (N + 1) d FLOPs and 4 B H N d e + 8 B H N bytes (q, k, v, out;
log-sum-exp); backward 5 B H N (N + 1) d FLOPs in the usual count of five products, 7 B H N (N + 1) d as carried out,
because both kernels compute the scores and dout vᵀ, and 12 B H N d e + 24 B H N bytes. The order adds 8 bytes a token
each time a program walks over it.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import permuted_attention as reference

OPERATOR = "permuted_causal_attention"
# The widest head that the kernels hold in one tile.
MAX_WIDTH = 128


def empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, d] laid out as [B, N, H, d], so that merging heads copies nothing; log-sum-exp [B, H, 2, N]."""
    batch, heads, tokens, _ = q.shape
    return _empty_heads(q), q.new_empty((batch, heads, 2, tokens), dtype=torch.float32)


def empty_gradients(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv [B, H, N, d], laid out as [B, N, H, d] like the projections they flow back to."""
    return _empty_heads(q), _empty_heads(q), _empty_heads(q)


def _empty_heads(q: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, width = q.shape
    return q.new_empty((batch, tokens, heads, width)).transpose(1, 2)


@torch.library.custom_op("spot_kernels::permuted_causal_attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = empty_results(q)
    if backend == "triton":
        from spot_kernels.gpu import permuted_attention as kernels

        kernels.forward(q, k, v, order, out, lse)
        return out, lse
    # the reference has no use for the log-sum-exp
    with checks.without_autocast(q):
        out.copy_(reference.permuted_causal_attention(q, k, v, order))
    return out, lse.zero_()


@_forward.register_fake
def _(q, k, v, order, backend):
    return empty_results(q)


@torch.library.custom_op("spot_kernels::permuted_causal_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_gradients(q)
    if backend == "triton":
        from spot_kernels.gpu import permuted_attention_backward as kernels

        kernels.backward(grad, q, k, v, order, out, lse, *results)
        return results
    with checks.without_autocast(q):
        gradients = reference.gradients(grad, q, k, v, order)
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


@_backward.register_fake
def _(grad, q, k, v, order, out, lse, backend):
    return empty_gradients(q)


def _save(ctx, inputs, output):
    q, k, v, order, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, order, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_lse):
    if grad is None:
        return None, None, None, None, None
    return *_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def permuted_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, *, check: bool | None = None
) -> torch.Tensor:
    """Causal self-attention in the order `order` (SPOT, section 3.3).

    The kernels take d ≤ 128; beyond that PyTorch runs.

    Args:
        q, k, v: [B, H, N, d] in raster layout.
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].
        check: whether to check that the order is a permutation, which waits for the device (under torch.compile and in
            a CUDA graph it asserts on the device instead); None: only where SPOT_KERNELS_CHECK=1 is set. Unchecked, an
            order that is not a permutation is undefined behaviour: wrong numbers, or reads outside the tensors.

    Returns:
        [B, H, N, d] in raster layout, in q's dtype. Under torch.autocast inputs are cast to its dtype, and so is the
        result.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, an order that is not a permutation
            (with `check`), or the requested backend that cannot run.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.floating(OPERATOR, q=q, k=k, v=v)
    checks.shape(OPERATOR, "q", q, "[B, H, N, d]")
    checks.shape(OPERATOR, "k", k, "[B, H, N, d]", q.shape)
    checks.shape(OPERATOR, "v", v, "[B, H, N, d]", q.shape)
    batch, heads, tokens, width = q.shape
    if heads < 1 or width < 1:
        raise ValueError(f"{OPERATOR}: q {tuple(q.shape)} needs at least one head and a width of one")
    checks.order(OPERATOR, order, batch, tokens, q.device)
    if checks.CHECK_ORDERS if check is None else check:
        checks.permutation(OPERATOR, order)
    limit = f"q {tuple(q.shape)} is wider than {MAX_WIDTH} a head" if width > MAX_WIDTH else ""
    backend = dispatch.choose(OPERATOR, q, limit)
    if backend == "torch":
        return reference.permuted_causal_attention(q, k, v, order)
    return _forward(q, k, v, order, backend)[0]
