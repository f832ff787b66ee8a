"""A checkpoint of another implementation in this package's terms, ready to build a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spot_fast.checkpoints.encoder_weights import load_vit_weights
from spot_fast.config import Config
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.model.vits import build_vit


@dataclass(frozen=True)
class Converted:
    """learned: tensors by `Spot`'s names. vit: the frozen ViT's by timm's names, as stored. unused: tensors kept only
    so that converting back gives the same file. notes: for the user."""

    config: Config
    learned: Mapping[str, Tensor]
    vit: Mapping[str, Tensor]
    unused: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def model(self) -> Spot:
        """The model in eval mode; UserError if its tensors do not fit its settings."""
        config, vit = self.config, build_vit(self.config)
        load_vit_weights(vit, self.vit, pos_resize=config.pos_resize, source="the checkpoint")
        model = Spot(config, Encoder(vit, last_blocks=config.train_blocks, feature_norm=config.feature_norm))
        model.load_learned_state_dict(self.learned)
        return model.eval()
