"""Protects the slot encoder: slots, attention and gradients are the official implementation's; how slots start."""

import math

import pytest
import torch

import golden_models
import golden_tensors
from golden_tensors import assert_close, load
from spot_fast.model.slot_encoder import SlotEncoder

GOLDEN = ["slot_attention.*", "inputs:slot_noise", "inputs:cotangent.*"]


def slot_attention(model, dtype, *, heads=1):
    """Runs golden features and backpropagates the golden scalar; returns what the index stores beside it."""
    encoder = model.slot_encoder
    features = load("features.frozen_encoder")[:2].to(dtype).requires_grad_()
    initial = encoder.initial_slots(2, load("inputs:slot_noise").to(dtype))
    initial.retain_grad()
    slots, attn, logits = encoder.attention(encoder.mlp(encoder.norm(features)), initial)
    cotangent = load("inputs:cotangent.logits_4_heads" if heads == 4 else "inputs:cotangent.logits")
    scalar = (slots * load("inputs:cotangent.slots")).sum() + (attn * load("inputs:cotangent.attention")).sum()
    (scalar + (logits.view(cotangent.shape) * cotangent).sum()).backward()
    initial_grad = torch.zeros_like(initial) if initial.grad is None else initial.grad
    return {
        "initial_slots": initial,
        "slots": slots,
        "attention": attn,
        "logits": logits.view(cotangent.shape),
        "grad.features": features.grad,
        "grad.initial_slots": initial_grad,
    }


def assert_slot_attention(prefix, truncation, model, values):
    """Every golden tensor of one initialiser and truncation."""
    for name, value in values.items():
        key = f"{prefix}.{truncation}.{name}" if name.startswith("grad.") else f"{prefix}.{name}"
        if key in golden_tensors.index()["tensors"]:
            (golden_models.assert_grad if name.startswith("grad.") else assert_close)(key, value)
    start = f"{prefix}.{truncation}.grad."
    for key in golden_tensors.names():
        name = key.removeprefix(start)
        if key.startswith(start) and name not in ("features", "initial_slots"):
            golden_models.assert_parameter(key, model, f"slot_attn.{name}", grad=True)


DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("truncation", ["none", "fixed_point"])
def test_gaussian_slots(truncation, dtype):
    model = golden_models.stage1(dtype, truncation=truncation)
    assert_slot_attention("slot_attention.gaussian", truncation, model, slot_attention(model, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("truncation", ["none", "fixed_point", "bi_level"])
def test_learned_slots(truncation, dtype):
    model = golden_models.stage2(dtype, truncation=truncation)
    assert_slot_attention("slot_attention.learned", truncation, model, slot_attention(model, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_heads_of_slot_attention(dtype):
    model = golden_models.stage1(dtype, slot_heads=4)
    assert_slot_attention("slot_attention.gaussian_4_heads", "none", model, slot_attention(model, dtype, heads=4))


def test_initial_slots_start_as_specified():
    torch.manual_seed(0)
    gaussian = SlotEncoder(16, 7, 256, 32)
    for value in (gaussian.slot_mean, gaussian.slot_log_scale):
        assert value.shape == (1, 1, 256)
        assert 0.95 * math.sqrt(3 / 256) < value.abs().max() <= math.sqrt(3 / 256)
    learned = SlotEncoder(16, 7, 256, 32, init="learned").slot_embedding
    bound = math.sqrt(6 / (7 + 256))
    assert learned.shape == (7, 256) and 0.99 * bound < learned.abs().max() <= bound


def test_gaussian_noise_is_drawn_when_none_is_given():
    """At evaluation too: a teacher's labels are random."""
    encoder = SlotEncoder(16, 7, 32, 32).eval()
    torch.manual_seed(1)
    first, second = encoder.initial_slots(2), encoder.initial_slots(2)
    assert (first != second).all()
    torch.manual_seed(1)
    assert torch.equal(encoder.initial_slots(2), first)
    with pytest.raises(ValueError, match=r"noise \(2, 7, 31\) must be \(2, 7, 32\)"):
        encoder.initial_slots(2, torch.zeros(2, 7, 31))
