"""Protects run folders: they are read back whole, damage is named, and the newest run is found."""

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from spot_fast.checkpoints.runs import (
    CONFIG,
    METRICS,
    MODEL,
    STATE,
    find_folder,
    find_run,
    load_run,
    read_tensors,
    save_tensors,
    write_config,
)
from spot_fast.errors import UserError
from spot_fast.model.encoder import normalise
from spot_fast.training.run_folder import RunFolder, is_free
from tiny_runs import tiny, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), tiny(eval_images=0))[0]


@pytest.fixture
def run(trained, tmp_path):
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_is_read_back(run):
    loaded = load_run(str(run))
    assert loaded.path == run and loaded.config == tiny(eval_images=0)
    assert loaded.metadata["step"] == "24" and not loaded.model.training
    saved, _ = read_tensors(run / MODEL)
    own = loaded.model.learned_state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(own[name], saved[name]) for name in saved)
    images = normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert loaded.model.segment(images).masks.shape == (2, 16, 3)


def test_an_encoder_can_be_shared(run):
    encoder = load_run(run).model.encoder
    assert load_run(run, encoder=encoder).model.encoder is encoder


def test_missing_and_unfinished_runs(run, tmp_path):
    with pytest.raises(UserError, match="run .*nowhere is not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json: it is not the folder of a run"):
        load_run(tmp_path)
    (run / MODEL).unlink()
    with pytest.raises(UserError, match=f"is not finished: go on with python -m spot_fast.train --resume {run}"):
        load_run(run)


@pytest.mark.parametrize("file", [MODEL, STATE])
def test_a_damaged_file_is_named(run, file):
    os.truncate(run / file, 1000)
    with pytest.raises(UserError, match=f"{file} cannot be read .*: it is damaged"):
        read_tensors(run / file)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON"),
        ('{"colour": 3}', "unknown keys colour"),
        ("[1]", ""),
        ('{"lr": "fast"}', "lr is 'fast', not float"),
        ('{"seed": true}', "seed is True, not int"),
    ],
)
def test_a_damaged_config_is_named(run, text, reason):
    (run / CONFIG).write_text(text)
    with pytest.raises(UserError, match=f"config.json cannot be used .*{reason}"):
        load_run(run)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<html>Sign in</html>", "is a web page, not .*download it again"),
        (b"", "is empty: download it again"),
    ],
)
def test_a_pointer_or_web_page_in_place_of_a_file_is_named(run, data, words):
    (run / MODEL).write_bytes(data)
    with pytest.raises(UserError, match=f"{MODEL} {words}"):
        load_run(run)
    (run / CONFIG).write_bytes(data)
    with pytest.raises(UserError, match=f"{CONFIG} cannot be used .{words}"):
        load_run(run)


def test_weights_that_are_not_finite_are_named(run):
    """A file of another machine, or one that was changed on disk: every image would be NaN."""
    tensors, metadata = read_tensors(run / MODEL)
    name = next(iter(sorted(tensors)))
    tensors[name].view(-1)[0] = float("nan")
    save_tensors(run / MODEL, tensors, metadata)
    with pytest.raises(UserError, match=f"{MODEL} does not fit .*tensor {name} has 1 of .* values that are NaN"):
        load_run(run)


def test_another_shape_and_another_encoder(run):
    config = tiny(eval_images=0)
    write_config(run, replace(config, num_slots=3, slot_dim=32))
    with pytest.raises(UserError, match=r"model.safetensors does not fit its config.json: .* needs \[.*32"):
        load_run(run)
    write_config(run, replace(config, image_size=40))
    with pytest.raises(UserError, match="trained with encoder spot_scenes of sha256 .* but the weights found"):
        load_run(run)


def test_newest_run(tmp_path):
    def make(name, config, when, finished=True):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, config)
        os.utime(folder / CONFIG, (when, when))
        if finished:
            save_file({"a": torch.zeros(1)}, folder / MODEL)
            os.utime(folder / MODEL, (when, when))
        return folder

    with pytest.raises(UserError, match="no finished run in .*: train one with python -m spot_fast.train --stage 1"):
        find_run(tmp_path)
    half = make("scenes-stage1-003", tiny(), 9, finished=False)
    with pytest.raises(UserError, match=f"finish scenes-stage1-003 with .*--resume {half}"):
        find_run(tmp_path)
    first = make("scenes-stage1-001", tiny(), 5)
    second = make("scenes-stage1-002", tiny(), 3)
    student = make("scenes-stage2-001", tiny(2), 7)
    (tmp_path / "other").mkdir()
    (make("broken", tiny(), 20) / CONFIG).write_text("{")
    assert find_run(tmp_path) == student
    assert find_run(tmp_path, stage=1) == first != second
    assert find_run(tmp_path, finished=False) == half
    with pytest.raises(UserError, match="no finished stage 2 run of preset voc"):
        find_run(tmp_path, preset="voc", stage=2)
    assert find_folder("scenes-stage2-001", tmp_path) == student
    assert find_folder(student, "elsewhere") == student


def test_folders_are_numbered_and_locked(tmp_path):
    (tmp_path / "scenes-stage1-007").mkdir()
    with RunFolder.create(tiny(), root=tmp_path) as folder:
        assert folder.path.name == "scenes-stage1-008" and not is_free(folder.path)
        with pytest.raises(UserError, match="is being trained by another process"):
            RunFolder(folder.path)
    assert is_free(folder.path)
    RunFolder(folder.path).close()


def test_out_has_to_be_empty(tmp_path):
    out = tmp_path / "deep" / "own"
    RunFolder.create(tiny(), root=tmp_path, out=out).close()
    with pytest.raises(UserError, match="--out .* is not an empty folder: add --resume"):
        RunFolder.create(tiny(), root=tmp_path, out=out)
    with pytest.raises(UserError, match="choose another folder"):
        RunFolder.create(tiny(), root=tmp_path, out=tmp_path)


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    RunFolder.create(tiny(), root=tmp_path, out=tmp_path / "a").close()
    for name in (".tmpXYZ", f".{STATE}.tmp"):
        (tmp_path / "a" / name).write_bytes(b"half")
    RunFolder(tmp_path / "a").close()
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, METRICS]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"step": "1"})
    before = path.read_bytes()

    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for target, error in (("save_file", full), ("os.replace", _no_space)):
        with monkeypatch.context() as patch:
            patch.setattr(f"spot_fast.checkpoints.runs.{target}", error)
            with pytest.raises(UserError, match="x.safetensors cannot be written .No space left on device.*intact"):
                save_tensors(path, {"a": torch.zeros(2)}, {"step": "2"})
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def _no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_have_the_usual_permissions(trained):
    modes = {name: (trained / name).stat().st_mode for name in (CONFIG, MODEL, STATE)}
    assert len(set(modes.values())) == 1, modes
