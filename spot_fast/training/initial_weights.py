"""The weights that a new run trains from, where they are not those that its modules draw (`--initial-weights`)."""

from __future__ import annotations

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
