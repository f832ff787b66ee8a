"""What the replacements of published forward passes share: one iteration of slot attention, and the loop around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spot_kernels import checks
from spot_kernels.modules.layers import gru_and_norm, merge_heads, step_with_eps_in_sum
from spot_kernels.slot_attention import slot_attention_step


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, eps: float, *, in_sum: bool = False, attn: bool = True, logits: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q (scaled) [B, H, K, d], k and v [B, H, N, d] → updates [B, K, H·d]; and if asked for, attention [B, N, K],
    summed over heads, and logits [B, H, N, K], in the dtypes of PyTorch's softmax and products (under autocast, too).

    in_sum: eps is added to the sum of the weights instead of to the weights.
    """
    step = step_with_eps_in_sum if in_sum else slot_attention_step
    updates, weights, products = step(q, k, v, eps=eps, return_attn=attn, return_logits=logits)
    return (
        merge_heads(updates),
        weights.to(q.new_empty(0).softmax(0).dtype) if attn else None,
        products.to(q.dtype) if logits else None,
    )


def refine(
    slots: Tensor,
    iterations: int,
    attend: Callable[[Tensor, bool], tuple[Tensor, Tensor | None, Tensor | None]],
    update: Callable[[Tensor, Tensor, bool], Tensor],
    *,
    truncation: str | None = "none",
    through: Tensor | None = None,
    every: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All iterations: slots [B, K, U] → slots, and attention and logits of the last iteration.

    attend(slots, last) gives updates, attention and logits; update(updates, slots, last) new slots. truncation:
    `fixed-point` (the last iteration's input is a constant), `bi-level` (and its gradient goes to `through`); any other
    value truncates nothing, as in the published code. every: whether gradients also reach earlier iterations by another
    way (attention that is returned).
    """
    attn = logits = None
    truncated = truncation in ("fixed-point", "bi-level")
    for last in lasts(iterations):
        if last and truncated:
            slots = slots.detach()
            if truncation == "bi-level":
                slots = slots + (through - through.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last or every or not truncated)):
            updates, attn, logits = attend(slots, last)
            slots = update(updates, slots, last)
    return slots, attn, logits


def lasts(iterations: int) -> list[bool]:
    """For each iteration, whether it is the last.

    Plain booleans: under torch.compile with a varying number of iterations, comparing a loop counter with it would be
    symbolic and could not set the grad mode.
    """
    return [False] * (iterations - 1) + [True] * (iterations > 0)


def gru_with_norm(gru: nn.GRUCell, norm: nn.LayerNorm, updates: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """New slots and their LayerNorm."""
    if slots.is_cuda:
        # On CUDA, not on CPUs, autocast casts the state of PyTorch's GRU cell, too, and with it the new slots.
        (slots,) = checks.autocast(slots)
    return gru_and_norm(gru, norm, updates, slots)


def single(tokens: Tensor) -> Tensor:
    """[B, N, d] → [B, 1, N, d]: one head."""
    return tokens.unsqueeze(1)


def noise_like(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A standard-normal draw on the device of `like`, in its dtype or in the default one."""
    dtype = None if self._published_default_noise else like.dtype
    return torch.randn(shape, device=like.device, dtype=dtype)
