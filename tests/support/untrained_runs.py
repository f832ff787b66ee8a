"""Finished runs whose models know nothing: made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, Run, load_run, save_tensors, write_config
from spot_fast.config import Config
from spot_fast.model.spot import Spot

TINY = {"encoder_weights": "none", "dec_blocks": 1, "slot_dim": 16, "slot_mlp": 16}  # of preset scenes


def untrained(folder: Path, config: Config, seed: int = 0) -> Run:
    """A run of `config` in `folder`, with random weights."""
    encoder = frozen_encoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Spot(config, encoder)
        if model.last_blocks is not None:
            for parameter in model.last_blocks.parameters():  # training would have moved them
                parameter.data += 0.01 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    write_config(folder, config)
    metadata = encoder_metadata(encoder, config)
    save_tensors(folder / MODEL, model.learned_state_dict(), metadata)
    return load_run(folder, encoder=encoder)
