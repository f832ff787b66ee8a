"""The models of a run before its first step: the one that trains, its teacher, and the facts to record about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.model.spot import Spot
from spot_fast.precision import store_in_bfloat16
from spot_fast.random_streams import Stream, seed_of
from spot_fast.training import float8
from spot_fast.training.initial_weights import set_initial_weights, start_from_run
from spot_fast.training.moving_average import frozen_copy
from spot_fast.training.teacher import load_teacher, teacher_hash


@dataclass(frozen=True)
class Models:
    """encoder_metadata, origins: about the encoder, and about the runs that teach and that it began from.

    float8_layers: layers of the decoder that multiply in float8.
    """

    model: Spot
    teacher: Spot | None
    encoder_metadata: dict[str, str]
    origins: dict[str, str]
    float8_layers: int


def build_models(
    config: Config, device: torch.device, precision: str, *, teacher: Path | None, resumed: bool = False
) -> Models:
    """Models of a run of `config` on `device`; UserError if something is missing or does not fit.

    teacher: the stage-1 run that teaches. resumed: weights come from a saved state, so the run that it began from is
    not read again.
    """
    encoder = frozen_encoder(config).to(device)
    metadata, origins, taught_by = encoder_metadata(encoder, config), {}, None
    if teacher is not None:
        taught_by = load_teacher(teacher, config, encoder, device)
        origins |= {"teacher": teacher.name, "teacher_sha256": teacher_hash(teacher)}
    # Weights are drawn on the CPU, so that they are the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(Stream.INITIAL_WEIGHTS, config.seed, config.stage))
        model = Spot(config, encoder)
        if config.init_from is None:
            set_initial_weights(model, config.initial_weights, taught_by)
        elif not resumed:
            origin = Path(config.init_from)
            start_from_run(model, origin)
            origins |= {"init_from": origin.name, "init_from_sha256": teacher_hash(origin)}
        model = model.to(device).train()
    if precision == "bf16":
        # Frozen weights need no float32 master: autocast would round them anew in every step.
        store_in_bfloat16(encoder)
        if taught_by is not None:
            store_in_bfloat16(taught_by.slot_encoder)
            store_in_bfloat16(taught_by.decoder)
    if config.online_teacher:
        taught_by = frozen_copy(model)  # in float32: small changes would be rounded away
    layers = 0
    if config.float8:
        if precision != "bf16":
            raise UserError(f"--float8 belongs to --precision bf16, not {precision}: leave one out")
        float8.require(device)
        layers = float8.convert(model.decoder)
    return Models(model, taught_by, metadata, origins, layers)
