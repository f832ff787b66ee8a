"""A linear layer with a ReLU, `linear_relu`: out = relu(x Wᵀ + b).

x [M, I], weight W [O, I], bias b [O]; float64, float32, bfloat16 or float16. On a GPU bias and ReLU are the epilogue of
the product, so that the sums before the ReLU are never written. Saved for the backward pass: x, W and out; where out is
positive, so were they:

    ds = dout where out > 0, else 0;  db = Σ_rows ds                   one kernel, which reads dout and out once
    dx = ds W;  dW = dsᵀ x                                             products of PyTorch
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import linear_relu as reference

OPERATOR = "linear_relu"


def empty_result(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """out [M, O], contiguous."""
    return x.new_empty((x.shape[0], weight.shape[0]))


def empty_gradients(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ds [M, O] and db [O], contiguous."""
    return out.new_empty(out.shape), out.new_empty(out.shape[1:])


@torch.library.custom_op("spot_kernels::linear_relu", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, backend: str) -> torch.Tensor:
    out = empty_result(x, weight)
    with checks.without_autocast(x):
        if backend == "triton":
            from spot_kernels.gpu import linear_relu as kernels

            kernels.forward(x, weight, bias, out)
        else:
            out.copy_(reference.linear_relu(x, weight, bias))
    return out


@_forward.register_fake
def _(x, weight, bias, backend):
    return empty_result(x, weight)


@torch.library.custom_op("spot_kernels::linear_relu_backward", mutates_args=())
def _backward(grad: torch.Tensor, out: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_gradients(out)
    if backend == "triton":
        from spot_kernels.gpu import linear_relu as kernels

        kernels.backward(grad, out, *results)
        return results
    for result, value in zip(results, reference.gradients(grad, out), strict=True):
        result.copy_(value)
    return results


@_backward.register_fake
def _(grad, out, backend):
    return empty_gradients(out)


def _save(ctx, inputs, output):
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad):
    if grad is None:
        return (None,) * 4
    x, weight, out = ctx.saved_tensors
    grad_sum, grad_bias = _backward(grad, out, ctx.backend)
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    return (
        grad_sum @ weight if of_x else None,
        grad_sum.t() @ x if of_weight else None,
        grad_bias if of_bias else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def linear_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """relu(x Wᵀ + b), the first half of an MLP.

    Differentiable in all three. Under torch.autocast they are cast to its dtype, as torch.nn.functional.linear does.

    Args:
        x: inputs [..., I] with at least one axis before the last.
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run (`spot_kernels.dispatch`); for a gradient of a gradient on any backend but torch.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.floating(OPERATOR, x=x, weight=weight, bias=bias)
    checks.shape(OPERATOR, "weight", weight, "[O, I]")
    outputs, inputs = weight.shape
    before = max(x.dim() - 1, 1)
    checks.shape(OPERATOR, "x", x, f"[{'…, ' * before}I]", (*[None] * before, inputs))
    checks.shape(OPERATOR, "bias", bias, "[O]", (outputs,))
    backend = dispatch.choose(OPERATOR, x)
    if backend == "torch":
        return reference.linear_relu(x, weight, bias)
    return _forward(x.flatten(0, -2), weight, bias, backend).view(*x.shape[:-1], outputs)
