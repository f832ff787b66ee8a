"""Protects top-k decoding of the MLP decoder: against a loop over tokens, its gradients, the work it saves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from small_models import small_model
from spot_fast.model.decoders import MlpDecoder
from spot_fast.training.losses import teacher_labels

BATCH, SLOTS, TOKENS, DIM = 2, 5, 9, 12


def mlp(top_k: int = 0, **settings) -> MlpDecoder:
    torch.manual_seed(0)
    return MlpDecoder(DIM, 8, TOKENS, **({"hidden": 16, "top_k": top_k} | settings)).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """slots [B, K, U] and slot attention [B, N, K]."""
    torch.manual_seed(1)
    return torch.randn(BATCH, SLOTS, 8).double(), torch.randn(BATCH, TOKENS, SLOTS).double().softmax(-1)


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("project_slots", [True, False])
def test_it_is_a_loop_over_tokens_and_their_slots(top_k, project_slots):
    """As FT-DINOSAUR: the k slots of the largest attention are decoded, their logits alone share the softmax."""
    decoder, (slots, attn) = mlp(top_k, project_slots=project_slots), inputs()
    prediction, masks = decoder(slots, None, slot_attn=attn)
    projected = decoder.slot_proj(slots)
    for image in range(BATCH):
        for token in range(TOKENS):
            chosen = sorted(range(SLOTS), key=lambda slot: -attn[image, token, slot])[:top_k]
            decoded = [decoder.mlp(projected[image, slot] + decoder.positions[token]) for slot in chosen]
            weights = torch.stack([each[-1] for each in decoded]).softmax(0)
            expected = sum(weight * each[:-1] for weight, each in zip(weights, decoded, strict=True))
            torch.testing.assert_close(prediction[image, token], expected)
            of_slots = torch.zeros(SLOTS).double()
            of_slots[chosen] = weights
            torch.testing.assert_close(masks[image, token], of_slots)
    assert torch.equal(decoder.masks(slots, None, slot_attn=attn), masks)


@pytest.mark.parametrize("top_k", [SLOTS, SLOTS + 3])
def test_as_many_as_there_are_is_all(top_k):
    decoder, (slots, attn) = mlp(top_k), inputs()
    for found, expected in zip(decoder(slots, None, slot_attn=attn), mlp()(slots, None), strict=True):
        assert torch.equal(found, expected)


def test_gradients_are_right_and_none_goes_through_the_choice():
    decoder, (slots, attn) = mlp(2), inputs()
    weight = decoder.mlp[0].weight.detach().clone().requires_grad_()
    positions = decoder.positions.detach().clone().requires_grad_()

    def decode(slots, weight, positions):
        parameters = {"mlp.0.weight": weight, "positions": positions}
        return torch.func.functional_call(decoder, parameters, (slots, None), {"slot_attn": attn})

    assert torch.autograd.gradcheck(decode, (slots.requires_grad_(), weight, positions))
    attn.requires_grad_()
    prediction, masks = decoder(slots, None, slot_attn=attn)
    (prediction.square().sum() + masks.square().sum()).backward()
    assert attn.grad is None and all(p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_the_layers_run_for_k_slots_of_a_token():
    """Of K = 5 slots two: two fifths of the hidden layers' work, and little besides."""
    work, (slots, attn) = [], inputs()
    for top_k in (0, 2):
        decoder = mlp(top_k, hidden=256)
        with FlopCounterMode(display=False) as counter:
            decoder(slots, None, slot_attn=attn)
        work.append(counter.get_total_flops())
    assert 0.38 < work[1] / work[0] < 0.45


def test_bfloat16_keeps_masks_in_float32_that_sum_to_one():
    decoder, (slots, attn) = mlp(2).float(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        prediction, masks = decoder(slots.float(), None, slot_attn=attn.float())
    exact, exact_masks = decoder(slots.float(), None, slot_attn=attn.float())
    assert masks.dtype == torch.float32 and (masks > 0).sum(-1).eq(2).all()
    torch.testing.assert_close(masks.sum(-1), torch.ones(BATCH, TOKENS))
    assert (masks - exact_masks).abs().max() < 0.02 and (prediction.float() - exact).abs().max() < 0.05


def test_attention_is_asked_for():
    decoder, (slots, _) = mlp(2), inputs()
    with pytest.raises(ValueError, match="slot_attn is missing: with top_k=2 it says which slots decode a token"):
        decoder(slots, None)


def test_the_model_hands_its_slot_attention_to_every_use():
    """Training and evaluation, segmentation and a teacher: everywhere the masks are those of the top slots."""
    model = small_model(decoder="mlp", mlp_top_k=2)
    noise = torch.randn(2, 4, 16)
    features, target = torch.randn(2, 2, model.encoder.num_tokens, model.encoder.dim)
    output = model(features, target, noise=noise)
    decoded = model.decoder(output.slots, target, slot_attn=output.slot_attn)
    assert (output.masks > 0).sum(-1).eq(2).all() and torch.equal(output.masks, decoded[1])
    allowed = output.slot_attn.topk(2, -1).indices
    assert (teacher_labels(output.masks).unsqueeze(-1) == allowed).any(-1).all()
    masks = model.decode_masks(output.slots, target, slot_attn=output.slot_attn)
    assert torch.equal(masks, output.masks)
    for found, expected in zip(
        model.decode_all_orders(output.slots, target, slot_attn=output.slot_attn), decoded, strict=True
    ):
        assert torch.equal(found, expected)
    images = torch.randn(2, 3, 32, 32)
    one, several = (model.segment(images, noise=noise, orders=orders) for orders in ("0", "all"))
    assert torch.equal(one.masks, several.masks)
