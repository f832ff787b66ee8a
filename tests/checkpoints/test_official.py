"""The authors' checkpoints: every tensor is converted, outputs are theirs, and converting back gives the same file."""

import pytest
import torch

import golden_models
import golden_tensors
from golden_tensors import ROOT, assert_close, load
from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.checkpoints.official import (
    authors_state_dict,
    convert,
    infer_config,
    official_state_dict,
    official_weights,
)
from spot_fast.errors import UserError
from spot_fast.model.spot import Spot, reconstruction_loss
from tiny_runs import tiny

GOLDEN = ["stage1_state_dict:*", "stage2_student_state_dict:*", "checkpoints/*"]

FILE = ROOT / "checkpoints" / "stage1_checkpoint_numpy1.pt.tar"
SETTINGS = golden_tensors.index()["checkpoints"]["checkpoints/stage1_checkpoint_numpy1.pt.tar"]["config"]
STORED = "checkpoints/stage1_checkpoint_numpy1."


def official(**changes):
    return convert(FILE, num_slots=SETTINGS["slots"], encoder_heads=SETTINGS["heads"], **changes).model()


def outputs(dtype):
    model = official().to(dtype)
    images, noise = load("checkpoints/images").to(dtype), load(STORED + "slot_noise").to(dtype)
    one, every = model.segment(images, noise=noise), model.segment(images, orders="all", noise=noise)
    target = model.encode(images)[1]

    def on_grid(maps):
        return maps.transpose(1, 2).unflatten(2, (4, 4))

    return {
        "slots": one.slots,
        "slot_attention": on_grid(one.slot_attn),
        "decoder_masks_order_0": on_grid(one.masks),
        "decoder_masks_all_orders": on_grid(every.masks),
        "loss_rec": reconstruction_loss(one.prediction, target).reshape(1),
        "loss_rec_all_orders": reconstruction_loss(every.prediction, target).reshape(1),
    }


def test_a_released_checkpoint_gives_the_authors_outputs():
    """The index states no error for these: allowed is 4 × what float32 itself loses, as for the other tensors."""
    single, double = outputs(torch.float32), outputs(torch.float64)
    for name, value in single.items():
        error = (value - double[name]).abs().max().item()
        assert_close(STORED + name, value, atol=4 * error + 1e-6 * value.abs().max().item())


def test_tensors_show_the_settings():
    config = infer_config(FILE)
    assert (config.stage, config.slot_dim, config.slot_mlp, config.dec_blocks, config.image_size, config.orders) == (
        1,
        SETTINGS["slot"],
        SETTINGS["mlp"],
        SETTINGS["dec"],
        SETTINGS["image_size"],
        "spot9",
    )
    assert (config.slot_init, config.truncation) == ("gaussian", "none")
    student = infer_config(golden_tensors.stage2_state_dict())
    assert (student.stage, student.slot_init, student.truncation, student.num_slots, student.train_blocks) == (
        2,
        "learned",
        "bi_level",
        7,
        4,
    )


@pytest.mark.parametrize(
    "build, official_state",
    [
        (golden_models.stage1, golden_tensors.stage1_state_dict),
        (golden_models.stage2, golden_tensors.stage2_state_dict),
    ],
)
def test_every_tensor_is_converted(build, official_state):
    """As many numbers arrive as the authors' model has, causal masks and the student's unused copies aside."""
    model, state = build(), official_state()
    converted = official_state_dict(state)
    own = model.state_dict()
    assert converted.keys() == own.keys()
    for name, value in converted.items():
        assert torch.equal(value, own[name]), name
    unused = [name for name in state if name.endswith("self_attn_mask")]
    if model.last_blocks is not None:  # trunk, embeddings and norm of the student's encoder are the frozen one's
        unused += [
            name
            for name in state
            if name.startswith("encoder.") and not any(name.startswith(f"encoder.blocks.{i}.") for i in range(8, 12))
        ]
    expected = sum(value.numel() for name, value in state.items() if name not in unused)
    assert sum(value.numel() for value in converted.values()) == expected


def test_older_key_names_and_wrappings_mean_the_same():
    state = golden_tensors.stage1_state_dict()
    expected = official_state_dict(state)
    older = {name.replace("dec.", "tf_dec.", 1) if name.startswith("dec.") else name: v for name, v in state.items()}
    parallel = {f"module.{name}": value for name, value in state.items()}
    for variant in (older, {"model": state, "epoch": 3}, parallel, {"model": older}):
        converted = official_state_dict(variant)
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_other_state_dicts_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="lacks encoder.patch_embed.proj.weight"):
        official_weights({"model": {"weight": torch.zeros(3)}})
    state = golden_tensors.stage1_state_dict()
    for name in ("bos_tokens", "encoder.pos_embed", "slot_attn.slot_attention.mlp.0.weight"):
        with pytest.raises(UserError, match=f"lacks {name}: it is not a model"):
            infer_config({n: value for n, value in state.items() if n != name})
    with pytest.raises(UserError, match="has dec.blocks.0.self_attn.bias, which the authors' decoders do not"):
        official_state_dict(state | {"dec.blocks.0.self_attn.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="has head.weight, which the authors' models do not"):
        official_state_dict(state | {"head.weight": torch.zeros(3)})
    del state["dec.blocks.1.self_attn.proj_k.weight"]
    with pytest.raises(UserError, match="lacks a part of decoder.transformer.blocks.1.self_attention"):
        official_state_dict(state)


def test_a_student_trained_deeper_is_refused():
    """Only the last four blocks can differ: anything else would silently be replaced by the frozen encoder's."""
    state = golden_tensors.stage2_state_dict()
    state["encoder.blocks.5.norm1.weight"] = state["encoder.blocks.5.norm1.weight"] + 1
    with pytest.raises(UserError, match="changed encoder block 5 of 12"):
        official_state_dict(state)
    state = golden_tensors.stage2_state_dict()
    more = state | {"encoder.blocks.0.ls1.gamma": torch.ones(2)}
    with pytest.raises(UserError, match="frozen encoder lacks blocks.0.ls1.gamma, which its student has"):
        official_state_dict(more)
    state["encoder.cls_token"] = state["encoder.cls_token"] + 1
    with pytest.raises(UserError, match="differ in encoder.cls_token"):
        official_state_dict(state)


def test_a_tensor_that_no_module_takes_is_an_error():
    """In the frozen encoder, beside the encoder, and what is no number."""
    state = golden_tensors.stage1_state_dict()
    for name, words in (
        ("encoder.blocks.0.attn.q_norm.weight", "not take, blocks.0.attn.q_norm.weight, and"),
        ("slot_attn.extra.weight", "which the authors' models do not"),
        ("dec.blocks.0.self_attn.q_norm.weight", "which the authors' decoders do not"),
    ):
        with pytest.raises(UserError, match=words):
            convert(state | {name: torch.ones(2)}, encoder_heads=3, num_slots=7).model()
    name = "slot_attn.slot_attention.mlp.0.weight"
    with pytest.raises(UserError, match=f"{name} is quantised"):
        convert(state | {name: state[name].to(torch.float8_e5m2)}, encoder_heads=3, num_slots=7).model()
    with pytest.raises(UserError, match="tensor slot_encoder.attention.mlp.0.weight has .* NaN or infinite"):
        convert(state | {name: state[name] * float("nan")}, encoder_heads=3, num_slots=7).model()


@pytest.mark.parametrize(
    "build, official_state",
    [
        (golden_models.stage1, golden_tensors.stage1_state_dict),
        (golden_models.stage2, golden_tensors.stage2_state_dict),
    ],
)
def test_the_way_back_is_the_authors_state_dict(build, official_state):
    """Names, shapes, types and bits, causal masks and both encoders included: their strict loading accepts it."""
    expected, back = official_state(), authors_state_dict(build())
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


def test_cappas_positions_go_back_too():
    state = golden_tensors.stage1_state_dict() | golden_tensors.state_dict("decoder_variants:parallel_decoding/")
    model = convert(state, num_slots=7, encoder_heads=3).model()
    back = authors_state_dict(model)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"feature_norm": True}, "features are normalised"),
        ({"slot_heads": 2}, "slot attention has 2 heads"),
        ({"implementation": "videosaur"}, "implementation is videosaur"),
        ({"decoder": "masked"}, "its decoder is masked"),
        ({"decoder": "mlp", "mlp_top_k": 2}, "it decodes the top 2 slots of a token"),
    ],
)
def test_a_model_that_the_authors_code_cannot_be_is_refused(changes, reason):
    with pytest.raises(UserError, match=f"cannot become a checkpoint of the authors' implementation: .*{reason}"):
        config = tiny(**{"feature_norm": False} | changes)
        authors_state_dict(Spot(config, frozen_encoder(config)))


def test_the_number_of_learned_slots_chooses_the_preset():
    state = golden_tensors.stage2_state_dict()
    for slots, name in ((7, "coco"), (6, "voc"), (11, "movi_c"), (24, "movi_e"), (5, "coco")):
        changed = state | {"slot_attn.slots_init.weight": torch.zeros(slots, 64)}
        assert (infer_config(changed).preset, infer_config(changed).num_slots) == (name, slots)
    # What the authors' models never have, whatever the data.
    assert infer_config(state, preset="scenes").feature_norm is False
