"""Protects `--teacher ema`: the teacher is the student's moving average in every kind of step, on its own schedule, and
a stopped run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch

from spot_fast.checkpoints.runs import STATE, read_tensors
from spot_fast.config import Config, check_config, preset
from spot_fast.errors import UserError
from spot_fast.train import main
from spot_fast.training.losses import teacher_labels
from spot_fast.training.schedule import teacher_momentum
from spot_fast.training.trainer import Trainer
from spot_kernels import dispatch
from tiny_runs import CPU, STEPS, assert_same_run, go_on, stop_after, tiny, train

ONLINE = dict(online_teacher=True, ema_momentum=0.5)


def learned(model) -> dict[str, torch.Tensor]:
    return {
        name: weight.detach().clone() for name, weight in model.named_parameters() if not name.startswith("encoder")
    }


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("flat", [True, False])
def test_the_teacher_is_the_average_of_the_students_so_far(flat, precision):
    changes = dict(precision=precision, **ONLINE)
    with dispatch.without(*([] if flat else ["flat_parameters"])):
        trainer = Trainer(tiny(2, **changes), device=CPU)
        expected = learned(trainer.model)
        for trainer.step in range(3):
            trainer.train_step(next(trainer.batches()))
            momentum = teacher_momentum(trainer.config, trainer.step, trainer.total_steps)
            for name, weight in learned(trainer.model).items():
                expected[name] = momentum * expected[name] + (1 - momentum) * weight
    own = learned(trainer.teacher)
    assert own.keys() == expected.keys() and any(name.startswith("last_blocks") for name in own)
    for name, weight in expected.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-5, atol=1e-7)
        assert not torch.equal(own[name], learned(trainer.model)[name])


def test_the_average_moves_ever_less():
    config = tiny(2, online_teacher=True, ema_momentum=0.9)
    momenta = [teacher_momentum(config, step, STEPS) for step in range(STEPS)]
    assert momenta[0] == pytest.approx(0.9) and momenta == sorted(momenta) and 0.999 < momenta[-1] < 1


def test_the_teacher_sees_what_its_own_blocks_make_of_an_image():
    trainer = Trainer(tiny(2, **ONLINE), device=CPU)
    with torch.no_grad():
        for weight in trainer.teacher.last_blocks.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    batch, draws = next(trainer.batches()), trainer.draw(0)
    target, hidden = trainer.forward.targets(batch)
    labels = trainer.forward.teach(target, hidden, draws)
    features = trainer.teacher.encoder.finish(hidden, trainer.teacher.last_blocks)
    output = trainer.teacher(features, target, draws.teacher_order)
    assert torch.equal(labels, teacher_labels(output.masks))
    assert not torch.equal(labels, teacher_labels(trainer.teacher(target, target, draws.teacher_order).masks))


def test_a_warm_up_has_no_teacher_and_the_same_numbers_in_the_log():
    trainer = Trainer(tiny(2, att_warmup_steps=2, **ONLINE), device=CPU)
    seen = []
    for trainer.step in range(4):
        trainer.train_step(next(trainer.batches()))
        seen.append(trainer.meter.read(trainer.meter.interval, 1))
    assert [values["loss_att"] > 0 for values in seen] == [False, False, True, True]
    assert all(values.keys() == seen[0].keys() for values in seen)
    assert seen[1]["loss"] == seen[1]["loss_rec"] and seen[2]["loss"] > seen[2]["loss_rec"]


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = tiny(2, att_warmup_steps=5, **ONLINE)
    whole, _ = train(tmp_path / "whole", config)
    with stop_after(monkeypatch, 11):
        path, outcome = train(tmp_path / "parts", config)
    assert not outcome.finished
    tensors, _ = read_tensors(path / STATE)
    differ = [n for n in tensors if n.startswith("teacher.") and not torch.equal(tensors[n], tensors["model." + n[8:]])]
    assert differ
    assert go_on(path, config).finished
    assert_same_run(path, whole)


def test_the_command_line_without_a_stage_1_run_takes_its_course(tmp_path, capsys):
    """One run: stage 1's length and start, which stage 2's preset has not, but for what is given."""
    words = ["--stage", "2", "--teacher", "ema", "--print-config"]
    config = config_of(capsys, words)
    first, second = preset("scenes", 1), preset("scenes", 2)
    assert config.online_teacher and config.stage == 2 and second.initial_weights == "teacher"
    for name in ("epochs", "lr", "lr_low", "warmup_steps", "slot_rate", "initial_weights"):
        assert getattr(config, name) == getattr(first, name)
    assert config.slot_init == second.slot_init and config.att_weight == second.att_weight
    assert config_of(capsys, [*words, "--epochs", "3"]).epochs == 3


def config_of(capsys, words: list[str]) -> Config:
    assert main(words) == 0
    return Config.from_json(capsys.readouterr().out)


@pytest.mark.parametrize(
    "stage, changes, sentence",
    [
        (1, {}, "--teacher ema belongs to stage 2"),
        (2, {"ema_momentum": 1.5}, "--ema-momentum is 1.5: use 1 or less"),
        (2, {"initial_weights": "teacher"}, "--initial-weights teacher needs a stage-1 run: add --init-from RUN"),
    ],
)
def test_senseless_settings(stage, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_config(tiny(stage, **{"online_teacher": True, **changes}))


def test_a_warm_up_as_long_as_the_run():
    with pytest.raises(UserError, match=f"--att-warmup-steps {STEPS} leaves none of the {STEPS} steps to the teacher"):
        Trainer(tiny(2, att_warmup_steps=STEPS, **ONLINE), device=CPU)


def test_one_teacher_is_named(capsys):
    assert main(["--stage", "2", "--online-teacher", "--teacher", "runs/x"]) == 2
    assert "--online-teacher and --teacher runs/x both name the teacher: drop one" in capsys.readouterr().err
