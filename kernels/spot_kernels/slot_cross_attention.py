"""Cross-attention of patch tokens to slots with its head-averaged map, `slot_cross_attention`, or the map alone,
`slot_cross_map`.

    p = softmax over slots of q kᵀ / √d;  out = p v;  map = mean of p over heads

q [B, H, N, d]; k, v [B, H, K, d]; any K ≥ 1; float64, float32, bfloat16 or float16. Saved for the backward pass: q, k
and, where there is one, v.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import slot_cross_attention as reference

OPERATOR, MAP_OPERATOR = "slot_cross_attention", "slot_cross_map"
# The most slots that the kernels hold in one tile.
MAX_SLOTS = 64


def empty_results(q: torch.Tensor, k: torch.Tensor, with_map: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, d] laid out as [B, N, H, d], so that merging heads copies nothing; map [B, N, K], or [0]."""
    batch, _, tokens, _ = q.shape
    shape = (batch, tokens, k.shape[2]) if with_map else (0,)
    return _empty_heads(q), q.new_empty(shape, dtype=torch.float32)


def empty_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and perhaps v, laid out as [B, N or K, H, d] like the projections they flow back to."""
    return tuple(_empty_heads(tensor) for tensor in inputs)


def _empty_heads(like: torch.Tensor) -> torch.Tensor:
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


@torch.library.custom_op("spot_kernels::slot_cross_attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, with_map: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_results(q, k, with_map)
    if backend == "triton":
        from spot_kernels.gpu import slot_cross_attention as kernels

        kernels.forward(q, k, v, results[0], results[1] if with_map else None)
        return results
    with checks.without_autocast(q):
        out, mean_map = reference.slot_cross_attention(q, k, v)
    results[0].copy_(out)
    if with_map:
        results[1].copy_(mean_map)
    return results


@_forward.register_fake
def _(q, k, v, with_map, backend):
    return empty_results(q, k, with_map)


@torch.library.custom_op("spot_kernels::slot_cross_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor | None,
    grad_map: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_gradients(q, k, v)
    if backend == "triton":
        from spot_kernels.gpu import slot_cross_attention as kernels

        kernels.backward(grad_out, grad_map, q, k, v, *results)
        return results
    with checks.without_autocast(q):
        gradients = reference.gradients(grad_out, grad_map, q, k, v)
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


@_backward.register_fake
def _(grad_out, grad_map, q, k, v, backend):
    return empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, ctx.with_map, ctx.backend = inputs
    ctx.save_for_backward(q, k, v)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_map):
    grad_map = grad_map if ctx.with_map else None
    if grad_out is None and grad_map is None:
        return None, None, None, None, None
    return *_backward(grad_out, grad_map, *ctx.saved_tensors, ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


@torch.library.custom_op("spot_kernels::slot_cross_map", mutates_args=())
def _map(q: torch.Tensor, k: torch.Tensor, backend: str) -> torch.Tensor:
    _, mean_map = empty_results(q, k, True)
    if backend == "triton":
        from spot_kernels.gpu import slot_cross_attention as kernels

        kernels.forward(q, k, None, None, mean_map)
        return mean_map
    with checks.without_autocast(q):
        return mean_map.copy_(reference.slot_map(q, k).mean(1))


@_map.register_fake
def _(q, k, backend):
    return empty_results(q, k, True)[1]


@torch.library.custom_op("spot_kernels::slot_cross_map_backward", mutates_args=())
def _map_backward(
    grad_map: torch.Tensor, q: torch.Tensor, k: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_gradients(q, k)
    if backend == "triton":
        from spot_kernels.gpu import slot_cross_attention as kernels

        kernels.backward(None, grad_map, q, k, None, *results, None)
        return results
    with checks.without_autocast(q):
        gradients = reference.gradients(None, grad_map, q, k, k)
    for result, gradient in zip(results, gradients, strict=False):
        result.copy_(gradient)
    return results


@_map_backward.register_fake
def _(grad_map, q, k, backend):
    return empty_gradients(q, k)


def _save_map(ctx, inputs, output):
    q, k, ctx.backend = inputs
    ctx.save_for_backward(q, k)
    ctx.set_materialize_grads(False)


def _differentiate_map(ctx, grad_map):
    if grad_map is None:
        return None, None, None
    return *_map_backward(grad_map, *ctx.saved_tensors, ctx.backend), None


_map.register_autograd(_differentiate_map, setup_context=_save_map)
_map_backward.register_autograd(checks.refuse_second_gradients(MAP_OPERATOR))


def slot_cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_map: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each token attends to all slots (SPOT, section 3.1: the last block's map is the decoder's mask).

    Gradients flow through both results. The kernels take K ≤ 64 slots; beyond that PyTorch runs.

    Args:
        q: token queries [B, H, N, d].
        k, v: slot keys and values [B, H, K, d].
        return_map: whether to return the map; None is returned in its place otherwise.

    Returns:
        out [B, H, N, d] in v's dtype; map [B, N, K], the softmax over slots averaged over heads, float32 (float64 for
        float64 inputs). Under torch.autocast inputs are cast to its dtype, and so is out.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.floating(OPERATOR, q=q, k=k, v=v)
    checks.shape(OPERATOR, "q", q, "[B, H, N, d]")
    batch, heads, _, width = q.shape
    checks.shape(OPERATOR, "k", k, "[B, H, K, d]", (batch, heads, None, width))
    checks.shape(OPERATOR, "v", v, "[B, H, K, d]", k.shape)
    backend = _choose(OPERATOR, q, k)
    if backend == "torch":
        out, mean_map = reference.slot_cross_attention(q, k, v)
    else:
        out, mean_map = _forward(q, k, v, return_map, backend)
    return out, mean_map if return_map else None


def slot_cross_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The map of `slot_cross_attention` alone: reads no v and writes no output.

    A teacher's last block needs nothing else (SPOT, section 3.2). The kernels take K ≤ 64 slots; beyond that PyTorch
    runs.

    Args:
        q: token queries [B, H, N, d].
        k: slot keys [B, H, K, d].

    Returns:
        [B, N, K], the softmax over slots averaged over heads, float32 (float64 for float64 inputs).

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run.
    """
    q, k = checks.autocast(q, k)
    checks.floating(MAP_OPERATOR, q=q, k=k)
    checks.shape(MAP_OPERATOR, "q", q, "[B, H, N, d]")
    checks.shape(MAP_OPERATOR, "k", k, "[B, H, K, d]", (*q.shape[:2], None, q.shape[3]))
    backend = _choose(MAP_OPERATOR, q, k)
    return reference.slot_map(q, k).mean(1) if backend == "torch" else _map(q, k, backend)


def _choose(operator: str, q: torch.Tensor, k: torch.Tensor) -> str:
    heads, slots, width = k.shape[1:]
    if slots < 1 or heads < 1 or width < 1:
        raise ValueError(f"{operator}: k {tuple(k.shape)} needs at least one slot, one head and a width of one")
    limit = f"k {tuple(k.shape)} has more than {MAX_SLOTS} slots" if slots > MAX_SLOTS else ""
    return dispatch.choose(operator, q, limit)
