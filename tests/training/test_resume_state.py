"""A run that was stopped, by whatever, ends with the weights of a run that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paths import ROOT
from spot_fast.checkpoints.runs import METRICS, MODEL, STATE, read_metadata
from tiny_runs import assert_same_run, go_on, metrics, options, stop_after, tiny, train


def start(folder: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "spot_fast.train",
        "--threads",
        "1",
        "--no-tensorboard",
        *options(epochs=8, log_every=1, eval_every=4),
        *words,
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen, ready) -> None:
    end = time.monotonic() + 300  # on a busy machine the imports alone take a minute
    while not ready():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.01)


def saved_step(run: Path) -> int:
    return int(read_metadata(run / STATE)["step"]) if (run / STATE).is_file() else -1


@pytest.mark.slow
def test_killed_twice_and_resumed_is_uninterrupted(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = start(tmp_path / "whole")
    run = tmp_path / "parts/runs/scenes-stage1-001"
    log = run / METRICS

    # Killed before anything but the initial state was saved.
    process = start(tmp_path / "parts")
    wait_for(process, lambda: log.is_file() and log.read_text().count("\n") > 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL and saved_step(run) == 0

    # Killed at some step after a save.
    process = start(tmp_path / "parts", "--resume", "--save-every", "7")
    wait_for(process, lambda: saved_step(run) >= 14 and len(metrics(run)) % 3 == 0)
    process.kill()
    process.wait()
    assert not (run / MODEL).exists()

    process = start(tmp_path / "parts", "--resume")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert whole.communicate(timeout=300) and whole.returncode == 0
    assert_same_run(run, tmp_path / "whole/runs/scenes-stage1-001")
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": "none", "flip": True, "orders": "standard", "cappa": 0.5},
        {"decoder": "mlp", "dec_mlp_hidden": 16, "orders": "standard", "log_every": 5},
        {"decoder": "masked", "log_every": 5},
    ],
)
def test_stopping_anywhere_changes_nothing(changes, tmp_path, monkeypatch):
    config = tiny(**changes)
    whole, _ = train(tmp_path, config)
    # After the first step, inside an epoch, at an epoch's end, between two log lines.
    with stop_after(monkeypatch, 1):
        parts, outcome = train(tmp_path, config)
    assert (outcome.finished, outcome.step) == (False, 1)
    for step in (9, 12, 15):
        with stop_after(monkeypatch, step):
            assert go_on(parts, config).step == step
    assert go_on(parts, config).finished
    assert_same_run(parts, whole)


def test_stage_2_goes_on_exactly(tmp_path, monkeypatch):
    teacher, _ = train(tmp_path, tiny())
    config = tiny(stage=2, att_weight_final=0.001)
    whole, _ = train(tmp_path, config, teacher)
    with stop_after(monkeypatch, 7):
        parts, _ = train(tmp_path, config, teacher)
    assert go_on(parts, config, teacher).finished
    assert_same_run(parts, whole)


def test_stopped_after_the_last_step_only_the_model_file_is_missing(tmp_path):
    path, outcome = train(tmp_path, tiny())
    before = load_file(path / MODEL)
    (path / MODEL).unlink()
    again = go_on(path, tiny())
    assert again.finished and again.scores == outcome.scores
    assert all(torch.equal(value, before[name]) for name, value in load_file(path / MODEL).items())


def test_a_line_cut_by_a_kill_is_removed(tmp_path, monkeypatch):
    config = tiny()
    whole, _ = train(tmp_path, config)
    with stop_after(monkeypatch, 10):
        parts, _ = train(tmp_path, config)
    with open(parts / METRICS, "a") as file:
        file.write('{"kind": "train", "step": 12, "loss": 1.0}\n{"kind": "epoch", "st')
    assert go_on(parts, config).finished
    assert_same_run(parts, whole)
