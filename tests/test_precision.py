"""Protects the choice of arithmetic: what auto becomes, and that weights and losses stay float32 under bf16."""

from __future__ import annotations

import pytest
import torch

from spot_fast import precision
from spot_fast.config import preset
from spot_fast.encoder import build_encoder
from spot_fast.model import Spot, reconstruction_loss

CPU = torch.device("cpu")


def test_auto_follows_the_hardware(monkeypatch):
    for features, expected in (({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert precision.resolve("auto", CPU) == expected
        assert precision.resolve("float32", CPU) == "float32" and precision.resolve("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="fp8"):
        precision.resolve("fp8", CPU)


def test_bf16_keeps_weights_losses_and_gradients_in_float32_and_stays_near_float32():
    config = preset("scenes", num_slots=4, slot_dim=32, slot_mlp=32, dec_blocks=2)
    torch.manual_seed(0)
    model = Spot(config, build_encoder(config))
    target = torch.nn.functional.layer_norm(torch.randn(4, model.encoder.num_tokens, model.encoder.dim), (128,))
    noise = torch.randn(4, 4, 32)
    losses, gradients = {}, {}
    for name in ("float32", "bf16"):
        model.zero_grad()
        with precision.autocast(name, CPU):
            output = model(target, target, noise=noise)
            loss = reconstruction_loss(output.prediction, target)
        loss.backward()
        assert loss.dtype == output.slot_attn.dtype == output.slot_logits.dtype == output.masks.dtype == torch.float32
        losses[name] = loss.item()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert gradients[name].dtype == torch.float32
    # bfloat16 keeps 8 bits: one rounding is 0.4 %, and a loss is a mean of many.
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=5e-3)
    cosine = torch.nn.functional.cosine_similarity(gradients["bf16"], gradients["float32"], dim=0)
    assert cosine > 0.99
