"""Gradient norm of each patch's reconstruction loss with respect to the slots (SPOT, Fig. 3).

    g_i = Σ_b ‖ ∂L_i / ∂U_b ‖₁,   L_i = 1/D · ‖ y_i - ŷ_i ‖²

U_b are the slots as decoder block b reads them: each block gets its own copy, so that gradients through different
blocks cannot cancel. The norm sums over slots and channels, and L_REC is the mean of L_i over the patches. An
autoregressive decoder relies on the slots for the first patches of its order and on preceding features for the others;
averaging over nine orders evens that out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spot_fast.model.spot import Spot


def patch_gradient_norms(
    model: Spot,
    slots: Tensor,
    target: Tensor,
    order_index: Tensor | None = None,
    done: Callable[[], object] = lambda: None,
) -> Tensor:
    """g [B, N] in raster layout, float32 at least, of slots [B, K, U] and target features [B, N, D].

    order_index: int64 [] or [B] as the decoder takes it; None = order 0. One backward pass for each patch; `done` is
    called after each. The MLP decoder reads the slots once, as one block. Gradients of the parameters stay as they are.
    """
    decoder = model.decoder
    transformer = getattr(decoder, "transformer", None)
    blocks = [] if transformer is None else list(transformer.blocks)
    with torch.enable_grad():
        copies = [slots.detach().clone().requires_grad_() for _ in blocks or [None]]
        hooks = []
        for block, copy in zip(blocks, copies, strict=False):

            def own_slots(_, inputs: tuple, copy: Tensor = copy) -> tuple:
                tokens, _, *others = inputs
                return tokens, decoder.slot_proj(copy), *others

            hooks.append(block.register_forward_pre_hook(own_slots))
        try:
            prediction, _ = decoder(copies[0], target, order_index)
        finally:
            for hook in hooks:
                hook.remove()
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        # A sum over images: no image's loss depends on another's slots.
        losses = (prediction.to(dtype) - target.detach().to(dtype)).square().mean(-1).sum(0)
        norms = torch.zeros(target.shape[:2], dtype=dtype, device=target.device)
        for patch, loss in enumerate(losses):
            last = patch + 1 == len(losses)
            for gradient in torch.autograd.grad(loss, copies, retain_graph=not last):
                norms[:, patch] += gradient.abs().sum((1, 2))
            done()
    return norms
