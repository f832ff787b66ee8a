"""An addition to the residual stream and the LayerNorm that follows it: `add_norm`.

    sum = x + delta;  normed = (sum − mean) / √(variance + eps) · weight + bias

x, delta [..., D], each of any floating dtype, computed in float32 at least. x and delta get the same gradient. Saved
for the backward pass: sum, or x where nothing is added, weight, and mean and 1 / √(variance + eps) of each row.

A residual stream in bfloat16 loses to each addition what one in float32 keeps, which shows in the gradients behind a
few blocks. A stream may therefore have 24 bits: bfloat16 and `low`, the next eight bits of its mantissa. Forward passes
read and write both; backward passes need the bfloat16 alone, and so does the stream's gradient, which is bfloat16 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spot_kernels import checks, dispatch, inductor_messages
from spot_kernels.reference import add_norm as reference

OPERATOR = "add_norm"
# The widest row that the kernels hold in one tile.
MAX_WIDTH = 4096


class AddNorm(NamedTuple):
    """What `add_norm` returns."""

    sum: torch.Tensor
    normed: torch.Tensor
    low: torch.Tensor | None


def empty_results(
    x: torch.Tensor, delta: torch.Tensor | None, low_of: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum [..., D], normed [..., D], low [..., D], mean and 1 / √(variance + eps) [M], contiguous.

    sum is [0] if nothing is added, low is [0] if it is of nothing.
    """
    nothing, rows = (0,), x.shape[:-1].numel()
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(nothing if delta is None else x.shape, dtype=torch.bfloat16 if low_of == "sum" else x.dtype),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(nothing if low_of is None else x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


def empty_gradients(
    total: torch.Tensor,
    weight: torch.Tensor | None,
    for_x: torch.dtype | None,
    for_delta: torch.dtype | None,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x and delta in the given dtypes, of weight and of bias, contiguous; [0] for the unwanted."""
    of_weight = weight.shape if for_weight and weight is not None else (0,)
    like = total if weight is None else weight
    of_x, of_delta = (
        total.new_empty((0,) if dtype is None else total.shape, dtype=dtype) for dtype in (for_x, for_delta)
    )
    return of_x, of_delta, like.new_empty(of_weight), like.new_empty(of_weight)


@torch.library.custom_op("spot_kernels::add_norm", mutates_args=())
def _forward(
    x: torch.Tensor,
    low: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    low_of: str | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_results(x, delta, low_of, dtype)
    if backend == "triton":
        from spot_kernels.gpu import add_norm as kernels

        kernels.forward(x, low, delta, weight, bias, eps, low_of, *results)
        return results
    with checks.without_autocast(x):
        computed = *reference.add_norm(x, low, delta, weight, bias, eps, low_of, dtype), None, None
        computed = *computed[:3], *reference.statistics(x, low, delta, eps, low_of)
    for result, value in zip(results, computed, strict=True):
        if value is not None and result.shape == value.shape:
            result.copy_(value)
    return results


@_forward.register_fake
def _(x, low, delta, weight, bias, eps, low_of, dtype, backend):
    inductor_messages.shorten()
    return empty_results(x, delta, low_of, dtype)


@torch.library.custom_op("spot_kernels::add_norm_backward", mutates_args=())
def _backward(
    grad_sum: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    for_x: torch.dtype | None,
    for_delta: torch.dtype | None,
    for_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_gradients(total, weight, for_x, for_delta, for_weight)
    if backend == "triton":
        from spot_kernels.gpu import add_norm as kernels

        kernels.backward(grad_sum, grad_normed, total, mean, inverse, weight, *results)
        return results
    with checks.without_autocast(total):
        grad, grad_weight, grad_bias = reference.gradients(grad_sum, grad_normed, total, mean, inverse, weight)
    for result, value in zip(results, (grad, grad, grad_weight, grad_bias), strict=True):
        if result.shape == value.shape:
            result.copy_(value)
    return results


@_backward.register_fake
def _(grad_sum, grad_normed, total, mean, inverse, weight, for_x, for_delta, for_weight, backend):
    return empty_gradients(total, weight, for_x, for_delta, for_weight)


def _save(ctx, inputs, output):
    x, _, delta, weight, _, _, _, _, ctx.backend = inputs
    total, _, _, mean, inverse = output
    ctx.save_for_backward(x if delta is None else total, mean, inverse, weight)
    ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_sum, grad_normed, grad_low, grad_mean, grad_inverse):
    total, mean, inverse, weight = ctx.saved_tensors
    for_x, _, for_delta, for_weight, for_bias = ctx.needs_input_grad[:5]
    grad_sum = None if ctx.delta_dtype is None else grad_sum  # without an addition, sum is an empty stand-in
    grads: list[torch.Tensor | None] = [None] * 9
    if grad_normed is None:
        if grad_sum is not None:
            grads[0] = grad_sum.to(ctx.x_dtype) if for_x else None
            grads[2] = grad_sum.to(ctx.delta_dtype) if for_delta else None
        return tuple(grads)
    # one tensor serves x and delta where they have one dtype
    shared = for_x and for_delta and ctx.delta_dtype == ctx.x_dtype
    grad_x, grad_delta, grad_weight, grad_bias = _backward(
        grad_sum,
        grad_normed,
        total,
        mean,
        inverse,
        weight,
        ctx.x_dtype if for_x else None,
        ctx.delta_dtype if for_delta and not shared else None,
        for_weight or for_bias,
        ctx.backend,
    )
    grads[0] = grad_x if for_x else None
    grads[2] = (grad_x if shared else grad_delta) if for_delta else None
    grads[3], grads[4] = grad_weight if for_weight else None, grad_bias if for_bias else None
    return tuple(grads)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    delta: torch.Tensor | None = None,
    *,
    low: torch.Tensor | None = None,
    low_of: str | None = None,
    dtype: torch.dtype | None = None,
) -> AddNorm:
    """Adds to the residual stream of a pre-norm transformer and normalises the sum for the next layer.

        tokens, normed, _ = add_norm(tokens, norm.weight, norm.bias, norm.eps, delta=attention(normed))

    The kernels take D ≤ 4096; beyond that PyTorch runs.

    Args:
        x: the residual stream [..., D].
        weight, bias: of the LayerNorm [D], both of one dtype, or neither.
        eps: added to the variance.
        delta: what is added to x, of its shape and any floating dtype; None: nothing.
        low: eight more bits of a bfloat16 x, int8 [..., D], as an earlier call has returned them.
        low_of: the result to return in 24 bits, bfloat16 and its low: "sum" or "normed"; None: neither. x is bfloat16
            or float32 then.
        dtype: of normed; None: torch.autocast's where it is enabled, as the next product would cast it, else x's.

    Returns:
        sum [..., D] in x's dtype, or bfloat16 if it has a low; x itself without delta. normed [..., D], from the sum as
        it is stored. low [..., D] of what low_of names (without delta x's own stands for "sum"), or None.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run.
    """
    _check(x, weight, bias, delta, low, low_of)
    if low_of == "normed":
        dtype = torch.bfloat16
    dtype = dtype or checks.autocast_dtype(x)
    if dtype not in checks.FLOATING:
        raise ValueError(f"{OPERATOR}: dtype={dtype}: pass float64, float32, bfloat16 or float16")
    if low_of == "sum" and delta is None:
        low_of = None  # x has its low already
    limit = ""
    if x.shape[-1] > MAX_WIDTH:
        limit = f"x {tuple(x.shape)} is wider than {MAX_WIDTH}"
    elif torch.float64 in (dtype, *(t.dtype for t in (weight, delta) if t is not None)):
        limit = "weight, delta or dtype is float64, which its kernels do not take"
    backend = dispatch.choose(OPERATOR, x, limit)
    if backend == "torch":
        return AddNorm(*reference.add_norm(x, low, delta, weight, bias, eps, low_of, dtype))
    total, normed, new_low, _, _ = _forward(x, low, delta, weight, bias, eps, low_of, dtype, backend)
    if low_of is not None:
        return AddNorm(x if delta is None else total, normed, new_low)
    return AddNorm(x, normed, low) if delta is None else AddNorm(total, normed, None)


def _check(x, weight, bias, delta, low, low_of) -> None:
    checks.floating(OPERATOR, x=x)
    shape = tuple(x.shape)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{OPERATOR}: x {shape} needs a last axis of at least one channel")
    if (weight is None) != (bias is None):
        raise ValueError(f"{OPERATOR}: pass weight and bias, or neither of them")
    if weight is not None:
        checks.floating(OPERATOR, weight=weight, bias=bias)
        checks.shape(OPERATOR, "weight", weight, "[D]", (x.shape[-1],))
        checks.shape(OPERATOR, "bias", bias, "[D]", (x.shape[-1],))
    if delta is not None:
        checks.floating(OPERATOR, delta=delta)
    for name, tensor in (("delta", delta), ("low", low)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{OPERATOR}: {name} {tuple(tensor.shape)} must have the shape of x {shape}")
    for name, tensor in (("weight", weight), ("delta", delta), ("low", low)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{OPERATOR}: {name} is on {tensor.device} but x on {x.device}: move one")
    if low is not None and (low.dtype, x.dtype) != (torch.int8, torch.bfloat16):
        raise ValueError(f"{OPERATOR}: low is {low.dtype} and x {x.dtype}: pass int8 for a bfloat16 x")
    if low_of not in (None, "sum", "normed"):
        raise ValueError(f"{OPERATOR}: low_of={low_of!r} is unknown: use 'sum', 'normed' or None")
    if low_of is not None and x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{OPERATOR}: low_of={low_of!r} needs x in bfloat16 or float32, not {x.dtype}")
