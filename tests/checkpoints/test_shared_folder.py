"""Protects shared folders: their contents, that they load anywhere, and that a failure leaves nothing behind."""

import json
import os
import shutil

import pytest
import torch

from spot_fast.api import Spot
from spot_fast.checkpoints.runs import METRICS, load_run, read_tensors, save_tensors
from spot_fast.checkpoints.shared_folder import last_scores, save_pretrained
from spot_fast.errors import UserError
from tiny_runs import tiny
from untrained_runs import untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of an encoder that neither the hub nor the package has."""
    config = tiny(data="/home/me", sbd="/home/me", cache_dir="/home/me", init_from="/home/me")
    run = untrained(tmp_path_factory.mktemp("runs") / "run", config)
    lines = [
        {"kind": "validation", "step": 1, "epoch": 1, "mbo_i_slots": 0.1},
        {"kind": "validation", "step": 2, "epoch": 2, "mbo_i_slots": 0.25, "val_loss": 0.5},
        {"kind": "train", "step": 3, "loss": 9.0},
    ]
    (run.path / METRICS).write_text("\n".join(map(json.dumps, lines)) + '\n{"half')
    return run


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_model_loads_from_wherever_it_was_moved_to(run, tmp_path, monkeypatch):
    model = Spot.from_pretrained(run.path, "cpu")
    model.save_pretrained(tmp_path / "new" / "model")
    shutil.move(tmp_path / "new", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    again = Spot.from_pretrained("model", "cpu")
    assert equal(model, again) and not again.training
    again.save_pretrained("copy")  # and what was loaded can be saved again
    assert equal(model, Spot.from_pretrained("copy", "cpu"))
    assert sorted(os.listdir("copy")) == ["README.md", "config.json", "encoder.safetensors", "model.safetensors"]


def test_nothing_of_this_machine_is_in_it(run, tmp_path):
    save_pretrained(run.model, tmp_path / "model")
    for name in ("config.json", "README.md"):
        text = (tmp_path / "model" / name).read_text(encoding="utf-8")
        assert "/home/me" not in text and str(tmp_path) not in text and str(run.path) not in text


def test_weights_that_everyone_has_are_not_copied(tmp_path):
    packaged = untrained(tmp_path / "run", tiny(encoder_weights=None)).model
    save_pretrained(packaged, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "config.json", "model.safetensors"]
    assert equal(packaged, Spot.from_pretrained(tmp_path / "model", "cpu"))


def test_the_card_has_the_last_scores_of_the_run_or_those_given(run, tmp_path):
    model = Spot.from_pretrained(run.path)
    assert last_scores(run.path) == {"mbo_i_slots": 0.25, "val_loss": 0.5}
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", scores={"mIoU on photos": 0.125})
    own, given = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("own", "given"))
    assert "| mBO_i, slot masks | 0.2500 |" in own and "0.1000" not in own
    assert "| mIoU on photos | 0.1250 |" in given and "0.2500" not in given


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("x")
    for name in ("own", "own/file"):
        with pytest.raises(UserError, match="exists and is not overwritten: choose a name"):
            save_pretrained(run.model, tmp_path / name)

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("spot_fast.checkpoints.shared_folder.os.replace", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        save_pretrained(run.model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["own"] and os.listdir(tmp_path / "own") == ["file"]


def test_other_precisions_are_not_mixed_up_with_the_encoders_hash(run, tmp_path):
    model = load_run(run.path).model.double()
    with pytest.raises(UserError, match="weights in torch.float64, files are float32: save it after model.float()"):
        save_pretrained(model, tmp_path / "model")
    save_pretrained(model.float(), tmp_path / "model")
    assert equal(run.model, Spot.from_pretrained(tmp_path / "model", "cpu"))


def test_a_changed_encoder_file_is_noticed(run, tmp_path):
    save_pretrained(run.model, tmp_path / "model")
    path = tmp_path / "model" / "encoder.safetensors"
    tensors, metadata = read_tensors(path)
    tensors["cls_token"] += 1
    save_tensors(path, tensors, metadata)
    with pytest.raises(UserError, match="trained with encoder spot_scenes of sha256"):
        Spot.from_pretrained(tmp_path / "model")
