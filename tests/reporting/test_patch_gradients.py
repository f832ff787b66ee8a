"""Gradient norm per patch: against differences of the loss, block by block, and against plain autograd."""

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.model.spot import Spot
from spot_fast.reporting import patch_gradients
from spot_fast.reporting.patch_gradients import patch_gradient_norms
from tiny_runs import tiny

IMAGES, SLOTS, WIDTH = 2, 2, 4


def make(**changes) -> tuple[Spot, torch.Tensor, torch.Tensor]:
    """A float64 model of 2 x 2 patches with slots and target features."""
    config = tiny(image_size=16, num_slots=SLOTS, slot_dim=WIDTH, dec_heads=2, dec_mlp_hidden=8, **changes)
    torch.manual_seed(0)
    model = Spot(config, frozen_encoder(config)).double()
    slots = torch.randn(IMAGES, SLOTS, WIDTH, dtype=torch.float64)
    return model, slots, torch.randn(IMAGES, 4, model.encoder.dim, dtype=torch.float64)


def losses(model: Spot, copies: list[torch.Tensor], target: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, N]: squared error of each patch when decoder block b reads copies[b]."""
    decoder = model.decoder
    tokens = decoder.input_proj(decoder.inputs(target, order))
    for block, slots in zip(decoder.transformer.blocks, copies, strict=True):
        tokens, _ = block(tokens, decoder.slot_proj(slots), decoder.orders[order])
    return (decoder.transformer.norm(tokens) - target).square().mean(-1)


@pytest.mark.parametrize("order", [0, 3, 8])
@torch.no_grad()
def test_norms_are_those_of_finite_differences_through_every_block(order):
    model, slots, target = make(dec_blocks=2)
    order = torch.tensor(order)
    expected = torch.zeros(IMAGES, 4, dtype=torch.float64)
    step = 1e-5
    for block in range(2):
        for slot in range(SLOTS):
            for channel in range(WIDTH):
                ends = []
                for sign in (1, -1):
                    copies = [slots.clone(), slots.clone()]
                    copies[block][:, slot, channel] += sign * step
                    ends.append(losses(model, copies, target, order))
                expected += ((ends[0] - ends[1]) / (2 * step)).abs()
    norms = patch_gradient_norms(model, slots, target, order)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=1e-9)
    assert norms.min() > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(dec_blocks=1),
        dict(decoder="masked", dec_blocks=1),
        dict(decoder="mlp"),
        dict(decoder="mlp", mlp_top_k=1),
    ],
)
def test_where_slots_are_read_once_it_is_the_plain_gradient(changes):
    model, slots, target = make(**changes)
    attn = torch.rand(IMAGES, 4, SLOTS, dtype=torch.float64)
    needed = model.needed_by_decoder(slot_attn=attn)

    def loss(slots):
        return (model.decoder(slots, target, **needed)[0] - target).square().mean(-1)

    jacobian = torch.autograd.functional.jacobian(loss, slots)  # [B, N, B, K, U]
    expected = torch.stack([jacobian[b, :, b].abs().sum((1, 2)) for b in range(IMAGES)])
    torch.testing.assert_close(patch_gradient_norms(model, slots, target, slot_attn=attn), expected)


def test_a_model_is_left_as_it_was():
    model, slots, target = make(dec_blocks=2)
    before = model.decoder(slots, target)[0]
    calls = []
    patch_gradient_norms(model, slots, target, None, lambda: calls.append(1))
    assert len(calls) == 4
    assert all(p.grad is None for p in model.parameters()) and not slots.requires_grad
    assert torch.equal(model.decoder(slots, target)[0], before)


@pytest.mark.parametrize("order", [torch.tensor(8), torch.tensor([3, 5])])
def test_patches_at_once_are_patches_one_by_one(order, monkeypatch):
    model, slots, target = make(dec_blocks=3)
    monkeypatch.setattr(patch_gradients, "_PATCHES_AT_ONCE", 3)  # the last batch is smaller
    backward, calls = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or backward(*a, **k))
    together = patch_gradient_norms(model, slots, target, order)
    assert len(calls) == 2
    monkeypatch.setattr(patch_gradients, "_one_pass_for_some", lambda decoder, slots: False)
    torch.testing.assert_close(together, patch_gradient_norms(model, slots, target, order))
    assert len(calls) == 2 + 4
