"""Runs of a second: a few small scenes, 4 x 4 tokens, a random encoder."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from spot_fast.checkpoints.runs import METRICS, MODEL
from spot_fast.config import Config, preset
from spot_fast.data.batch import Batch
from spot_fast.training import trainer as trainer_module
from spot_fast.training.run_folder import RunFolder
from spot_fast.training.trainer import Outcome, Trainer

CHANGES = dict(
    image_size=32,
    mask_size=32,
    train_images=26,
    val_images=6,
    encoder_weights="none",
    num_slots=3,
    slot_dim=16,
    slot_mlp=16,
    precision="float32",
    dec_blocks=2,
    # SPOT's own start and rates: what the scenes preset has instead is tested in test_student_start and test_flat
    initial_weights="xavier",
    slot_rate=1.0,
    slot_iterations=3,
    lr=1e-3,
    epochs=4,
    batch_size=4,
    warmup_steps=7,
    log_every=4,
    eval_every=2,
)
STEPS = 24
CPU = torch.device("cpu")
TIMES = ("images_per_s", "step_ms", "mfu", "peak_memory")


def tiny(stage: int = 1, **changes) -> Config:
    return preset("scenes", stage, **{**CHANGES, **changes})


def options(**changes) -> list[str]:
    """`tiny` as command-line options."""
    words = []
    for name, value in {**CHANGES, **changes}.items():
        option = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def train(root: Path, config: Config, teacher: Path | None = None) -> tuple[Path, Outcome]:
    with RunFolder.create(config, root=root) as folder:
        return folder.path, Trainer(config, device=CPU, teacher=teacher).run(folder, tensorboard=False)


def go_on(path: Path, config: Config, teacher: Path | None = None) -> Outcome:
    with RunFolder(path) as folder:
        return Trainer(config, device=CPU, teacher=teacher).run(folder, tensorboard=False)


def with_features(trainer: Trainer, batch: Batch) -> Batch:
    """A batch of images as a cache would give it: their frozen features."""
    return replace(batch, images=None, features=trainer.forward.frozen_features(batch.images))


@contextlib.contextmanager
def stop_after(monkeypatch, step: int):
    """A run inside is asked to stop after `step`, as by Ctrl-C."""

    class Stop:
        made = False

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    stop = Stop()
    train_step = Trainer.train_step

    def counted(self, batch):
        train_step(self, batch)
        stop.made = self.step + 1 >= step

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "StopRequest", lambda: stop)
        patch.setattr(Trainer, "train_step", counted)
        yield


def metrics(path: Path) -> list[dict]:
    """Lines of metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same weights, and the same log but for times."""
    weights, expected = load_file(one / MODEL), load_file(other / MODEL)
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name
    assert metrics(one) == metrics(other)
