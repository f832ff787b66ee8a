"""Protects the whole model: official features, orders, one graph per step, weights that come back or are refused."""

import pytest
import torch

import golden_models
from golden_tensors import assert_close, load
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot, reconstruction_loss
from spot_fast.model.timm_import import import_timm
from spot_fast.training.losses import attention_loss, teacher_labels

GOLDEN = ["features.*", "inputs:images"]


def test_frozen_features_are_the_official_ones():
    features, target = golden_models.stage1().encode(load("inputs:images"))
    assert_close("features.frozen_encoder", features)
    assert features is target and not features.requires_grad


def test_student_features_come_from_its_own_last_blocks():
    """Target from the frozen encoder, features from the trained blocks, gradients for these alone."""
    model = golden_models.stage2()
    features, target = model.encode(load("inputs:images")[:2])
    assert_close("features.student_encoder", features)
    torch.testing.assert_close(target, load("features.frozen_encoder")[:2], rtol=0, atol=5e-5)
    assert features.requires_grad and not target.requires_grad
    features.sum().backward()
    assert all(p.grad is not None for p in model.last_blocks.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())


def tiny(**changes):
    vit = import_timm().models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0
    )
    settings = dict(
        image_size=32,
        train_blocks=1,
        num_slots=4,
        slot_dim=16,
        slot_mlp=32,
        dec_blocks=2,
        dec_heads=4,
        dec_mlp_hidden=32,
    )
    torch.manual_seed(0)
    return Spot(Config(**(settings | changes)), Encoder(vit, last_blocks=1))


VARIANTS = [
    {},
    {"stage": 2, "slot_init": "learned", "truncation": "bi_level"},
    {"slot_heads": 2, "dec_cross_heads": 2},
    {"decoder": "mlp", "orders": "standard"},
    {"decoder": "mlp", "orders": "standard", "mlp_slot_proj": False},
    {"decoder": "mlp", "orders": "standard", "mlp_top_k": 2},
    {"cappa": 0.25, "orders": "standard"},
    {"num_slots": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_output_shapes_and_gradients(changes):
    """Every variant trains: each learned parameter gets a gradient, the encoder none."""
    model = tiny(**changes)
    features, target = model.encode(torch.randn(3, 3, 32, 32))
    index = torch.tensor([0, 5, 8]) if model.num_orders == 9 else None
    out = model(features, target, index)
    slots, heads = model.config.num_slots, model.config.slot_heads
    assert out.slots.shape == (3, slots, 16) and out.slot_attn.shape == (3, 16, slots)
    assert out.slot_logits.shape == (3, heads, 16, slots)
    assert out.prediction.shape == target.shape == (3, 16, 24) and out.masks.shape == (3, 16, slots)
    torch.testing.assert_close(out.masks.sum(-1), torch.ones(3, 16))
    reconstruction_loss(out.prediction, target).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    unused = {"decoder.mask_token"} if model.config.cappa else set()
    assert {name for name in without if not name.startswith("encoder.")} == unused
    assert not any(p.requires_grad for p in model.encoder.parameters())
    masks = model.decode_masks(out.slots, target, index, slot_attn=out.slot_attn)
    torch.testing.assert_close(masks, out.masks)


@pytest.mark.parametrize("changes", VARIANTS)
def test_segment_averages_the_orders(changes):
    model, images, noise = tiny(**changes), torch.randn(2, 3, 32, 32), torch.randn(2, changes.get("num_slots", 4), 16)
    one, every = model.segment(images, noise=noise), model.segment(images, orders="all", noise=noise)
    assert not every.masks.requires_grad and torch.equal(one.slots, every.slots)
    features, target = model.encode(images)
    each = [model(features, target, torch.tensor(i), noise=noise) for i in range(model.num_orders)]
    torch.testing.assert_close(one.masks, each[0].masks)
    torch.testing.assert_close(every.masks, torch.stack([out.masks for out in each]).mean(0))
    torch.testing.assert_close(every.prediction, torch.stack([out.prediction for out in each]).mean(0))
    with pytest.raises(ValueError, match="orders 'nine'"):
        model.segment(images, orders="nine")


def test_an_order_for_each_sample_equals_one_by_one():
    model = tiny()
    features, target = model.encode(torch.randn(3, 3, 32, 32))
    noise, index = torch.randn(3, 4, 16), torch.tensor([8, 0, 3])
    together = model(features, target, index, noise=noise)
    for i in range(3):
        alone = model(features[i : i + 1], target[i : i + 1], index[i], noise=noise[i : i + 1])
        torch.testing.assert_close(together.masks[i : i + 1], alone.masks)
        torch.testing.assert_close(together.prediction[i : i + 1], alone.prediction)


@pytest.mark.parametrize("changes", [{"dec_blocks": 1}, {"decoder": "mlp", "orders": "standard"}])
def test_a_step_is_one_graph_and_a_new_order_is_no_new_one(changes):
    """What compilation and graph capture need: nothing reads a tensor on the host, an order is only data."""
    model, graphs = tiny(**changes), []

    def step(features, target, order_index, noise):
        out = model(features, target, order_index, noise=noise)
        loss = reconstruction_loss(out.prediction, target)
        labels = teacher_labels(model.decode_masks(out.slots, target, order_index))
        return loss + attention_loss(out.slot_logits, out.slot_attn, labels)[0]

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    features, target = (value.detach() for value in model.encode(torch.randn(2, 3, 32, 32)))
    noise = torch.randn(2, model.config.num_slots, 16)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for index in range(0, model.num_orders, 4):
        arguments = features, target, torch.tensor(index), noise
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert len(graphs) == 1


def test_empty_batch():
    model = tiny()
    out = model.segment(torch.empty(0, 3, 32, 32), orders="all")
    assert out.masks.shape == (0, 16, 4) and out.prediction.shape == (0, 16, 24)


def test_encoding_from_the_cached_trunk_is_the_same():
    model, images = tiny(stage=2), torch.randn(2, 3, 32, 32)
    for value, again in zip(model.encode(images), model.encode_hidden(model.encoder.trunk(images)), strict=True):
        assert torch.equal(value, again)


def test_training_mode_changes_nothing():
    model, images = tiny(stage=2), torch.randn(2, 3, 32, 32)
    noise = torch.randn(2, 4, 16)
    training = model.train().segment(images, noise=noise).masks
    assert torch.equal(training, model.eval().segment(images, noise=noise).masks)
    model.train()
    assert not model.encoder.vit.training and not model.last_blocks.training and model.decoder.training


def test_learned_weights_come_back_and_exclude_the_encoder():
    model, other = tiny(stage=2), tiny(stage=2, seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1.0
    state = model.learned_state_dict()
    assert state and not any(name.startswith("encoder.") for name in state)
    other.load_learned_state_dict(state)
    for name, value in other.learned_state_dict().items():
        assert torch.equal(value, state[name])


def test_weights_of_another_model_are_refused_by_name():
    state = tiny().learned_state_dict()
    with pytest.raises(UserError, match=r"attention.mlp.0.bias of shape \[32\] but this model needs \[40\]"):
        tiny(slot_mlp=40).load_learned_state_dict(state)
    with pytest.raises(UserError, match="lack last_blocks"):
        tiny(stage=2).load_learned_state_dict(state)
    with pytest.raises(UserError, match="have decoder.transformer.blocks.1"):
        tiny(dec_blocks=1).load_learned_state_dict(state)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dec_heads": 5}, "heads=5 does not divide the width 24"),
        ({"slot_heads": 3}, "heads=3 does not divide the width 16"),
        ({"decoder": "mlp"}, "--decoder mlp works in the standard patch order only: add --orders standard"),
        ({"decoder": "masked"}, "--decoder masked works in the standard patch order only: add --orders standard"),
        ({"cappa": 0.25}, "--cappa 0.25 works in the standard patch order only: add --orders standard"),
        ({"cappa": 0.25, "decoder": "mlp", "orders": "standard"}, "--cappa 0.25 belongs to the transformer decoder"),
        ({"cappa": 0.25, "decoder": "masked", "orders": "standard"}, "drop it or --decoder masked"),
    ],
)
def test_impossible_settings_are_user_errors(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(**changes)


def test_reconstruction_loss_is_float32_and_leaves_the_target_alone():
    prediction = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randn(2, 4, 3, requires_grad=True)
    loss = reconstruction_loss(prediction, target)
    loss.backward()
    assert loss.dtype == torch.float32 and target.grad is None
    torch.testing.assert_close(loss, (prediction.float() - target).square().mean())
