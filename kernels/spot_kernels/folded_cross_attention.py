"""Cross-attention of tokens to a few slots without a product of D × D over the tokens, `folded_cross_attention`, or its
map alone, `folded_cross_map`.

A bias-free attention projects every token twice: to queries W_q x and, behind the weighted sum, by W_o. Both products
commute with the attention, so they can be applied to the slots instead, of which there are far fewer. For head h

    a_h = k_h W_q,h  [K, D],    v_h = values_h W_o,hᵀ  [K, D]                  made by the caller
    p_h = softmax over slots of scale · x a_hᵀ;   out = Σ_h p_h v_h;   map = mean of p over heads

For an image of N tokens the forward pass takes 4 N H K D + 4 K D² FLOPs instead of 4 N D² + 4 N K D: less wherever
H·K is well below D.

x [B, N, D]; a, v [B, H, K, D]; any K ≥ 1 and H ≥ 1; float64, float32, bfloat16 or float16. Saved for the backward pass:
x, a, where there is one v, and p in x's dtype, which is small: heads × slots numbers a token.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import folded_cross_attention as reference
from spot_kernels.reference.slot_cross_attention import accumulation_dtype

OPERATOR, MAP_OPERATOR = "folded_cross_attention", "folded_cross_map"
# The most columns, heads × slots each padded to a power of two, that the kernels hold in one tile: with tensor cores,
# and in float32 without them.
MAX_COLUMNS, MAX_COLUMNS_FLOAT32 = 128, 64


def padded(heads: int, slots: int) -> tuple[int, int]:
    """Heads and slots of the kernels' tile: powers of two, with at least 16 columns in all, the least of a product."""
    tile_heads, tile_slots = (1 << (size - 1).bit_length() for size in (heads, slots))
    return tile_heads, max(tile_slots, 16 // tile_heads)


def columns(heads: int, slots: int) -> int:
    """Columns of the kernels' tile, and the width of the saved p [B, N, columns]."""
    tile_heads, tile_slots = padded(heads, slots)
    return tile_heads * tile_slots


def limit(x: torch.Tensor, heads: int, slots: int) -> str:
    """Why the kernels do not take so many heads and slots for tokens in x's dtype; an empty string where they do."""
    most = MAX_COLUMNS if x.dtype.itemsize == 2 else MAX_COLUMNS_FLOAT32
    if columns(heads, slots) <= most:
        return ""
    return f"{heads} heads of {slots} slots, each padded to a power of two, are more than {most} columns"


def takes(x: torch.Tensor, heads: int, slots: int) -> bool:
    """Whether the backend for x, as torch.autocast would cast it, takes so many heads and slots: PyTorch does."""
    (x,) = checks.autocast(x[:0])
    return dispatch.chosen_backend(OPERATOR, x) == "torch" or not limit(x, heads, slots)


def empty_results(
    x: torch.Tensor, a: torch.Tensor, with_map: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B, N, D]; map [B, N, K] or [0]; p for the backward pass [B, N, columns] or [0]."""
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_empty_maps(x, a, with_map, save)


def _empty_maps(x: torch.Tensor, a: torch.Tensor, with_map: bool, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _ = x.shape
    heads, slots = a.shape[1:3]
    return (
        x.new_empty((batch, tokens, slots) if with_map else (0,), dtype=accumulation_dtype(x)),
        x.new_empty((batch, tokens, columns(heads, slots)) if save else (0,)),
    )


def empty_gradients(x: torch.Tensor, *slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x, a and perhaps v; the latter laid out as [H, B, K, D], for the products that they flow back to."""
    like_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like_x, *(t.new_empty((t.shape[1], t.shape[0], *t.shape[2:])).transpose(0, 1) for t in slots)


def _to_saved(p: torch.Tensor, saved: torch.Tensor) -> None:
    """Fills the saved p [B, N, columns] with p [B, H, K, N]; zeros in the padding."""
    tile = saved.zero_().unflatten(-1, padded(*p.shape[1:3]))
    tile[:, :, : p.shape[1], : p.shape[2]].copy_(p.permute(0, 3, 1, 2))


def _from_saved(saved: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """p [B, H, K, N], in float32 at least, of the saved one; its sums over slots, which were rounded, are 1 again."""
    heads, slots = a.shape[1:3]
    p = saved.unflatten(-1, padded(heads, slots))[:, :, :heads, :slots].permute(0, 2, 3, 1)
    p = p.to(accumulation_dtype(a), memory_format=torch.contiguous_format)
    return p / p.sum(2, keepdim=True)


@torch.library.custom_op("spot_kernels::folded_cross_attention", mutates_args=())
def _forward(
    x: torch.Tensor, a: torch.Tensor, v: torch.Tensor, scale: float, with_map: bool, save: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = out, mean_map, saved = empty_results(x, a, with_map, save)
    if backend == "triton":
        from spot_kernels.gpu import folded_cross_attention as kernels

        kernels.forward(x, a, v, scale, out, mean_map if with_map else None, saved if save else None)
        return results
    with checks.without_autocast(x):
        p = reference.probabilities(x, a, scale)
        out.copy_(reference.combine(p, v))
    if with_map:
        mean_map.copy_(reference.mean_map(p))
    if save:
        _to_saved(p, saved)
    return results


@_forward.register_fake
def _(x, a, v, scale, with_map, save, backend):
    return empty_results(x, a, with_map, save)


@torch.library.custom_op("spot_kernels::folded_cross_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor | None,
    grad_map: torch.Tensor | None,
    x: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_gradients(x, a, v)
    if backend == "triton":
        from spot_kernels.gpu import folded_cross_attention as kernels

        kernels.backward(grad_out, grad_map, x, a, v, saved, scale, *results)
        return results
    with checks.without_autocast(x):
        gradients = reference.gradients(grad_out, grad_map, x, a, v, _from_saved(saved, a), scale)
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


@_backward.register_fake
def _(grad_out, grad_map, x, a, v, saved, scale, backend):
    return empty_gradients(x, a, v)


def _save(ctx, inputs, output):
    x, a, v, ctx.scale, ctx.with_map, _, ctx.backend = inputs
    _, mean_map, saved = output
    ctx.mark_non_differentiable(saved, *[mean_map] * (not ctx.with_map))
    ctx.save_for_backward(x, a, v, saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_map, _saved):
    grad_map = grad_map if ctx.with_map else None
    if grad_out is None and grad_map is None:
        return (None,) * 7
    return *_backward(grad_out, grad_map, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


@torch.library.custom_op("spot_kernels::folded_cross_map", mutates_args=())
def _map(x: torch.Tensor, a: torch.Tensor, scale: float, save: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    results = mean_map, saved = _empty_maps(x, a, True, save)
    if backend == "triton":
        from spot_kernels.gpu import folded_cross_attention as kernels

        kernels.forward(x, a, None, scale, None, mean_map, saved if save else None)
        return results
    with checks.without_autocast(x):
        p = reference.probabilities(x, a, scale)
    mean_map.copy_(reference.mean_map(p))
    if save:
        _to_saved(p, saved)
    return results


@_map.register_fake
def _(x, a, scale, save, backend):
    return _empty_maps(x, a, True, save)


@torch.library.custom_op("spot_kernels::folded_cross_map_backward", mutates_args=())
def _map_backward(
    grad_map: torch.Tensor, x: torch.Tensor, a: torch.Tensor, saved: torch.Tensor, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_gradients(x, a)
    if backend == "triton":
        from spot_kernels.gpu import folded_cross_attention as kernels

        kernels.backward(None, grad_map, x, a, None, saved, scale, *results, None)
        return results
    with checks.without_autocast(x):
        gradients = reference.gradients(None, grad_map, x, a, a, _from_saved(saved, a), scale)
    for result, gradient in zip(results, gradients, strict=False):
        result.copy_(gradient)
    return results


@_map_backward.register_fake
def _(grad_map, x, a, saved, scale, backend):
    return empty_gradients(x, a)


def _save_map(ctx, inputs, output):
    x, a, ctx.scale, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, a, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_map(ctx, grad_map, _saved):
    if grad_map is None:
        return (None,) * 5
    return *_map_backward(grad_map, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


_map.register_autograd(_differentiate_map, setup_context=_save_map)
_map_backward.register_autograd(checks.refuse_second_gradients(MAP_OPERATOR))


def folded_cross_attention(
    x: torch.Tensor, a: torch.Tensor, v: torch.Tensor, *, scale: float = 1.0, return_map: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each token attends to all slots, whose keys and values hold the projections of the queries and of the output.

    Gradients flow through both results. The kernels take up to 128 columns (64 in float32), heads × slots each
    padded to a power of two: six heads of seven slots are 64. Beyond that PyTorch runs.

    Args:
        x: tokens [B, N, D].
        a: slot keys times the query projection, [B, H, K, D].
        v: slot values times the output projection, [B, H, K, D].
        scale: of the logits, above 0; for heads of width d usually d^-1/2. Applied in float32.
        return_map: whether to return the map; None is returned in its place otherwise.

    Returns:
        out [B, N, D], summed over the heads, in x's dtype; map [B, N, K], the softmax over slots averaged over heads,
        float32 (float64 for float64 inputs). Under torch.autocast inputs are cast to its dtype, and so is out.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit, or the requested backend that
            cannot run.
    """
    x, a, v = checks.autocast(x, a, v)
    checks.floating(OPERATOR, x=x, a=a, v=v)
    backend = _choose(OPERATOR, x, a, scale)
    checks.shape(OPERATOR, "v", v, "[B, H, K, D]", a.shape)
    if backend == "torch":
        out, mean_map = reference.folded_cross_attention(x, a, v, scale, return_map)
    else:
        out, mean_map, _ = _forward(x, a, v, scale, return_map, _differentiated(x, a, v), backend)
    return out, mean_map if return_map else None


def folded_cross_map(x: torch.Tensor, a: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """The map of `folded_cross_attention` alone: reads no v and writes no output.

    A teacher's last block needs nothing else (SPOT, section 3.2).

    Args:
        x: tokens [B, N, D].
        a: slot keys times the query projection, [B, H, K, D].
        scale: of the logits, above 0.

    Returns:
        [B, N, K], the softmax over slots averaged over heads, float32 (float64 for float64 inputs).

    Raises:
        ValueError: as `folded_cross_attention`.
    """
    x, a = checks.autocast(x, a)
    checks.floating(MAP_OPERATOR, x=x, a=a)
    backend = _choose(MAP_OPERATOR, x, a, scale)
    if backend == "torch":
        return reference.mean_map(reference.probabilities(x, a, scale))
    return _map(x, a, scale, _differentiated(x, a), backend)[0]


def _differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow, for which p is saved."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _choose(operator: str, x: torch.Tensor, a: torch.Tensor, scale: float) -> str:
    checks.shape(operator, "x", x, "[B, N, D]")
    batch, _, width = x.shape
    checks.shape(operator, "a", a, "[B, H, K, D]", (batch, None, None, width))
    heads, slots = a.shape[1:3]
    if heads < 1 or slots < 1 or width < 1:
        raise ValueError(f"{operator}: a {tuple(a.shape)} needs at least one head, one slot and a width of one")
    if not scale > 0:
        raise ValueError(f"{operator}: scale={scale} must be above 0")
    return dispatch.choose(operator, x, limit(x, heads, slots))
