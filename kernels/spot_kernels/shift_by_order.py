"""The decoder's input, every token shifted one step along its patch order: `shift_by_order`.

    out[σ(t)] = tokens[σ(t−1)];  out[σ(0)] = bos

tokens and out [B, N, D] in raster layout, bos [D] or [B, D], of any floating dtype (the kernels take float32, bfloat16
and float16); the order is an int64 tensor, [N] or [B, N]. Only the order is saved for the backward pass. No FLOPs;
2 B N D e bytes forward, with e bytes an element, and as many backward.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import shift_by_order as reference

OPERATOR = "shift_by_order"
_BOS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def empty_gradients(
    grad: torch.Tensor, shared: bool, bos_dtype: torch.dtype, for_tokens: bool, for_bos: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dtokens [B, N, D]; dbos [D] if the samples share bos, else [B, D]. [0] where a gradient is not needed."""
    batch, _, width = grad.shape
    bos_shape = ((width,) if shared else (batch, width)) if for_bos else (0,)
    return grad.new_empty(grad.shape if for_tokens else (0,)), grad.new_empty(bos_shape, dtype=bos_dtype)


@torch.library.custom_op("spot_kernels::shift_by_order", mutates_args=())
def _forward(tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor, backend: str) -> torch.Tensor:
    out = tokens.new_empty(tokens.shape)
    if backend == "triton":
        from spot_kernels.gpu import shift_by_order as kernels

        kernels.forward(tokens, bos, order, out)
        return out
    return out.copy_(reference.shift_by_order(tokens, bos, order))


@_forward.register_fake
def _(tokens, bos, order, backend):
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("spot_kernels::shift_by_order_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    order: torch.Tensor,
    shared: bool,
    bos_dtype: torch.dtype,
    for_tokens: bool,
    for_bos: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_tokens, grad_bos = empty_gradients(grad, shared, bos_dtype, for_tokens, for_bos)
    if backend == "triton":
        from spot_kernels.gpu import shift_by_order as kernels

        kernels.backward(grad, order, grad_tokens if for_tokens else None, grad_bos if for_bos else None)
        return grad_tokens, grad_bos
    of_tokens, of_bos = reference.gradients(grad, order)
    if for_tokens:
        grad_tokens.copy_(of_tokens)
    if for_bos:
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_bos.copy_(of_bos.sum(0, dtype=exact) if shared else of_bos)
    return grad_tokens, grad_bos


@_backward.register_fake
def _(grad, order, shared, bos_dtype, for_tokens, for_bos, backend):
    return empty_gradients(grad, shared, bos_dtype, for_tokens, for_bos)


def _save(ctx, inputs, output):
    _, bos, order, ctx.backend = inputs
    ctx.shared, ctx.bos_dtype = bos.dim() == 1, bos.dtype
    ctx.save_for_backward(order)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad):
    for_tokens, for_bos = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None, None
    tokens, bos = _backward(grad, *ctx.saved_tensors, ctx.shared, ctx.bos_dtype, for_tokens, for_bos, ctx.backend)
    return tokens if for_tokens else None, bos if for_bos else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def shift_by_order(
    tokens: torch.Tensor, bos: torch.Tensor, order: torch.Tensor, *, check: bool | None = None
) -> torch.Tensor:
    """The decoder's input: every token receives the features of its predecessor in `order` (SPOT, section 3.3).

    Args:
        tokens: [B, N, D] in raster layout, of any floating dtype.
        bos: what the first token of the order receives, [D] or one per sample [B, D]; its dtype may differ.
        order: a permutation of 0…N−1 as int64 [N], or one per sample [B, N].
        check: as in `permuted_causal_attention`.

    Returns:
        [B, N, D] in raster layout, in tokens' dtype, also under torch.autocast. Gradients have the dtypes of tokens and
        bos; that of a shared bos is summed over samples in float32.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, an order that is not a permutation
            (with `check`), or the requested backend that cannot run.
    """
    checks.shape(OPERATOR, "tokens", tokens, "[B, N, D]")
    batch, count, width = tokens.shape
    if tuple(bos.shape) not in ((width,), (batch, width)):
        raise ValueError(f"{OPERATOR}: bos {tuple(bos.shape)} must be [{width}] or [{batch}, {width}]")
    for name, tensor in (("tokens", tokens), ("bos", bos)):
        if not tensor.is_floating_point():
            raise ValueError(f"{OPERATOR}: {name} is {tensor.dtype}: pass a floating dtype")
    if bos.device != tokens.device:
        raise ValueError(f"{OPERATOR}: bos is on {bos.device} but tokens on {tokens.device}: move one")
    checks.order(OPERATOR, order, batch, count, tokens.device)
    if checks.CHECK_ORDERS if check is None else check:
        checks.permutation(OPERATOR, order)
    limit = f"bos is {bos.dtype}" if bos.dtype not in _BOS_DTYPES else ""
    if not count:
        limit = f"tokens {tuple(tokens.shape)} has no tokens"
    backend = dispatch.choose(OPERATOR, tokens, limit)
    if backend == "torch":
        return reference.shift_by_order(tokens, bos, order)
    return _forward(tokens, bos, order, backend)
