"""Causal self-attention in a given patch order and the decoder's shifted input, both in raster layout.

An order σ lists raster indices in the sequence in which tokens are predicted; rank = σ⁻¹. Tokens never move:

    permuted_causal_attention: token i sees token j iff rank[j] ≤ rank[i]; scale d^-1/2
    shift_by_order:            token σ(t) receives tokens[σ(t−1)], token σ(0) receives bos

The order is an int64 tensor on the tokens' device, [N] for all samples or [B, N] for one each. Floating dtypes:
float64, float32, bfloat16 or float16; the kernels take the last three. Saved for the backward pass: q, k, v, order, out
and the log-sum-exp of each row in two float32 parts; for the shift the order alone.

Work, with e bytes an element: attention forward 2 B H N (N + 1) d FLOPs and 4 B H N d e + 8 B H N bytes (q, k, v, out;
log-sum-exp); backward 5 B H N (N + 1) d FLOPs in the usual count of five products, 7 B H N (N + 1) d as carried out,
where both kernels form the scores and dout vᵀ, and 12 B H N d e + 24 B H N bytes. The order adds 8 bytes a token for
each time that a program walks over it. Shift: no FLOPs, 2 B N D e bytes forward, and as many backward.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import permuted_attention as reference

_ATTENTION, _SHIFT = "permuted_causal_attention", "shift_by_order"
# The widest head that the kernels hold in one tile.
MAX_WIDTH = 128
_SHIFTED = (torch.float32, torch.bfloat16, torch.float16)


def empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, d], a token's heads side by side in memory for whoever merges them; log-sum-exp [B, H, 2, N]."""
    batch, heads, tokens, _ = q.shape
    return _empty_heads(q), q.new_empty((batch, heads, 2, tokens), dtype=torch.float32)


def empty_gradients(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v in the same layout, which is that of the projections they came from."""
    return _empty_heads(q), _empty_heads(q), _empty_heads(q)


def _empty_heads(q: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, width = q.shape
    return q.new_empty((batch, tokens, heads, width)).transpose(1, 2)


@torch.library.custom_op("spot_kernels::permuted_causal_attention", mutates_args=())
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from spot_kernels.gpu import permuted_attention as kernels

        return kernels.forward(q, k, v, order)
    # the reference has no use for the log-sum-exp
    out, lse = empty_results(q)
    with torch.autocast(q.device.type, enabled=False):
        out.copy_(reference.permuted_causal_attention(q, k, v, order))
    return out, lse.zero_()


@_attend.register_fake
def _(q, k, v, order, backend):
    return empty_results(q)


@torch.library.custom_op("spot_kernels::permuted_causal_attention_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from spot_kernels.gpu import permuted_attention as kernels

        return kernels.backward(grad, q, k, v, order, out, lse)
    results = empty_gradients(q)
    with torch.autocast(q.device.type, enabled=False):
        gradients = reference.attention_gradients(grad, q, k, v, order)
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


@_attend_backward.register_fake
def _(grad, q, k, v, order, out, lse, backend):
    return empty_gradients(q)


def _save_attention(ctx, inputs, output):
    q, k, v, order, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, order, *output)
    ctx.set_materialize_grads(False)


def _differentiate_attention(ctx, grad, grad_lse):
    if grad is None:
        return None, None, None, None, None
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


def _refuse_attention(ctx, *gradients):
    raise ValueError(f"{_ATTENTION}: gradients of gradients are not implemented by its kernels: use backend torch")


_attend.register_autograd(_differentiate_attention, setup_context=_save_attention)
_attend_backward.register_autograd(_refuse_attention)


def permuted_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, *, check: bool | None = None
) -> torch.Tensor:
    """Causal self-attention in the order `order` (SPOT, section 3.3).

    The kernels take d ≤ 128; beyond that PyTorch runs.

    Args:
        q, k, v: [B, H, N, d] in raster layout.
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].
        check: whether to look if the order is a permutation, which waits for the device (under torch.compile and in a
            CUDA graph it asserts there instead); by default only where SPOT_KERNELS_CHECK=1 is set. Without it nothing
            is read on the host, and what an order that is none does is undefined: wrong numbers, or reads outside the
            tensors.

    Returns:
        [B, H, N, d] in raster layout, q's dtype. Under torch.autocast the inputs are taken, and the result is given, in
        its dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, an order that is not a permutation
            if `check`, or the backend that was asked for and cannot run.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.floating(_ATTENTION, q=q, k=k, v=v)
    checks.shape(_ATTENTION, "q", q, "[B, H, N, d]")
    checks.shape(_ATTENTION, "k", k, "[B, H, N, d]", q.shape)
    checks.shape(_ATTENTION, "v", v, "[B, H, N, d]", q.shape)
    batch, heads, tokens, width = q.shape
    if heads < 1 or width < 1:
        raise ValueError(f"{_ATTENTION}: q {tuple(q.shape)} needs at least one head and a width of one")
    checks.order(_ATTENTION, order, batch, tokens, q.device)
    if checks.CHECK_ORDERS if check is None else check:
        checks.permutation(_ATTENTION, order)
    limit = f"q {tuple(q.shape)} is wider than {MAX_WIDTH} a head" if width > MAX_WIDTH else ""
    backend = dispatch.choose(_ATTENTION, q, limit)
    if backend == "torch":
        return reference.permuted_causal_attention(q, k, v, order)
    return _attend(q, k, v, order, backend)[0]


@torch.library.custom_op("spot_kernels::shift_by_order", mutates_args=())
def _shift(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor, backend: str) -> torch.Tensor:
    if backend == "triton":
        from spot_kernels.gpu import shift_by_order as kernels

        return kernels.forward(tokens, bos, order)
    return tokens.new_empty(tokens.shape).copy_(reference.shift_by_order(tokens, bos, order))


@_shift.register_fake
def _(tokens, bos, order, backend):
    return tokens.new_empty(tokens.shape)


def _empty_shift_gradients(
    grad: torch.Tensor, shared: bool, bos_dtype: torch.dtype, for_tokens: bool, for_bos: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dtokens [B, N, D], or [0]; dbos [D] if it is shared by the samples, else [B, D], or [0]."""
    batch, _, width = grad.shape
    bos_shape = ((width,) if shared else (batch, width)) if for_bos else (0,)
    return grad.new_empty(grad.shape if for_tokens else (0,)), grad.new_empty(bos_shape, dtype=bos_dtype)


@torch.library.custom_op("spot_kernels::shift_by_order_backward", mutates_args=())
def _shift_backward(
    grad: torch.Tensor,
    order: torch.Tensor,
    shared: bool,
    bos_dtype: torch.dtype,
    for_tokens: bool,
    for_bos: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_tokens, grad_bos = _empty_shift_gradients(grad, shared, bos_dtype, for_tokens, for_bos)
    if backend == "triton":
        from spot_kernels.gpu import shift_by_order as kernels

        kernels.backward(grad, order, grad_tokens if for_tokens else None, grad_bos if for_bos else None)
        return grad_tokens, grad_bos
    for_each_token, for_each_bos = reference.shift_gradients(grad, order)
    if for_tokens:
        grad_tokens.copy_(for_each_token)
    if for_bos:
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_bos.copy_(for_each_bos.sum(0, dtype=exact) if shared else for_each_bos)
    return grad_tokens, grad_bos


@_shift_backward.register_fake
def _(grad, order, shared, bos_dtype, for_tokens, for_bos, backend):
    return _empty_shift_gradients(grad, shared, bos_dtype, for_tokens, for_bos)


def _save_shift(ctx, inputs, output):
    _, bos, order, ctx.backend = inputs
    ctx.shared, ctx.bos_dtype = bos.dim() == 1, bos.dtype
    ctx.save_for_backward(order)
    ctx.set_materialize_grads(False)


def _differentiate_shift(ctx, grad):
    for_tokens, for_bos = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None, None
    tokens, bos = _shift_backward(grad, *ctx.saved_tensors, ctx.shared, ctx.bos_dtype, for_tokens, for_bos, ctx.backend)
    return tokens if for_tokens else None, bos if for_bos else None, None, None


def _refuse_shift(ctx, *gradients):
    raise ValueError(f"{_SHIFT}: gradients of gradients are not implemented by its kernels: use backend torch")


_shift.register_autograd(_differentiate_shift, setup_context=_save_shift)
_shift_backward.register_autograd(_refuse_shift)


def shift_by_order(
    tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor, *, check: bool | None = None
) -> torch.Tensor:
    """The decoder's input: every token receives the features of its predecessor in `order` (SPOT, section 3.3).

    Args:
        tokens: [B, N, D] in raster layout, of any floating dtype (the kernels take float32, bfloat16 and float16).
        bos: what the first token of the order receives, [D] or one per sample [B, D]; its dtype may differ.
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].
        check: as in `permuted_causal_attention`.

    Returns:
        [B, N, D] in raster layout, tokens' dtype, with torch.autocast too. Gradients come in the dtype of tokens and of
        bos; that of a shared bos is summed over samples in float32.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, an order that is not a permutation
            if `check`, or the backend that was asked for and cannot run.
    """
    checks.shape(_SHIFT, "tokens", tokens, "[B, N, D]")
    batch, count, width = tokens.shape
    if tuple(bos.shape) not in ((width,), (batch, width)):
        raise ValueError(f"{_SHIFT}: bos {tuple(bos.shape)} must be [{width}] or [{batch}, {width}]")
    for name, tensor in (("tokens", tokens), ("bos", bos)):
        if not tensor.is_floating_point():
            raise ValueError(f"{_SHIFT}: {name} is {tensor.dtype}: pass a floating dtype")
    if bos.device != tokens.device:
        raise ValueError(f"{_SHIFT}: bos is on {bos.device} but tokens on {tokens.device}: move one")
    checks.order(_SHIFT, order, batch, count, tokens.device)
    if checks.CHECK_ORDERS if check is None else check:
        checks.permutation(_SHIFT, order)
    limit = f"bos is {bos.dtype}" if bos.dtype not in _SHIFTED else ""
    if not count:
        limit = f"tokens {tuple(tokens.shape)} has no tokens"
    backend = dispatch.choose(_SHIFT, tokens, limit)
    if backend == "torch":
        return reference.shift_by_order(tokens, bos, order)
    return _shift(tokens, bos, order, backend)
