"""The elementwise part of a GRU cell and the LayerNorm of its result, between two products: `gru_norm`.

    r, z = σ(i_r + h_r), σ(i_z + h_z);  n = tanh(i_n + r h_n);  h' = (1 − z) n + z h;  normed = LayerNorm(h')

gates_input i and gates_hidden h_· [M, 3U] in the order r, z, n; hidden h [M, U]; float64, float32, bfloat16 or float16,
computed in float32 at least. Saved for the backward pass: the gates, hidden and weight, from which it computes the cell
again.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import gru_norm as reference

OPERATOR = "gru_norm"
# The widest row that the kernels hold in one tile.
MAX_UNITS = 1024


def empty_results(gates_input: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h' and normed [M, U], contiguous."""
    return hidden.new_empty(hidden.shape), gates_input.new_empty(hidden.shape)


def empty_gradients(
    gates_input: torch.Tensor, gates_hidden: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gates_input, gates_hidden, hidden, weight and bias, contiguous."""
    return tuple(t.new_empty(t.shape) for t in (gates_input, gates_hidden, hidden, weight, weight))


@torch.library.custom_op("spot_kernels::gru_norm", mutates_args=())
def _forward(
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_results(gates_input, hidden)
    if backend == "triton":
        from spot_kernels.gpu import gru_norm as kernels

        kernels.forward(gates_input, gates_hidden, hidden, weight, bias, eps, *results)
        return results
    with checks.without_autocast(hidden):
        computed = reference.gru_norm(gates_input, gates_hidden, hidden, weight, bias, eps)
    for result, value in zip(results, computed, strict=True):
        result.copy_(value)
    return results


@_forward.register_fake
def _(gates_input, gates_hidden, hidden, weight, bias, eps, backend):
    return empty_results(gates_input, hidden)


@torch.library.custom_op("spot_kernels::gru_norm_backward", mutates_args=())
def _backward(
    grad_new: torch.Tensor | None,
    grad_normed: torch.Tensor | None,
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_gradients(gates_input, gates_hidden, hidden, weight)
    if backend == "triton":
        from spot_kernels.gpu import gru_norm as kernels

        kernels.backward(grad_new, grad_normed, gates_input, gates_hidden, hidden, weight, eps, *results)
        return results
    with checks.without_autocast(hidden):
        computed = reference.gradients(grad_new, grad_normed, gates_input, gates_hidden, hidden, weight, eps)
    for result, value in zip(results, computed, strict=True):
        result.copy_(value)
    return results


@_backward.register_fake
def _(grad_new, grad_normed, gates_input, gates_hidden, hidden, weight, eps, backend):
    return empty_gradients(gates_input, gates_hidden, hidden, weight)


def _save(ctx, inputs, output):
    gates_input, gates_hidden, hidden, weight, _, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(gates_input, gates_hidden, hidden, weight)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_new, grad_normed):
    if grad_new is None and grad_normed is None:
        return (None,) * 7
    return *_backward(grad_new, grad_normed, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def gru_norm(
    gates_input: torch.Tensor,
    gates_hidden: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The elementwise part of a GRU cell and the LayerNorm of its result (Slot Attention, algorithm 1, lines 8-9).

    torch.autocast changes nothing: everything is computed in float32 at least. The kernels take U ≤ 1024; beyond that
    PyTorch runs.

    Args:
        gates_input: W_ih x + b_ih [M, 3U], in the order of torch.nn.GRUCell: r, z, n.
        gates_hidden: W_hh h + b_hh [M, 3U], of the same dtype.
        hidden: h [M, U], of any floating dtype: autocast makes the gates bfloat16 and leaves h in float32.
        weight, bias: of the LayerNorm [U], of one dtype, which may be a third one.
        eps: added to the variance.

    Returns:
        new_hidden h' [M, U] in hidden's dtype; normed [M, U] in the gates' dtype, from h' before it is rounded.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run.
    """
    checks.floating(OPERATOR, gates_input=gates_input, gates_hidden=gates_hidden)
    checks.floating(OPERATOR, hidden=hidden)
    checks.floating(OPERATOR, weight=weight, bias=bias)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.device != gates_input.device:
            raise ValueError(
                f"{OPERATOR}: {name} is on {tensor.device} but gates_input on {gates_input.device}: move one"
            )
    checks.shape(OPERATOR, "hidden", hidden, "[M, U]")
    rows, units = hidden.shape
    if units < 1:
        raise ValueError(f"{OPERATOR}: hidden {tuple(hidden.shape)} needs at least one unit")
    checks.shape(OPERATOR, "gates_input", gates_input, "[M, 3U]", (rows, 3 * units))
    checks.shape(OPERATOR, "gates_hidden", gates_hidden, "[M, 3U]", (rows, 3 * units))
    checks.shape(OPERATOR, "weight", weight, "[U]", (units,))
    checks.shape(OPERATOR, "bias", bias, "[U]", (units,))
    limit = ""
    if units > MAX_UNITS:
        limit = f"hidden {tuple(hidden.shape)} is wider than {MAX_UNITS}"
    elif torch.float64 in (hidden.dtype, weight.dtype):
        limit = f"hidden is {hidden.dtype} and weight {weight.dtype}, which its kernels do not take"
    backend = dispatch.choose(OPERATOR, gates_input, limit)
    if backend == "torch":
        return reference.gru_norm(gates_input, gates_hidden, hidden, weight, bias, eps)
    return _forward(gates_input, gates_hidden, hidden, weight, bias, eps, backend)
