"""Details in which published slot models of this kind differ: what `Config.implementation` chooses between."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """One code base's details.

    activation: of every MLP. project: width of the slot encoder's MLP, D → project · D → U; 0 is SPOT's D → D → D.
    slot_attention: options of `spot_kernels.SlotAttention`. final_norm: whether a LayerNorm follows the transformer
    decoder.
    """

    activation: str = "relu"
    project: int = 0
    slot_attention: tuple[tuple[str, str | float], ...] = ()
    final_norm: bool = True


IMPLEMENTATIONS = {
    "spot": Implementation(),
    "ocbench": Implementation(activation="gelu", slot_attention=(("eps", 1e-5), ("eps_in", "sum")), final_norm=False),
    "dinosaur": Implementation(project=1),
    "videosaur": Implementation(project=2, slot_attention=(("hidden", "normed"),)),
}
