"""Run folders for reports: an untrained model of 4 x 4 patches with a log as a training leaves it. Made in moments."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import METRICS, MODEL, STATE, save_tensors, write_config
from spot_fast.model.spot import Spot
from tiny_runs import tiny

QUICK = ("--device", "cpu", "--images", "1", "--gradient-images", "1", "--limit", "4")


def make_run(folder: Path, stage: int = 1, *, log: bool = True, **changes) -> Path:
    config = tiny(stage, **{"val_images": 10, "dec_blocks": 1, **changes})
    folder.mkdir(parents=True)
    write_config(folder, config)
    torch.manual_seed(config.seed)
    encoder = frozen_encoder(config)
    about = encoder_metadata(encoder, config) | {"step": "24"}
    if stage == 2:
        about["teacher"] = "the-teacher"
    save_tensors(folder / MODEL, Spot(config, encoder).learned_state_dict(), about)
    state = about | {"seconds": "75.0", "images": "26", "device": "cpu", "threads": "1", "torch": torch.__version__}
    save_tensors(folder / STATE, {"nothing": torch.zeros(1)}, state)
    if log:
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in log_lines(stage)))
    return folder


def log_lines(stage: int) -> list[dict]:
    more = {"loss_rec": 0.8, "loss_att": 1.5} if stage == 2 else {}
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": 1 / step,
            "grad_norm": 0.3 / step,
            "lr": 1e-3,
            "images_per_s": 100.0 + step,
            "step_ms": 40.0,
            "peak_memory": 8e8,
            **more,
        }
        for step in range(4, 25, 4)
    ]
    scores = {"val_loss": 0.5, "mbo_i_decoder": 0.25, "mbo_i_slots": 0.3}
    return lines + [{"kind": "validation", "step": step, "epoch": step // 6, **scores} for step in (12, 24)]
