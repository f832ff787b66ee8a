"""Protects the frozen encoder: where it is split, what its features leave out, how positions are resampled."""

import pytest
import torch

from kernel_tier import DEVICE, needs_triton
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder, is_plain_block, normalise, resample_positions
from spot_fast.model.timm_import import import_timm
from spot_kernels.dispatch import use_backend, without
from spot_kernels.modules import layers


def small_vit(**changes):
    options = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0) | changes
    return import_timm().models.vision_transformer.VisionTransformer(**options)


def test_trunk_and_last_blocks_are_the_whole_vit_without_its_final_norm():
    vit = small_vit(reg_tokens=2)
    encoder = Encoder(vit, last_blocks=2)
    images = torch.randn(3, 3, 32, 32)
    captured = {}
    hook = vit.blocks[-1].register_forward_hook(lambda m, i, o: captured.setdefault("out", o))
    with torch.no_grad():
        vit.forward_features(images)
    hook.remove()
    assert encoder.num_prefix == 3  # class token and two registers
    assert torch.equal(encoder(images), captured["out"][:, 3:])
    blocks = encoder.copy_last_blocks()
    again = encoder.finish(encoder.trunk(images), blocks)
    torch.testing.assert_close(again.detach(), encoder(images))  # not bit for bit: the copy's attention is written out
    assert again.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(images).requires_grad


@needs_triton
@pytest.mark.parametrize("changes", [{}, {"init_values": 0.5, "reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("feature_norm", [True, False])
def test_blocks_add_and_normalise_in_one_kernel(changes, feature_norm, monkeypatch):
    """With the results and gradients of timm's blocks; under autocast to bfloat16 with features in float32 as well."""
    encoder = Encoder(small_vit(**changes), last_blocks=2, feature_norm=feature_norm).to(DEVICE)
    images, blocks = torch.randn(2, 3, 32, 32, device=DEVICE), encoder.copy_last_blocks()
    calls, own = [], layers.add_norm
    monkeypatch.setattr(layers, "add_norm", lambda *given, **options: calls.append(1) or own(*given, **options))

    def run(*techniques, cast=False):
        with use_backend("triton"), without(*techniques), torch.autocast(DEVICE.type, torch.bfloat16, enabled=cast):
            features = encoder.finish(encoder.trunk(images), blocks)
        weight = torch.linspace(-1, 1, features.numel(), device=DEVICE).view(features.shape)
        return features.detach(), *torch.autograd.grad((features * weight).sum(), blocks.parameters())

    expected = run("residual_norm")
    assert not calls
    results = run()
    assert len(calls) == 4 * 2 + feature_norm
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)
    features, *gradients = run(cast=True)
    assert features.dtype == torch.float32 and all(torch.isfinite(gradient).all() for gradient in gradients)
    torch.testing.assert_close(features, expected[0], rtol=0.05, atol=0.05)


def test_only_timms_own_blocks_are_taken_apart():
    block = small_vit().blocks[0]
    assert is_plain_block(block)
    hook = block.register_forward_hook(lambda *given: None)
    assert not is_plain_block(block)
    hook.remove()
    block.norm2.eps, block.norm2._fast_norm = 1e-6, True
    assert not is_plain_block(block)
    block.norm2 = torch.nn.Identity()
    assert not is_plain_block(block)
    assert not is_plain_block(import_timm().create_model("vit_small_patch16_dinov3", num_classes=0).blocks[0])


def test_training_mode_never_reaches_the_frozen_vit():
    encoder = Encoder(small_vit(drop_rate=0.5, proj_drop_rate=0.5), last_blocks=1).train()
    images = torch.randn(2, 3, 32, 32)
    assert not encoder.vit.training and torch.equal(encoder(images), encoder(images))


def test_feature_norm_removes_mean_and_scale_of_each_token():
    encoder = Encoder(small_vit(), last_blocks=1, feature_norm=True)
    features = encoder(torch.randn(2, 3, 32, 32))
    assert features.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(features.std(-1, unbiased=False), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_normalise_is_imagenets():
    image = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(normalise(image)[0, :, 0, 0], expected)


def test_rotary_vits_run_too():
    """DINOv3 carries its positions as a rotary table that every block needs, also the trainable copies."""
    vit = import_timm().create_model("vit_small_patch16_dinov3", num_classes=0, img_size=32)
    encoder = Encoder(vit, last_blocks=1)
    images = torch.randn(1, 3, 32, 32)
    features = encoder(images)
    assert features.shape == (1, 4, vit.embed_dim)
    captured = {}
    vit.blocks[-1].register_forward_hook(lambda m, i, o: captured.setdefault("out", o))
    with torch.no_grad():
        vit.forward_features(images)
    torch.testing.assert_close(features, captured["out"][:, encoder.num_prefix :])


def test_position_tables():
    table = torch.randn(1, 1 + 16, 8)
    assert resample_positions(table, 4, 1, "dino") is table
    for how in ("dino", "timm"):
        larger = resample_positions(table, 6, 1, how)
        assert larger.shape == (1, 37, 8) and torch.equal(larger[:, :1], table[:, :1])
    assert not torch.allclose(resample_positions(table, 2, 1, "dino"), resample_positions(table, 2, 1, "timm"))
    smooth = torch.linspace(0, 1, 16).reshape(1, 4, 4, 1).expand(1, 4, 4, 8).reshape(1, 16, 8)
    for how in ("dino", "timm"):
        assert resample_positions(smooth, 8, 0, how).diff(dim=1).min() > -0.2
    with pytest.raises(UserError, match="no square grid"):
        resample_positions(torch.zeros(1, 12, 8), 4, 0, "dino")


def test_wrong_image_size_and_too_many_last_blocks_are_named():
    with pytest.raises(UserError, match="--train-blocks is 5 but the encoder has 4 blocks: use 0 to 4"):
        Encoder(small_vit(), last_blocks=5)
    with pytest.raises(UserError, match=r"\[2, 3, 16, 16\]"):
        Encoder(small_vit(), last_blocks=1)(torch.zeros(2, 3, 16, 16))
