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
from torch import Tensor, nn

from spot_fast.model.decoders import AutoregressiveDecoder
from spot_fast.model.spot import Spot
from spot_kernels.modules.layers import Stream
from spot_kernels.modules.order_layout import take_rows

_PATCHES_AT_ONCE = 16


def patch_gradient_norms(
    model: Spot,
    slots: Tensor,
    target: Tensor,
    order_index: Tensor | None = None,
    done: Callable[[], object] = lambda: None,
    *,
    slot_attn: Tensor | None = None,
) -> Tensor:
    """g [B, N] in raster layout, float32 at least, of slots [B, K, U] and target features [B, N, D].

    order_index: int64 [] or [B] as the decoder takes it; None = order 0. `done` is called for each patch. slot_attn:
    [B, N, K], for decoders that need it. The MLP decoder reads the slots once, as one block. Gradients of the
    parameters stay as they are.
    """
    decoder = model.decoder
    if _one_pass_for_some(decoder, slots):
        return _causal_norms(decoder, slots, target, order_index, done)
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
            needed = model.needed_by_decoder(slot_attn=slot_attn)
            prediction, _ = decoder(copies[0], target, order_index, **needed)
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


def _one_pass_for_some(decoder: nn.Module, slots: Tensor) -> bool:
    """Whether `_causal_norms` knows the decoder. Not on a GPU, whose kernels no batched backward pass knows."""
    return type(decoder) is AutoregressiveDecoder and decoder.cappa == 0 and slots.device.type == "cpu"


def _causal_norms(
    decoder: AutoregressiveDecoder, slots: Tensor, target: Tensor, order_index: Tensor | None, done: Callable
) -> Tensor:
    """`patch_gradient_norms` of a decoder in which a patch depends on those before it alone.

    Some consecutive patches of the order at a time: a forward pass over the patches up to the last of them, and the
    backward passes of their losses as one.
    """
    with torch.no_grad():
        bos, order = decoder._pick(order_index)
        tokens, targets = decoder._tokens(target, bos, order, True), take_rows(target, order)
    count, blocks = target.shape[1], decoder.transformer.blocks
    dtype = torch.promote_types(target.dtype, torch.float32)
    norms = torch.zeros(target.shape[:2], dtype=dtype, device=target.device)
    for start in range(0, count, _PATCHES_AT_ONCE):
        stop = min(start + _PATCHES_AT_ONCE, count)
        sequence = torch.arange(stop, device=target.device)
        with torch.enable_grad():
            copies = [slots.detach().clone().requires_grad_() for _ in blocks]
            decoded = tokens[:, :stop]
            for block, copy in zip(blocks[:-1], copies, strict=False):
                decoded, _ = block(decoded, decoder.slot_proj(copy), sequence)
            last, own = blocks[-1], decoder.slot_proj(copies[-1])
            stream = last.attend_to_tokens(Stream(decoded), sequence)
            # Behind the last self-attention nothing is left that other patches' losses see.
            stream = Stream(*(None if part is None else part[:, start:] for part in stream))
            stream, _ = last.attend_to_slots(stream, last.cross_attention.keys_values(own))
            prediction = decoder.transformer.norm(stream.total())
            # A sum over images: no image's loss depends on another's slots.
            losses = (prediction.to(dtype) - targets[:, start:stop].to(dtype)).square().mean(-1).sum(0)
        each = torch.eye(len(losses), dtype=dtype, device=losses.device)
        gradients = torch.autograd.grad(losses, copies, each, is_grads_batched=True)  # each [patches, B, K, U]
        norms[:, start:stop] = sum(gradient.abs().sum((2, 3)) for gradient in gradients).T
        for _ in range(start, stop):
            done()
    return norms.scatter(1, order.expand(len(norms), -1), norms)
