"""Protects `--init-from`: a run begins with the weights of another, of either stage and at any image size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spot_fast.checkpoints.runs import load_run, read_config
from spot_fast.config import Config, preset
from spot_fast.errors import UserError
from spot_fast.train import main
from spot_fast.training.teacher import check_origin, going_on
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, go_on, options, stop_after, tiny, train


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher) -> Path:
    return train(tmp_path_factory.mktemp("student"), tiny(2, epochs=2, eval_images=0), teacher)[0]


def from_run(folder: Path, stage: int, **changes) -> Trainer:
    return Trainer(tiny(stage, init_from=str(folder), **changes), device=CPU)


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_all_that_a_run_has_learned_is_taken(teacher, student):
    first, second = load_run(teacher).model, load_run(student).model
    again = from_run(teacher, 1).model
    assert_same(again.slot_encoder, first.slot_encoder)
    assert_same(again.decoder, first.decoder)
    goes_on = from_run(student, 2, online_teacher=True)
    for model in (goes_on.model, goes_on.teacher):
        assert_same(model.last_blocks, second.last_blocks)
        assert_same(model.slot_encoder, second.slot_encoder)
    begun = from_run(teacher, 2, online_teacher=True).model
    assert_same(begun.decoder, first.decoder)
    assert_same(begun.last_blocks, begun.encoder.copy_last_blocks())


# Random weights of a ViT depend on its grid, so runs at two sizes need those from a file.
FILE = dict(encoder_weights=None)


@pytest.mark.parametrize("changes", [FILE, {"decoder": "mlp", "orders": "standard", **FILE}])
def test_another_image_size_has_the_same_weights_on_its_own_grid(tmp_path, changes):
    """Positions of the MLP decoder are resampled; constant ones stay what they are."""
    path, _ = train(tmp_path, tiny(epochs=2, eval_images=0, **changes))
    small = load_run(path).model
    larger = from_run(path, 1, image_size=48, mask_size=48, **changes).model
    assert (small.encoder.grid, larger.encoder.grid) == (4, 6)
    assert_same(larger.slot_encoder, small.slot_encoder)
    if "decoder" in changes:
        assert larger.decoder.positions.shape == (36, small.decoder.positions.shape[1])
        mean, expected = larger.decoder.positions.mean(0), small.decoder.positions.mean(0)
        torch.testing.assert_close(mean, expected, atol=0.02, rtol=0.2)
    else:
        assert larger.decoder.orders.shape == (9, 36)
        assert_same(larger.decoder, small.decoder)
    assert larger.encode(torch.zeros(1, 3, 48, 48))[0].shape[1] == 36


def test_a_run_goes_on_for_a_tenth_with_its_own_settings(student):
    first = replace(read_config(student), epochs=44, warmup_steps=100, lr=3e-4, dec_blocks=2)
    asked = Config(stage=2, preset="scenes", seed=5, log_every=7, init_from="RUN")
    config = going_on(asked, first, {"image_size": 64})
    assert (config.epochs, config.warmup_steps, config.lr, config.image_size) == (4, 10, 3e-4, 64)
    assert (config.seed, config.log_every, config.init_from, config.slot_dim) == (5, 7, "RUN", first.slot_dim)
    assert going_on(asked, replace(first, epochs=2), {}).epochs == 1
    # on another data set its images, not its slots
    other = going_on(preset("voc", 2, data="VOC", init_from="RUN"), first, {"preset": "voc"})
    assert (other.preset, other.data, other.crop, other.mask_size) == ("voc", "VOC", "random", 320)
    assert (other.num_slots, other.image_size, other.lr) == (first.num_slots, first.image_size, 3e-4)


def test_the_command_line(tmp_path, teacher, capsys):
    """A student goes on with an online teacher, here at another size."""
    config = tiny(2, epochs=2, eval_images=0, online_teacher=True, **FILE)
    student, _ = train(tmp_path, config)
    words = ["--no-tensorboard", "--threads", "1", "--eval-images", "0"]
    size = ["--image-size", "48", "--mask-size", "48"]
    assert main([*words, "--stage", "2", "--init-from", str(student), *size, "--out", str(tmp_path / "on")]) == 0
    run = load_run(tmp_path / "on")
    assert run.config.online_teacher and run.config.epochs == 1 and run.config.slot_dim == 16
    assert run.metadata["init_from"] == student.name and len(run.metadata["init_from_sha256"]) == 64
    # The stage-1 run itself teaches the student that begins with its weights.
    assert main([*words, "--stage", "2", "--init-from", str(teacher), "--epochs", "1", "--warmup-steps", "0",
                 "--out", str(tmp_path / "second")]) == 0  # fmt: skip
    second = load_run(tmp_path / "second")
    assert second.metadata["teacher"] == second.metadata["init_from"] == teacher.name
    assert "from --init-from" in capsys.readouterr().out


def test_a_stopped_run_does_not_need_the_run_it_began_from(tmp_path, teacher, monkeypatch):
    gone = tmp_path / "gone"
    gone.symlink_to(teacher, target_is_directory=True)
    config = tiny(1, init_from=str(gone), eval_images=0)
    with stop_after(monkeypatch, 5):
        path, _ = train(tmp_path, config)
    gone.unlink()
    assert main(["--resume", str(path), "--no-tensorboard"]) == 0
    assert load_run(path).metadata["init_from"] == "gone"
    with pytest.raises(UserError):
        go_on(path, config)  # only the command line knows that the state has the weights


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dec_blocks": 3}, "has dec_blocks 2 but --dec-blocks is 3: drop the option or choose another run"),
        ({"encoder": "vit_tiny_patch16_224"}, "has encoder spot_scenes but --encoder is vit_tiny_patch16_224"),
        ({"orders": "standard"}, "has orders spot9 but --orders is standard"),
    ],
)
def test_a_run_of_another_model_names_what_differs(changes, sentence, teacher):
    with pytest.raises(UserError, match=sentence):
        check_origin(teacher, read_config(teacher), tiny(1, **changes))


def test_what_cannot_be_begun(teacher, student, capsys, tmp_path):
    with pytest.raises(UserError, match="is a student, whose encoder has trained: add --stage 2"):
        check_origin(student, read_config(student), tiny(1))
    with pytest.raises(UserError, match="was trained with other weights of spot_scenes: use its --encoder-weights"):
        from_run(teacher, 1, encoder_weights=None)
    assert main(["--init-from", str(teacher), *options(), "--out", str(tmp_path / "x")]) == 2
    assert "--initial-weights both say where training starts: drop one" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
