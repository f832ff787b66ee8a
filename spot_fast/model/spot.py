"""SPOT (arXiv 2312.00648): frozen ViT, slot-attention encoder and a decoder that predicts the ViT's features.

Axes: B images, N = G·G patch tokens in raster layout, D encoder width, K slots, U slot width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.model.adaptive_slots import joined, slot_groups
from spot_fast.model.decoders import AutoregressiveDecoder, build_decoder
from spot_fast.model.encoder import Encoder
from spot_fast.model.implementations import IMPLEMENTATIONS
from spot_fast.model.slot_encoder import SlotEncoder
from spot_fast.model.tensor_checks import require_finite
from spot_kernels.modules.layers import is_exactly
from spot_kernels.modules.order_layout import take_rows


@dataclass
class SpotOutput:
    """slots [B, K, U]; slot_attn [B, N, K] and slot_logits [B, H, N, K] of the last slot-attention iteration;
    prediction [B, N, D]; decoder masks [B, N, K].

    order: int64 [N] or [B, N], the sequence in which the tokens of prediction and masks lie; None: raster layout, as
    all else is.
    """

    slots: Tensor
    slot_attn: Tensor
    slot_logits: Tensor
    prediction: Tensor
    masks: Tensor
    order: Tensor | None = None

    def beside_prediction(self, target: Tensor) -> Tensor:
        """The target [B, N, D], which needs no gradient, from raster into the prediction's layout."""
        return target if self.order is None else take_rows(target, self.order)


class Spot(nn.Module):
    """The whole model around a shared frozen encoder.

    Stage 1 (`config.stage == 1`) trains `slot_encoder` and `decoder` on frozen features; stage 2 also has
    `last_blocks`, a trainable copy of the encoder's last blocks. Training mode changes nothing. A teacher is another
    Spot around the same Encoder object.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        if config.implementation not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise UserError(f"--implementation {config.implementation} is unknown: use one of {known}")
        self.config = config
        self.encoder = encoder
        self.last_blocks = encoder.copy_last_blocks() if config.stage == 2 else None
        try:
            self.slot_encoder = SlotEncoder(
                encoder.dim,
                config.num_slots,
                config.slot_dim,
                config.slot_mlp,
                heads=config.slot_heads,
                iterations=config.slot_iterations,
                init=config.slot_init,
                truncation=config.truncation,
                implementation=IMPLEMENTATIONS[config.implementation],
            )
            self.decoder = build_decoder(config, encoder)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"this model cannot be built: {error}") from error

    @property
    def num_orders(self) -> int:
        """Patch orders P of the decoder: 9, or 1 for the standard order alone."""
        return self.decoder.num_orders

    def train(self, mode: bool = True) -> Spot:
        super().train(mode)
        if self.last_blocks is not None:
            self.last_blocks.eval()  # the ViT's dropout and stochastic depth stay off while its blocks train
        return self

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, S, S] → features [B, N, D] for the slots and frozen target features [B, N, D].

        In stage 1 both are the same tensor.
        """
        return self.encode_hidden(self.encoder.trunk(images))

    def encode_hidden(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, from the trunk's output [B, prefix + N, D]."""
        target = self.encoder.finish(hidden)
        features = target if self.last_blocks is None else self.encoder.finish(hidden, self.last_blocks)
        return features, target

    def forward(
        self,
        features: Tensor,
        target: Tensor,
        order_index: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        parallel: bool = False,
        moved: bool = False,
        draws: Mapping[str, Tensor] | None = None,
    ) -> SpotOutput:
        """Slots of `features` [B, N, D], and what the decoder makes of them.

        Args:
            features, target: from `encode`; the decoder is fed the target.
            order_index: patch order of the step as an int64 tensor [] or [B] on the model's device; None = order 0.
            noise: standard-normal draw [B, K, U] for gaussian slots; None draws it.
            parallel: a CapPa step.
            moved: the decoder may leave prediction and masks in the order in which it decoded them.
            draws: of the decoder for a training step, as its method `draws` makes them.
        """
        slots, attn, logits = self.slot_encoder(features, noise)
        # not where a derived class or a hook may expect a call of forward
        if moved and is_exactly(self.decoder, AutoregressiveDecoder):
            return SpotOutput(slots, attn, logits, *self.decoder.decode(slots, target, order_index, parallel=parallel))
        needed = self.needed_by_decoder(slot_attn=attn, draws=draws)
        prediction, masks = self.decoder(slots, target, order_index, parallel=parallel, **needed)
        return SpotOutput(slots, attn, logits, prediction, masks)

    def groups(self, slot_attn: Tensor, target: Tensor) -> Tensor | None:
        """The slots that belong together, int64 [B, K], of slot masks [B, N, K]; None without `adaptive_slots`."""
        config = self.config
        return slot_groups(slot_attn, target, config.slot_variance) if config.adaptive_slots else None

    def needed_by_decoder(self, **values: Any) -> dict[str, Any]:
        """The keyword arguments that the decoder takes beside slots, target and order: those that its `needs` names."""
        return {name: values[name] for name in getattr(self.decoder, "needs", ()) if name in values}

    def decode_masks(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None = None, *, slot_attn: Tensor | None = None
    ) -> Tensor:
        """The decoder masks [B, N, K] alone: all that a teacher has to give."""
        return self.decoder.masks(slots, target, order_index, **self.needed_by_decoder(slot_attn=slot_attn))

    def decode_all_orders(
        self, slots: Tensor, target: Tensor, *, slot_attn: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prediction [B, N, D] and masks [B, N, K] averaged over all patch orders (ENS)."""
        return mean_of_orders(self.decode_orders(slots, target, slot_attn=slot_attn))

    def decode_orders(
        self, slots: Tensor, target: Tensor, *, slot_attn: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Prediction and masks in each patch order in turn, order 0 first.

        slot_attn: [B, N, K] of the slots, for decoders that need it.
        """
        if hasattr(self.decoder, "all_orders"):
            yield from self.decoder.all_orders(slots, target)
            return
        needed = self.needed_by_decoder(slot_attn=slot_attn)
        for index in range(self.num_orders):
            # filled on the device: a copy from the host would synchronise with it
            yield self.decoder(slots, target, torch.full((), index, dtype=torch.int64, device=slots.device), **needed)

    @torch.no_grad()
    def segment(self, images: Tensor, *, orders: str = "0", noise: Tensor | None = None) -> SpotOutput:
        """Normalised images [B, 3, S, S] → outputs with patch order 0 (`orders="0"`) or all averaged (`"all"`).

        With `Config.adaptive_slots` the masks of slots that belong together are added up in one; the others are 0.
        """
        if orders not in ("0", "all"):
            raise ValueError(f"orders {orders!r} is unknown: use '0' or 'all'")
        features, target = self.encode(images)
        if orders == "0":
            output = self(features, target, noise=noise)
        else:
            # Slots do not depend on the order: they are computed once.
            slots, attn, logits = self.slot_encoder(features, noise)
            output = SpotOutput(slots, attn, logits, *self.decode_all_orders(slots, target, slot_attn=attn))
        groups = self.groups(output.slot_attn, target)
        return replace(output, slot_attn=joined(output.slot_attn, groups), masks=joined(output.masks, groups))

    def learned_state_dict(self) -> dict[str, Tensor]:
        """All that training changes: the state dict without the frozen encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def load_learned_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `learned_state_dict` returned.

        UserError names a tensor that is missing, unknown, not finite or of another shape.
        """
        own = self.learned_state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in state:
                raise UserError(f"the weights lack {name}: they belong to a model with other settings")
            if name not in own:
                raise UserError(f"the weights have {name}, which this model does not: their settings differ")
            if own[name].shape != state[name].shape:
                raise UserError(
                    f"the weights have {name} of shape {list(state[name].shape)} but this model needs "
                    f"{list(own[name].shape)}: their settings differ"
                )
        require_finite(state, "the weights")
        self.load_state_dict(dict(state), strict=False)  # not strict: the encoder's tensors are not in it


def mean_of_orders(decoded: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean over the orders of predictions [B, N, D] and masks [B, N, K]; only one order is held at a time."""
    decoded = iter(decoded)
    prediction, masks = next(decoded)
    count = 1
    for more_prediction, more_masks in decoded:
        prediction, masks, count = prediction + more_prediction, masks + more_masks, count + 1
    return prediction / count, masks / count


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_REC: mean squared error over tokens and channels, float32 at least; the target gets no gradient."""
    # In bfloat16 the loss would be rounded to two or three digits.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return F.mse_loss(prediction.to(dtype), target.detach().to(dtype))
