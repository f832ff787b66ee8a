"""Protects the frozen encoder: where it is cut, what it leaves out, how weights are found, resampled and refused."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from spot_fast.checkpoints.encoder_weights import frozen_encoder, load_vit_weights, packaged_weights
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder, encoder_identity, normalise, resample_positions
from spot_fast.model.timm_import import import_timm
from spot_fast.model.vits import build_vit, vit_name

SCENES = preset("scenes")


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


def test_packaged_encoder_is_small_and_loads():
    assert packaged_weights().stat().st_size <= 3_000_000
    encoder = frozen_encoder(SCENES)
    side = SCENES.image_size
    assert encoder(torch.zeros(1, 3, side, side)).shape == (1, encoder.num_tokens, encoder.dim)
    identity = encoder_identity(encoder, SCENES)
    assert identity["name"] == "spot_scenes" and len(identity["sha256"]) == 64
    assert identity == encoder_identity(frozen_encoder(SCENES), SCENES)
    encoder.vit.norm.weight[0] += 1
    assert identity["sha256"] != encoder.weights_hash()


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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()}},
    ],
)
def test_weight_files_of_any_wrapping_load(tmp_path, wrap):
    vit = build_vit(SCENES)
    torch.nn.init.normal_(vit.cls_token)
    torch.save(wrap(vit.state_dict()), tmp_path / "w.pth")
    loaded = frozen_encoder(preset("scenes", encoder_weights=str(tmp_path / "w.pth")))
    assert torch.equal(loaded.vit.cls_token, vit.cls_token)


def test_weight_files_that_do_not_fit_are_refused(tmp_path):
    def refuse(match, **changes):
        with pytest.raises(UserError, match=match):
            frozen_encoder(preset("scenes", **changes))

    refuse("is not a file", encoder_weights=str(tmp_path / "none.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"\0not tensors")
    refuse("cannot be read", encoder_weights=str(tmp_path / "broken.safetensors"))
    save_file({"pos_embed": torch.zeros(1, 65, 128)}, tmp_path / "few.safetensors")
    refuse("lacks all tensors of a ViT in timm's names", encoder_weights=str(tmp_path / "few.safetensors"))
    with pytest.raises(UserError, match="belong to another ViT"):
        load_vit_weights(small_vit(), small_vit(embed_dim=48).state_dict(), pos_resize="dino", source="x")
    refuse("not a model timm knows", encoder="vit_bse_patch16")
    refuse("not a plain ViT", encoder="resnet18", image_size=64)
    refuse("not a multiple", image_size=60)
    refuse("has 4 blocks", train_blocks=5)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224.dino", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]
)
def test_a_vit_is_recognised_by_its_weights(name):
    """Those with a name of timm's by it, others by their shape, which is enough to build them."""
    weights = dict(build_vit(preset("coco", encoder=name)).state_dict())
    torch.nn.init.normal_(weights["pos_embed"])
    assert vit_name(weights) == name
    shape = vit_name(weights, heads=3)
    assert shape.startswith("vit:patch=1") and "width=384,depth=12,heads=3,hidden=1536" in shape
    own = build_vit(preset("coco", encoder=shape))
    load_vit_weights(own, weights, pos_resize="dino", source="x")
    assert own.blocks[0].attn.num_heads == 3 and own.state_dict().keys() == weights.keys()


def test_maes_fixed_positions_are_not_taken_for_dinos():
    weights = dict(build_vit(preset("coco", encoder="vit_base_patch16_224.mae")).state_dict())
    weights["pos_embed"] = torch.randn(1, 197, 768)
    assert vit_name(weights) == "vit_base_patch16_224.dino"
    weights["pos_embed"][:, 0] = 0
    assert vit_name(weights) == "vit_base_patch16_224.mae"


@pytest.mark.parametrize(
    "encoder, words",
    [
        ("vit:patch=8,width=24", "describes no ViT: give depth, heads, hidden, patch, width"),
        ("vit:patch=8,width=24,depth=2,heads=0,hidden=8", "describes no ViT"),
        ("vit:patch=8,width=24,depth=2,heads=3,hidden=8,colour=1", "describes no ViT"),
        ("vit:patch=8,width=24,depth=2,heads=5,hidden=8", "heads=5 does not divide width=24"),
    ],
)
def test_a_vit_described_wrongly_is_refused(encoder, words):
    with pytest.raises(UserError, match=words):
        build_vit(preset("scenes", encoder=encoder))


def test_dinov2s_own_weights_with_registers_mean_the_same():
    """Its source adds the class token's position when it runs, timm has added it; features are equal."""
    vit = small_vit(reg_tokens=2, no_embed_class=True)
    torch.nn.init.normal_(vit.cls_token)
    source, position = dict(vit.state_dict()), torch.randn(1, 1, 24)
    source |= {"cls_token": vit.cls_token.data - position, "pos_embed": torch.cat([position, vit.pos_embed.data], 1)}
    again = small_vit(reg_tokens=2, no_embed_class=True)
    load_vit_weights(again, source, pos_resize="dino", source="x")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(Encoder(again, last_blocks=1)(images), Encoder(vit, last_blocks=1)(images))


def test_the_encoder_of_a_whole_spot_of_the_authors_is_the_frozen_one(tmp_path):
    vit = build_vit(SCENES)
    frozen = {f"second_encoder.{name}": value for name, value in vit.state_dict().items()}
    student = {name.removeprefix("second_"): value + 1 for name, value in frozen.items()}
    rest = {"slot_attn.slot_attention.project_q.weight": torch.zeros(2, 2), "pos_embed": torch.zeros(1, 64, 128)}
    torch.save({"model": frozen | student | rest, "epoch": 3}, tmp_path / "spot.pt.tar")
    found = frozen_encoder(preset("scenes", encoder_weights=str(tmp_path / "spot.pt.tar"))).vit.state_dict()
    assert all(torch.equal(found[name], value) for name, value in vit.state_dict().items())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"cls_token": Malicious()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"--encoder-weights: checkpoint .*w.pth was not loaded: it calls \w+.open"):
        frozen_encoder(preset("scenes", encoder_weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "executed").exists()


def test_without_a_hub_it_fails_within_seconds_and_says_which_file_to_pass(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="--encoder-weights FILE .*timm/vit_small_patch16_224.dino"):
        frozen_encoder(preset("coco", encoder="vit_small_patch16_224.dino"))
    assert time.monotonic() - start < 20


def test_wrong_image_size_is_named():
    with pytest.raises(UserError, match=r"\[2, 3, 16, 16\]"):
        Encoder(small_vit(), last_blocks=1)(torch.zeros(2, 3, 16, 16))


def test_timm_imports_beside_a_torchvision_that_lacks_its_operators(tmp_path):
    """A torchvision whose compiled part does not load stops at its first shape rule; the names must be declared."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *a: None)\n"
    )
    timm = tmp_path / "timm"
    timm.mkdir()
    (timm / "__init__.py").write_text("import torchvision\nmark = 'imported'\n")
    code = "from spot_fast.model.timm_import import import_timm; print(import_timm().mark)"
    import os

    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.stdout.strip() == "imported", done.stderr
