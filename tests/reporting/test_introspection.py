"""Introspection: the masks that evaluation scores, attention by iteration, colours that follow the annotations."""

import math
from dataclasses import replace

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.data import open_set
from spot_fast.errors import CorruptImage
from spot_fast.evaluation.scoring import evaluate, slot_noise
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.reporting.introspection import (
    BACKGROUND,
    attention_by_iteration,
    introspect,
    patch_gradients,
    read_image,
    slot_colours,
    truth_colours,
    unevenness,
)
from spot_fast.reporting.patch_gradients import patch_gradient_norms
from tiny_runs import tiny

CONFIG = tiny(slot_init="gaussian", val_images=4, dec_blocks=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Spot(CONFIG, frozen_encoder(CONFIG)).eval()


@pytest.fixture(scope="module")
def scenes():
    return open_set(CONFIG, "val")


def test_masks_are_those_that_evaluate_scores(model, scenes):
    table = evaluate(model, scenes, seed=5, progress=False, workers=0).table("spot")
    for index in range(len(scenes)):
        of_image = introspect(model, *read_image(scenes, index), index=index, seed=5)
        assert of_image.decoder_score == pytest.approx(table.row("decoder", 9).per_image["mbo_i"][index].item())
        assert of_image.order_scores[0] == pytest.approx(table.row("decoder", 1).per_image["mbo_i"][index].item())
        assert of_image.iteration_scores[-1] == pytest.approx(table.row("slots").per_image["mbo_i"][index].item())
        torch.testing.assert_close(of_image.decoder, of_image.by_order.mean(0))
        assert of_image.by_order.shape == (9, 16, 3) and of_image.iterations.shape == (3, 16, 3)


@pytest.mark.parametrize("changes", [dict(decoder="masked"), dict(decoder="mlp", dec_mlp_hidden=16, mlp_top_k=2)])
def test_a_decoder_that_needs_more_than_slots_is_shown_as_it_is_scored(changes, scenes):
    torch.manual_seed(0)
    config = tiny(slot_init="gaussian", val_images=4, dec_blocks=1, **changes)
    model = Spot(config, frozen_encoder(config)).eval()
    row = evaluate(model, scenes, seed=5, progress=False, workers=0).table("spot").row("decoder", 1)
    of_image = introspect(model, *read_image(scenes, 1), index=1, seed=5)
    assert of_image.decoder_score == pytest.approx(row.per_image["mbo_i"][1].item())
    assert torch.equal(of_image.decoder, of_image.by_order[0])
    gradients = patch_gradients(model, scenes, images=2, seed=5)
    assert gradients.images == 2 and gradients.by_order.shape == (1, 16) and gradients.by_order.min() > 0


@torch.no_grad()
def test_attention_after_n_iterations_is_that_of_a_model_with_n(model, scenes):
    features, _ = model.encode(normalise(scenes.val_image(0)[None]))
    noise = torch.randn(1, 3, 16)
    attention = attention_by_iteration(model, features, noise)
    for count, attn in enumerate(attention, 1):
        shorter = Spot(replace(CONFIG, slot_iterations=count), model.encoder)
        shorter.load_learned_state_dict(model.learned_state_dict())
        torch.testing.assert_close(attn, shorter.slot_encoder(features, noise)[1])
    assert len(attention) == 3 and model.slot_encoder.attention.iterations == 3
    assert not torch.allclose(attention[0], attention[2])


def test_a_slot_has_the_colour_of_its_partner():
    truth = torch.zeros(4, 4, dtype=torch.int64)
    truth[:2, :2], truth[:2, 2:], truth[3, 3] = 7, 2, -1
    assert truth_colours(truth) == {0: BACKGROUND, 2: 0, 7: 1}
    labels = torch.full((4, 4), 3)
    labels[:2, :2], labels[:2, 2:], labels[2, 0] = 0, 4, 1
    # slot 1 overlaps the background less than slot 3 does, slot 2 has no pixel: both have colours of their own
    assert slot_colours(labels, 5, truth) == [1, 2, 3, BACKGROUND, 0]


def test_more_objects_than_slots_and_no_object_at_all():
    labels = torch.zeros(4, 4, dtype=torch.int64)
    truth = torch.arange(16).view(4, 4)
    (only,) = slot_colours(labels, 1, truth)
    assert only in truth_colours(truth).values()
    assert slot_colours(labels, 2, torch.zeros_like(truth)) == [BACKGROUND, 0]


def test_gradients_are_the_mean_over_images_whatever_the_batch(model, scenes):
    steps = []
    norms = patch_gradients(model, scenes, images=3, seed=5, batch=2, done=lambda: steps.append(1))
    assert norms.images == 3 and norms.grid == 4 and len(steps) == 2 * 9 * 16
    alone = []
    for index in range(3):
        with torch.no_grad():
            features, target = model.encode(normalise(scenes.val_image(index)[None]))
            slots = model.slot_encoder(features, slot_noise(5, [index], 3, 16))[0]
        alone.append(patch_gradient_norms(model, slots, target, torch.tensor(8))[0])
    torch.testing.assert_close(norms.by_order[8], torch.stack(alone).mean(0), rtol=1e-4, atol=1e-7)


def test_images_that_cannot_be_read_are_passed_over(model, scenes, monkeypatch):
    val_image = scenes.val_image

    def damaged(index):
        if index == 0:
            raise CorruptImage("scene 0 is damaged")
        return val_image(index)

    monkeypatch.setattr(scenes, "val_image", damaged)
    assert read_image(scenes, 0) is None and read_image(scenes, 1) is not None
    assert patch_gradients(model, scenes, images=1, seed=0).images == 1


def test_unevenness_of_known_norms():
    ratio, variation = unevenness(torch.tensor([1.0, 3.0, 2.0, 2.0]))
    assert ratio == 3 and variation == pytest.approx(math.sqrt(0.5) / 2)
