"""Protects encoder weights: the ViT in any file is recognised, nothing that it needs is dropped, and no code runs."""

import argparse
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder, load_vit_weights, packaged_weights
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.vits import build_vit
from tiny_runs import tiny

NAME = "vit:patch=8,width=16,depth=2,heads=2,hidden=16"


def config(file="none", encoder=NAME, **changes):
    return preset(
        "coco", encoder=encoder, image_size=32, dec_heads=2, train_blocks=1, encoder_weights=str(file), **changes
    )


def vit_weights(encoder=NAME, seed=0):
    """Of a ViT whose every parameter is random: nothing is one or zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.5
        for name, value in build_vit(config(encoder=encoder)).state_dict().items()
    }


WEIGHTS = vit_weights()
OTHER = vit_weights(seed=1)


def below(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


def loads(tmp_path, contents, expected=WEIGHTS, name="w.pth", encoder=NAME):
    """The file loads, as the ViT of `expected`."""
    (save_file if name.endswith(".safetensors") else torch.save)(contents, tmp_path / name)
    loaded = frozen_encoder(config(tmp_path / name, encoder)).vit.state_dict()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    return loaded


def refuses(tmp_path, contents, words, encoder=NAME):
    torch.save(contents, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        frozen_encoder(config(tmp_path / "w.pth", encoder))


HEADS = {
    "head.mlp.0.weight": torch.ones(2, 2),
    "head.last_layer.weight_g": torch.ones(2),
    "fc.weight": torch.ones(2, 2),
    "fc_norm.weight": torch.ones(16),
    "head_dist.bias": torch.ones(2),
    "pre_logits.fc.weight": torch.ones(2, 2),
    "decoder_embed.weight": torch.ones(2, 2),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(2, 2),
    "decoder_pos_embed": torch.ones(1, 2, 2),
    "mask_token": torch.ones(1, 2),
    "dino_loss.center": torch.ones(2),
    "projector.0.weight": torch.ones(2),
    "projector.1.num_batches_tracked": torch.tensor(1),
    "predictor.0.bias": torch.ones(2),
    "queue": torch.ones(2),
    "queue_ptr": torch.tensor(0),
    "dino_head.last_layer.weight": torch.ones(2),
}


@pytest.mark.parametrize(
    "contents",
    [
        WEIGHTS,
        WEIGHTS | HEADS,
        {"model": WEIGHTS | HEADS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3, "scaler": None},
        {"state_dict": below("module.base_encoder.") | below("module.momentum_encoder.", OTHER), "arch": "vit_base"},
        {
            "student": below("module.backbone.", OTHER),
            "teacher": below("backbone."),
            "dino_loss": {"center": torch.ones(2)},
            "args": argparse.Namespace(arch="vit_small"),
        },
        {
            "model": below("teacher.backbone.")
            | below("student.backbone.", OTHER)
            | {"teacher.dino_head.w": torch.ones(2)}
        },
        {"model": OTHER, "model_ema": WEIGHTS},
        {
            "encoder": below("module.", OTHER),
            "predictor": {"module.blocks.0.norm1.weight": torch.ones(2)},
            "target_encoder": below("module."),
        },
        {"state_dict": below("model.image_encoder._orig_mod.") | {"model.head.weight": torch.ones(2)}},
        {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value for name, value in WEIGHTS.items()},
        {
            name.replace("blocks.", "backbone.blocks.0." if ".0." in name else "backbone.blocks.1.", 1)
            if "blocks" in name
            else f"backbone.{name}": value
            for name, value in WEIGHTS.items()
        },
        {"model": {name: nn.Parameter(value) for name, value in WEIGHTS.items()}},
        {"deep": {"er": {"state": WEIGHTS}}},
    ],
    ids=[
        "bare",
        "heads",
        "mae",
        "moco3",
        "dino",
        "dinov2",
        "ema",
        "ijepa",
        "lightning",
        "checkpointing",
        "chunks",
        "parameters",
        "deep",
    ],
)
def test_the_vit_is_recognised_anywhere_in_a_file(tmp_path, contents):
    """Of several the one that its authors evaluate."""
    loads(tmp_path, contents)


def test_the_choice_among_several_vits_is_printed_once(tmp_path, capsys):
    contents = {"student": below("module.", OTHER), "teacher": below("module.")}
    loads(tmp_path, contents)
    loads(tmp_path, contents)
    assert capsys.readouterr().err.count("w.pth holds 2 ViTs: teacher.* is taken, not student.*") == 1
    refuses(tmp_path, {"a": WEIGHTS, "b": OTHER}, r"holds 2 ViTs \(a\.\*, b\.\*\): save the tensors of one")


@pytest.mark.parametrize("name", ["w.safetensors", "named_wrongly.pth"])
def test_safetensors_are_recognised_by_their_contents(tmp_path, name):
    save_file(below("vit."), tmp_path / name)
    assert torch.equal(frozen_encoder(config(tmp_path / name)).vit.cls_token, WEIGHTS["cls_token"])


def test_halves_become_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        halves = {name: value.to(dtype) for name, value in WEIGHTS.items()}
        loaded = loads(tmp_path, halves, {name: value.float() for name, value in halves.items()})
        assert loaded["cls_token"].dtype == torch.float32


def test_the_final_norm_may_be_missing(tmp_path):
    """Features are taken before it; a fine-tuned MAE has fc_norm in its place."""
    without = {name: value for name, value in WEIGHTS.items() if not name.startswith("norm.")}
    loaded = loads(tmp_path, without | {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.ones(16)}, without)
    assert torch.equal(loaded["norm.weight"], torch.ones(16)) and not loaded["norm.bias"].any()
    loaded = loads(tmp_path, without, without)
    assert torch.equal(loaded["norm.weight"], torch.ones(16))
    without.pop("blocks.1.norm2.weight")
    refuses(tmp_path, without, "lack 1 tensors of the ViT, such as blocks.1.norm2.weight")


@pytest.mark.parametrize(
    "theirs",
    [
        NAME + ",scale=1",
        NAME + ",registers=4",
        NAME.replace("depth=2", "depth=4"),
        NAME.replace("depth=2", "depth=1"),
        NAME.replace("hidden=16", "hidden=32"),
        NAME.replace("patch=8", "patch=4"),
        NAME.replace("width=16", "width=64").replace("heads=2", "heads=1"),
        NAME + ",registers=2,scale=1",
    ],
)
def test_weights_of_another_vit_name_the_encoder_that_takes_them(tmp_path, theirs):
    refuses(
        tmp_path,
        {"model": vit_weights(theirs)},
        f"the weights of .*: .*use --encoder {theirs}$|belong to another ViT, use --encoder {theirs}$",
    )


@pytest.mark.parametrize(
    "theirs",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_patch14_dinov2",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch32_clip_224",
    ],
)
def test_the_encoder_has_timms_name_where_there_is_one(theirs):
    with torch.device("meta"):
        weights = build_vit(preset("coco", encoder=theirs)).state_dict()
        vit = build_vit(preset("coco", encoder="vit_small_patch16_224.dino"))
    with pytest.raises(UserError, match=f"use --encoder {theirs}$"):
        load_vit_weights(vit, weights, pos_resize="dino", source="x")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("blocks.0.attn.q_norm.weight", (8,)),
        ("blocks.1.ls1.gamma", (16,)),
        ("blocks.0.head.weight", (2, 2)),
        ("blocks.0.attn.relative_position_bias_table", (4, 2)),
        ("reg_token", (1, 2, 16)),
        ("dist_token", (1, 1, 16)),
        ("norm_pre.weight", (16,)),
        ("blocks.0.fc_norm.weight", (16,)),
        ("backbone.blocks.0.ls1.gamma", (16,)),
        ("rope.periods", (4,)),
        ("blocks.0.attn.sink", (2,)),
        ("lora.weight", (2, 2)),
        ("header.weight", (2, 2)),
    ],
)
def test_a_tensor_that_the_vit_does_not_take_is_an_error(tmp_path, name, shape):
    refuses(
        tmp_path,
        {"model": WEIGHTS | {name: torch.ones(shape)}},
        f"1 tensors that the ViT of this --encoder does "
        f"not take, {name}, and without them its features would be wrong: ",
    )


def test_parts_of_the_vit_beside_it_are_an_error(tmp_path):
    """Decoders and predictors have blocks of their own."""
    for name in ("blocks.0.ls1.gamma", "other.blocks.2.norm1.weight", "reg_token", "vit.register_tokens"):
        refuses(tmp_path, below("backbone.") | {name: torch.ones(2)}, rf"its ViT in backbone\.\* and 1 .*as {name}:")
    for name in (
        "decoder.blocks.0.norm1.weight",
        "mae_decoder.pos_embed",
        "predictor.blocks.0.ls1.gamma",
        "optimizer.state.backbone.blocks.0.norm1.weight.exp_avg",
        "neck.weight",
    ):
        loads(tmp_path, below("backbone.") | {name: torch.ones(2)})


def test_weights_that_no_encoder_takes_get_no_suggestion(tmp_path):
    extra = {"blocks.0.attn.q_norm.weight": torch.ones(8), "blocks.0.ls1.gamma": torch.ones(16)}
    refuses(tmp_path, WEIGHTS | extra, "pass weights in timm's names for this --encoder")


@pytest.mark.parametrize(
    "contents, words",
    [
        (
            {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(2)},
            "names its tensors as Hugging Face transf",
        ),
        ({"visual.conv1.weight": torch.ones(2)}, "names its tensors as CLIP does: pass the model's weights in timm's"),
        (
            {"model": {"layer1.0.conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)}},
            r"lacks all tensors of a ViT .*its names begin with model.layer1\*, model.fc\*",
        ),
        ({"epoch": 3, "args": argparse.Namespace()}, "holds no tensors"),
        ({"model": nn.Linear(2, 2)}, "holds no tensors"),
        ([1], "holds a list, not a state dict"),
    ],
)
def test_a_file_without_a_vit_says_what_it_has(tmp_path, contents, words):
    refuses(tmp_path, contents, f"--encoder-weights.* {words}")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda value: value.index_fill(0, torch.tensor([3]), float("nan")),
            "has 16 of 256 values that are NaN or inf",
        ),
        (lambda value: value / 0, "values that are NaN or infinite"),
        (lambda value: (value * 1e6).half(), "values that are NaN or infinite"),
        (lambda value: torch.zeros_like(value), "holds nothing but zeros"),
        (lambda value: value.to(torch.float8_e4m3fn), "is quantised"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is quantised"),
        (lambda value: value.to(torch.int8), "in torch.int8: pass weights in float32"),
        (lambda value: value.to(torch.complex64), "is complex"),
        (lambda value: value.to_sparse(), "is sparse"),
        (lambda value: value.to("meta"), "no values"),
        (lambda value: value.T[:, :4], r"of shape \[16, 4\] but this --encoder needs \[16, 16\]"),
    ],
    ids=["nan", "infinite", "overflow", "zeros", "float8", "quantised", "int8", "complex", "sparse", "meta", "shape"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_are_named(tmp_path, change, words):
    name = "blocks.1.mlp.fc1.weight"
    refuses(tmp_path, {"model": WEIGHTS | {name: change(WEIGHTS[name])}}, f"{name} .*{words}")


def test_a_head_may_hold_anything(tmp_path):
    """Only what features depend on has to be finite."""
    loads(tmp_path, WEIGHTS | {"head.weight": torch.full((2, 2), float("nan"))})


def test_position_tables_that_fit_no_grid_are_named(tmp_path):
    for shape in ((1, 16, 16), (17, 16), (1, 1, 16)):
        refuses(tmp_path, WEIGHTS | {"pos_embed": torch.ones(shape)}, "the position table of shape .* has no square gr")
    refuses(tmp_path, WEIGHTS | {"pos_embed": torch.ones(1, 17, 8)}, r"pos_embed of shape \[1, 17, 8\]")
    loads(tmp_path, WEIGHTS | {"pos_embed": torch.ones(1, 50, 16)}, {"cls_token": WEIGHTS["cls_token"]})


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_is_no_weights_is_named(tmp_path, name):
    pointer, page = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"<!DOCTYPE html><html></html>"
    for data, words in ((pointer, "is a Git LFS pointer.*git lfs pull"), (page, "is a web page, not weights")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"--encoder-weights: .*{name} {words}"):
            frozen_encoder(config(tmp_path / name))
    with pytest.raises(UserError, match="is a folder: pass the file of weights in it, such as .*w."):
        frozen_encoder(config(tmp_path))


def test_the_packaged_encoder_is_small_and_its_metadata_names_its_weights():
    assert packaged_weights().stat().st_size <= 3_000_000
    scenes = preset("scenes")
    encoder = frozen_encoder(scenes)
    side = scenes.image_size
    assert encoder(torch.zeros(1, 3, side, side)).shape == (1, encoder.num_tokens, encoder.dim)
    metadata = encoder_metadata(encoder, scenes)
    assert metadata == {"encoder": "spot_scenes", "encoder_sha256": frozen_encoder(scenes).weights_hash()}
    encoder.vit.norm.weight[0] += 1
    assert metadata["encoder_sha256"] != encoder.weights_hash()


def test_random_weights_are_always_the_same():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other = (frozen_encoder(tiny(seed=seed)).weights_hash() for seed in (0, 1))
    assert one == other and torch.equal(torch.get_rng_state(), state)


def test_a_missing_and_a_damaged_file_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\0not tensors")
    for name, words in (("none.safetensors", "is not a file"), ("broken.safetensors", "cannot be read")):
        with pytest.raises(UserError, match=f"--encoder-weights: .*{name} {words}"):
            frozen_encoder(config(tmp_path / name))


def test_dinov2s_own_weights_with_registers_mean_the_same():
    """Its source adds the class token's position when it runs, timm has added it; features are equal."""
    shape = f"{NAME},registers=2"
    vit, again = (build_vit(config(encoder=shape)) for _ in range(2))
    torch.nn.init.normal_(vit.cls_token)
    source, position = dict(vit.state_dict()), torch.randn(1, 1, 16)
    source |= {"cls_token": vit.cls_token.data - position, "pos_embed": torch.cat([position, vit.pos_embed.data], 1)}
    load_vit_weights(again, source, pos_resize="dino", source="x")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(Encoder(again, last_blocks=1)(images), Encoder(vit, last_blocks=1)(images))


def test_the_encoder_of_a_whole_spot_of_the_authors_is_the_frozen_one(tmp_path):
    frozen = {f"second_encoder.{name}": value for name, value in WEIGHTS.items()}
    student = {name.removeprefix("second_"): value + 1 for name, value in frozen.items()}
    others = {"slot_attn.slot_attention.project_q.weight": torch.zeros(2, 2), "pos_embed": torch.zeros(1, 64, 128)}
    loads(tmp_path, {"model": frozen | student | others, "epoch": 3}, name="spot.pt.tar")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    refuses(
        tmp_path, {"cls_token": Malicious()}, r"--encoder-weights: checkpoint .*w.pth was not loaded: it calls \w+.open"
    )
    assert not (tmp_path / "executed").exists()


def test_without_a_hub_it_fails_within_seconds_and_says_which_file_to_pass(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="--encoder-weights FILE .*timm/vit_small_patch16_224.dino"):
        frozen_encoder(preset("coco", encoder="vit_small_patch16_224.dino"))
    assert time.monotonic() - start < 20
