"""The loop: caches, logs and validation change nothing that is trained; what stops a run."""

import errno
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spot_fast.checkpoints.runs import MODEL, STATE, read_metadata
from spot_fast.errors import UserError
from spot_fast.model.spot import reconstruction_loss
from spot_fast.training import losses as losses_module
from spot_fast.training.run_folder import RunFolder
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, STEPS, assert_same_run, go_on, metrics, tiny, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of `tiny()`, uninterrupted."""
    return train(tmp_path_factory.mktemp("whole"), tiny())[0]


def test_log_and_files_of_a_run(tmp_path):
    path, outcome = train(tmp_path, tiny())
    assert (outcome.finished, outcome.step, outcome.total_steps) == (True, STEPS, STEPS)
    lines = metrics(path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(4, STEPS + 1, 4))
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines if line["kind"] == "validation"] == [2, 4]
    assert lines[-1].keys() == {"kind", "step", "epoch", "val_loss", "mbo_i_decoder", "mbo_i_slots"}
    assert outcome.scores == {name: lines[-1][name] for name in outcome.scores}
    about = read_metadata(path / MODEL)
    assert (about["step"], about["stage"], about["encoder"], about["finished"]) == ("24", "1", "spot_scenes", "true")
    assert not any("encoder.vit" in name for name in load_file(path / MODEL))
    assert len(about["encoder_sha256"]) == 64 and "teacher" not in about


def test_losses_fall_and_are_means(tmp_path):
    path, _ = train(tmp_path, tiny(log_every=1, eval_images=0))
    lines = metrics(path)
    steps = [line["loss"] for line in lines if line["kind"] == "train"]
    epochs = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert epochs == pytest.approx([sum(steps[i : i + 6]) / 6 for i in range(0, STEPS, 6)])
    assert epochs[-1] < epochs[0]


@pytest.mark.parametrize("stage, precision", [(1, "float32"), (2, "float32"), (1, "bf16"), (2, "bf16")])
def test_cached_features_and_decoded_images_train_the_same(stage, precision, tmp_path, teacher):
    config = tiny(stage, precision=precision, feature_norm=True, epochs=2)
    paths = [
        train(tmp_path, replace(config, cache=mode), teacher if stage == 2 else None)[0]
        for mode in ("features", "none")
    ]
    assert_same_run(*paths)


def test_bfloat16_trains_float32_weights_to_about_the_same_loss(tmp_path):
    losses = {}
    for precision in ("float32", "bf16"):
        path, _ = train(tmp_path, tiny(precision=precision))
        assert {value.dtype for value in load_file(path / MODEL).values()} == {torch.float32}
        losses[precision] = [line["loss"] for line in metrics(path) if line["kind"] == "epoch"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02) and losses["bf16"] != losses["float32"]


def test_log_and_validation_change_no_weight(tmp_path):
    quiet, _ = train(tmp_path, tiny(log_every=1000, eval_images=0, save_every=1000))
    busy, _ = train(tmp_path, tiny(log_every=1, eval_every=1, save_every=1))
    one, other = load_file(quiet / MODEL), load_file(busy / MODEL)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_seeds_and_stages_differ_and_repeat(tmp_path, teacher):
    def weights(*arguments, **changes):
        return Trainer(tiny(*arguments, **changes), device=CPU, teacher=None).model.learned_state_dict()

    name = "slot_encoder.mlp.0.weight"
    assert torch.equal(weights()[name], weights()[name])
    assert not torch.equal(weights()[name], weights(seed=1)[name])
    assert not torch.equal(weights()[name], weights(2)[name])


@pytest.mark.parametrize("stage, cache", [(1, "none"), (1, "features"), (2, "none")])
def test_accumulated_parts_are_the_whole_batch(stage, cache, tmp_path, teacher):
    config = tiny(stage, epochs=2, cache=cache, slot_init="gaussian")
    whole, parts = (
        train(tmp_path, replace(config, accumulate=count), teacher if stage == 2 else None)[0] for count in (1, 4)
    )
    losses = [[line["loss"] for line in metrics(run) if line["kind"] != "validation"] for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(UserError, match="--accumulate 3 does not divide the 4 images of a process"):
        Trainer(replace(config, accumulate=3), device=CPU)


def test_a_step_sets_the_scheduled_rate(monkeypatch):
    trainer = Trainer(tiny(), device=CPU)
    trainer.step = 5
    trainer.train_step(next(trainer.batches()))
    assert trainer.optimiser.param_groups[0]["lr"] == trainer.config.lr  # the last step of the warm-up


def broken_from(monkeypatch, step: int) -> None:
    """The loss of the `step`-th step of a run, counted from 1, is NaN."""
    calls = []

    def loss(prediction, target):
        calls.append(None)
        value = reconstruction_loss(prediction, target)
        return value * float("nan") if len(calls) == step else value

    monkeypatch.setattr(losses_module, "reconstruction_loss", loss)


@pytest.mark.parametrize("log_every, save_every", [(4, 1000), (1000, 5), (1000, 1000)])
def test_nan_names_its_step_and_keeps_the_last_good_state(log_every, save_every, tmp_path, monkeypatch):
    broken_from(monkeypatch, 14)
    config = tiny(log_every=log_every, save_every=save_every)
    with pytest.raises(UserError, match=r"not finite at step 14 .*: the state of step (0|10) is kept.*--lr is 0.001"):
        train(tmp_path, config)
    state = load_file(tmp_path / "scenes-stage1-001" / STATE)
    assert all(value.isfinite().all() for value in state.values())
    # The step is still right in a run that was resumed, and a run without the fault finishes.
    broken_from(monkeypatch, 14 - int(read_metadata(tmp_path / "scenes-stage1-001" / STATE)["step"]))
    with pytest.raises(UserError, match="not finite at step 14"):
        go_on(tmp_path / "scenes-stage1-001", config)
    monkeypatch.undo()
    assert go_on(tmp_path / "scenes-stage1-001", config).finished


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    with RunFolder.create(tiny(), root=tmp_path) as folder:
        trainer = Trainer(tiny(), device=CPU)
        trainer.save(folder)
        with torch.no_grad():
            trainer.parameters[0].view(-1)[0] = float("inf")
        with pytest.raises(UserError, match="is not finite after step 0"):
            trainer.save(folder)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "scenes-stage1-001" / STATE).values())


@pytest.mark.parametrize("call", [5, 6, 7, 14])
def test_a_full_disk_loses_nothing(call, tmp_path, monkeypatch, whole):
    """The disk is full when something is put on it: metrics, the state, its name, the model."""
    config = tiny(save_every=10)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(None)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left on device.*--resume"):
            train(tmp_path, config)
    path = tmp_path / "scenes-stage1-001"
    assert not [file for file in path.iterdir() if "tmp" in file.name]
    assert go_on(path, config).finished
    assert_same_run(path, whole)


@pytest.mark.parametrize("changes, what", [({"lr": 0.5}, "settings"), ({"train_images": 25}, "settings")])
def test_a_state_of_another_run_is_refused(changes, what, tmp_path):
    path, _ = train(tmp_path, tiny(epochs=1))
    with pytest.raises(UserError, match=f"cannot be resumed: it began with other {what}"):
        go_on(path, tiny(**{"epochs": 1, **changes}))


def test_a_changed_teacher_is_refused(tmp_path, teacher):
    path, _ = train(tmp_path, tiny(2, epochs=1), teacher)
    another, _ = train(tmp_path, tiny(seed=1, epochs=1))
    with pytest.raises(UserError, match="began with other teacher"):
        go_on(path, tiny(2, epochs=1), another)
