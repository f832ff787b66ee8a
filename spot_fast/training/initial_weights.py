"""The weights that a new run trains from, where they are not those that its modules draw: `--initial-weights`, and
`--init-from` for those of another run."""

from __future__ import annotations

from pathlib import Path

import torch

from spot_fast.checkpoints.runs import load_run
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.regrid import at_grid
from spot_fast.model.spot import Spot
from spot_fast.model.transformer_decoder import TransformerDecoder


def set_initial_weights(model: Spot, start: str, teacher: Spot | None = None) -> None:
    """Changes the slot encoder and decoder of a model just built on the CPU to begin as `Config.initial_weights` says.

    xavier: as they are; clustering: slots group features and the decoder looks them up, which `check_config` checks;
    teacher: those of the stage-1 `teacher`, for whose shapes `check_teacher` stands. Random parts are PyTorch's draws.
    """
    if start == "clustering":
        rotation = model.slot_encoder.start_as_clustering()
        if isinstance(model.decoder, TransformerDecoder):
            model.decoder.start_from_slots(rotation)
    elif start == "teacher":
        model.slot_encoder.start_as(teacher.slot_encoder)
        model.decoder.load_state_dict(teacher.decoder.state_dict())


def start_from_run(model: Spot, folder: Path) -> None:
    """Gives a model just built on the CPU the weights of the finished run in `folder`, at its own image size.

    Slots that the run draws become learned ones by one draw; a student begins with the run's last blocks if it has
    trained any. `teacher.check_origin` stands for the shapes. UserError if the encoder's weights differ.
    """
    run = load_run(folder).model
    if not _same_weights(run.encoder, model.encoder):
        raise UserError(
            f"--init-from {folder} was trained with other weights of {model.config.encoder}: use its --encoder-weights"
        )
    if run.last_blocks is not None:
        model.last_blocks.load_state_dict(run.last_blocks.state_dict())
    model.slot_encoder.start_as(run.slot_encoder)
    grid = model.encoder.grid
    model.decoder.load_state_dict(at_grid(run, grid, grid).decoder.state_dict())


def _same_weights(one: Encoder, other: Encoder) -> bool:
    """Whether two frozen ViTs are the same but for the grid of their positions."""
    ours, theirs = ({n: w for n, w in e.vit.state_dict().items() if n != "pos_embed"} for e in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name].cpu()) for name in ours)
