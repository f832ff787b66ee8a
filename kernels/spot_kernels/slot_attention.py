"""One iteration of slot attention: `slot_attention_step`.

For each token a softmax over heads × slots jointly, a = softmax(k qᵀ); then for each head and slot the mean of v over
tokens with weights a + eps:

    updates = Σ_n (a + eps) v / Σ_n (a + eps)

q [B, H, K, d]; k, v [B, H, N, d]; any K ≥ 1 and H ≥ 1; float64, float32, bfloat16 or float16. The kernels take up to 64
slots and heads of up to 256 channels, in the latter three dtypes; on the CPU PyTorch runs.

Forward reads k and v once and saves, beside its inputs, the updates before they are rounded to v's dtype and the sums
Σ_n (a + eps), in float32. Backward computes the softmax again and reads k and v once more:

    da = (v · d updates − updates · d updates) / sums + d attn          over channels, for each token, head and slot
    d logits = a (da − Σ a da) + d logits                               the sum over heads × slots
    dq = Σ_n d logits k,  dk = Σ_k d logits q,  dv = Σ_k (a + eps) / sums d updates
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference import slot_attention as reference
from spot_kernels.reference.slot_cross_attention import accumulation_dtype

OPERATOR = "slot_attention_step"
# The most slots and channels a head that the kernels hold in one tile.
MAX_SLOTS, MAX_WIDTH = 64, 256


def empty_results(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_attn: bool, return_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """updates, attn, logits, exact and sums; attn and logits are [0] unless they are asked for."""
    batch, heads, slots, _ = q.shape
    tokens, wide = k.shape[2], accumulation_dtype(v)
    attn = v.new_empty((batch, tokens, slots) if return_attn else (0,), dtype=wide)
    logits = v.new_empty((batch, heads, tokens, slots) if return_logits else (0,), dtype=wide)
    sums = v.new_empty((batch, heads, slots), dtype=wide)
    return _empty_rows(q), attn, logits, _empty_rows(q, wide), sums


def empty_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, laid out as [B, K or N, H, d]."""
    return _empty_rows(q), _empty_rows(k), _empty_rows(v)


def _empty_rows(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[B, H, N, d] laid out as [B, N, H, d]: splitting and merging heads around attention copies nothing."""
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width), dtype=dtype).transpose(1, 2)


@torch.library.custom_op("spot_kernels::slot_attention_step", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, return_attn: bool, return_logits: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = empty_results(q, k, v, return_attn, return_logits)
    updates, attn, logits, exact, sums = results
    if backend == "triton":
        from spot_kernels.gpu import slot_attention as kernels

        asked = attn if return_attn else None, logits if return_logits else None
        kernels.forward(q, k, v, eps, updates, exact, sums, *asked)
        return results
    with checks.without_autocast(q):
        computed = reference.step_for_backward(q, k, v, eps)
    updates.copy_(computed[0])
    for result, value in zip((exact, attn, logits, sums), computed, strict=True):
        if result.numel():  # attn and logits are empty unless asked for
            result.copy_(value)
    return results


@_forward.register_fake
def _(q, k, v, eps, return_attn, return_logits, backend):
    return empty_results(q, k, v, return_attn, return_logits)


@torch.library.custom_op("spot_kernels::slot_attention_step_backward", mutates_args=())
def _backward(
    grad_updates: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    saved = grad_updates, grad_attn, grad_logits, q, k, v, exact, sums, eps
    results = empty_gradients(q, k, v)
    if backend == "triton":
        from spot_kernels.gpu import slot_attention_backward as kernels

        kernels.backward(*saved, *results)
        return results
    with checks.without_autocast(q):
        gradients = reference.gradients(*saved)
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


@_backward.register_fake
def _(grad_updates, grad_attn, grad_logits, q, k, v, exact, sums, eps, backend):
    return empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, eps, return_attn, return_logits, backend = inputs
    _, attn, logits, exact, sums = output
    ctx.set_materialize_grads(False)
    absent = [result for result, asked in ((attn, return_attn), (logits, return_logits)) if not asked]
    ctx.mark_non_differentiable(exact, sums, *absent)
    ctx.save_for_backward(q, k, v, exact, sums)
    ctx.eps, ctx.backend = eps, backend


def _differentiate(ctx, grad_updates, grad_attn, grad_logits, _exact, _sums):
    gradients = grad_updates, grad_attn, grad_logits
    return *_backward(*gradients, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(checks.refuse_second_gradients(OPERATOR))


def slot_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 1e-8,
    return_attn: bool = False,
    return_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Softmax over slots and weighted mean over tokens (Slot Attention, algorithm 1, lines 6-7).

    Differentiable in q, k and v through all three results. Under torch.autocast q, k and v are cast to its dtype.

    Args:
        q: slot queries [B, H, K, d].
        k: token keys [B, H, N, d], already scaled by the caller.
        v: token values [B, H, N, d].
        eps: added to the softmax before it is normalised over tokens.
        return_attn, return_logits: whether to return attn and logits; None is returned in their place otherwise.

    Returns:
        updates [B, H, K, d] in v's dtype; attn [B, N, K], the softmax summed over heads, before eps; logits
        [B, H, N, K]. The latter two are float32, or float64 for float64 inputs.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the requested backend that cannot
            run (`spot_kernels.dispatch`); for a gradient of a gradient on any backend but torch.
    """
    checks.floating(OPERATOR, q=q, k=k, v=v)
    checks.shape(OPERATOR, "q", q, "[B, H, K, d]")
    batch, heads, slots, width = q.shape
    checks.shape(OPERATOR, "k", k, "[B, H, N, d]", (batch, heads, None, width))
    checks.shape(OPERATOR, "v", v, "[B, H, N, d]", k.shape)
    if slots < 1 or heads < 1:
        raise ValueError(f"{OPERATOR}: q {tuple(q.shape)} needs at least one head and one slot")
    q, k, v = checks.autocast(q, k, v)
    backend = dispatch.choose(OPERATOR, q, _limit(q))
    if backend == "torch":
        # autocast would round the weights to half precision, and eps away
        with checks.without_autocast(q):
            updates, attn, logits = reference.slot_attention_step(q, k, v, eps)
    else:
        updates, attn, logits, _, _ = _forward(q, k, v, eps, return_attn, return_logits, backend)
    return updates, attn if return_attn else None, logits if return_logits else None


def _limit(q: torch.Tensor) -> str:
    """Why the kernels do not take q's shape, or an empty string."""
    _, _, slots, width = q.shape
    if slots > MAX_SLOTS:
        return f"q {tuple(q.shape)} has more than {MAX_SLOTS} slots"
    return f"q {tuple(q.shape)} has heads of more than {MAX_WIDTH} channels" if width > MAX_WIDTH else ""
