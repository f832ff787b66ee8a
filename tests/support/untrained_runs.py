"""Finished runs whose models know nothing: made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from spot_fast.checkpoints import runs as checkpoint
from spot_fast.config import Config
from spot_fast.model.spot import Spot


def untrained(folder: Path, config: Config, seed: int = 0) -> checkpoint.Run:
    """A run of `config` in `folder`, with random weights."""
    encoder = checkpoint.frozen_encoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Spot(config, encoder)
        if model.last_blocks is not None:
            for parameter in model.last_blocks.parameters():  # training would have moved them
                parameter.data += 0.01 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    checkpoint.write_config(folder, config)
    metadata = checkpoint.encoder_identity_metadata(encoder, config)
    checkpoint.save_tensors(folder / checkpoint.MODEL, model.learned_state_dict(), metadata)
    return checkpoint.load_run(folder, encoder=encoder)
