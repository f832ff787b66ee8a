"""What an exported file says about its model: names of inputs and outputs, and the settings that a user of it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spot_fast.errors import UserError

INPUT = "images"  # uint8 [B, 3, S, S]
SLOTS = "slots"  # float32 [B, K, U]
MASKS = {"decoder": "decoder_masks", "slots": "slot_masks"}  # kind → float32 [B, N, K]
LABELS = {"decoder": "decoder_labels", "slots": "slot_labels"}  # kind → uint8 [B, S, S]


def outputs(kinds: tuple[str, ...]) -> list[str]:
    """The outputs of a file with these kinds of masks, in their order."""
    return [SLOTS, *(name for kind in kinds for name in (MASKS[kind], LABELS[kind]))]


@dataclass(frozen=True)
class ExportedModel:
    """title: of the run, for people. image_size, patch_size: S and a patch's side in pixels. masks: kinds of masks in
    the file, "slots" or "decoder,slots". orders: of the decoder masks, "0" or "all" averaged, "none" without them.
    normalisation: what the graph does with pixels, which its user leaves as they are.
    """

    title: str
    image_size: int
    patch_size: int
    num_slots: int
    masks: str
    orders: str
    adaptive_slots: bool
    normalisation: str
    spot_fast: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Keys of MASKS."""
        return tuple(self.masks.split(","))

    def metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], source: str) -> ExportedModel:
        """What `metadata` made. UserError, which names `source`, for a file that `spot_fast.export` did not write."""
        read = {"int": int, "bool": lambda text: text == "True", "str": str}
        values: dict[str, Any] = {}
        try:
            for field in fields(cls):
                values[field.name] = read[field.type](metadata[field.name])
        except (KeyError, ValueError):
            raise UserError(
                f"{source} does not say what model it holds: write it with python -m spot_fast.export RUN OUT"
            ) from None
        return cls(**values)
