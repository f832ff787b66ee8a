"""Protects `--initial-weights teacher`: the student begins with its teacher's masks, and says what hinders it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spot_fast.config import check_config, preset
from spot_fast.errors import UserError
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("teacher"), tiny(epochs=2, eval_images=0))[0]


def student(teacher: Path, **changes) -> Trainer:
    return Trainer(tiny(2, initial_weights="teacher", **changes), device=CPU, teacher=teacher)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_masks_are_the_teachers_before_the_first_step(teacher, precision):
    trainer = student(teacher, slot_init="gaussian", precision=precision)
    model, source = trainer.model.eval(), trainer.teacher
    features = torch.randn(2, 16, model.encoder.dim)
    noise = torch.randn(2, 3, 16)
    slots, attn, _ = model.slot_encoder(features, noise)
    # the teacher's frozen weights are kept rounded in bf16, the student's are not
    tolerance = dict(atol=0, rtol=0) if precision == "float32" else dict(atol=2e-2, rtol=2e-2)
    expected = source.slot_encoder.float()(features, noise)
    torch.testing.assert_close(attn, expected[1], **tolerance)
    torch.testing.assert_close(
        model.decoder(slots, features)[1], source.decoder.float()(expected[0], features)[1], **tolerance
    )


def test_learned_initial_slots_are_one_draw_of_the_teachers(teacher):
    one, again, other = (student(teacher, seed=seed).model.slot_encoder.slot_embedding.detach() for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    source = student(teacher).teacher.slot_encoder
    mean, scale = source.slot_mean[0].detach(), source.slot_log_scale[0].detach().exp()
    draws = torch.cat([(slots - mean) / scale for slots in (one, other)])
    assert draws.shape == (6, 16) and 0.7 < draws.std() < 1.3 and draws.mean().abs() < 0.4


def test_only_this_start_has_the_teachers_weights(teacher):
    weight = student(teacher).teacher.decoder.state_dict()
    for start, same in (("teacher", True), ("xavier", False)):
        model = Trainer(tiny(2, initial_weights=start), device=CPU, teacher=teacher).model
        assert all(torch.equal(value, weight[name]) for name, value in model.decoder.state_dict().items()) is same


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dec_blocks": 3}, "has dec_blocks 2 but --dec-blocks is 3: a student that begins as its teacher needs"),
        ({"slot_mlp": 24}, "has slot_mlp 16 but --slot-mlp is 24: .*, or --initial-weights xavier"),
        ({"orders": "standard"}, "has orders spot9 but --orders is standard"),
    ],
)
def test_a_student_made_otherwise_names_what_differs(changes, sentence, teacher):
    with pytest.raises(UserError, match=sentence):
        student(teacher, **changes)
    Trainer(tiny(2, **changes), device=CPU, teacher=teacher)  # with xavier it is allowed


def test_learned_slots_stay_learned(tmp_path):
    path = train(tmp_path, tiny(slot_init="learned", epochs=2, eval_images=0))[0]
    trainer = student(path)
    assert torch.equal(trainer.model.slot_encoder.slot_embedding, trainer.teacher.slot_encoder.slot_embedding)
    with pytest.raises(UserError, match="has slot_init learned but --slot-init is gaussian"):
        student(path, slot_init="gaussian")


def test_stage_1_has_no_teacher_to_start_as():
    with pytest.raises(UserError, match="^--initial-weights teacher is for --stage 2: use xavier or clustering"):
        check_config(replace(tiny(), initial_weights="teacher"))


def test_the_default_student_starts_as_its_teacher_and_the_papers_does_not():
    assert preset("scenes", 2).initial_weights == "teacher"
    assert preset("coco", 2).initial_weights == "xavier"
