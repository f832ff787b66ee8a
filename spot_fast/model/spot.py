"""SPOT (arXiv 2312.00648): frozen ViT, slot-attention encoder and a decoder that predicts the ViT's features.

Axes: B images, N = G·G patch tokens in raster layout, D encoder width, K slots, U slot width, H heads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.checkpoints.tensor_checks import require_finite
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.model.decoders import AutoregressiveDecoder, MlpDecoder
from spot_fast.model.encoder import Encoder
from spot_kernels import SlotAttention
from spot_kernels.modules import mlp

if TYPE_CHECKING:
    from spot_fast.api import Segmentation

INITIALISERS = ("gaussian", "learned")


@dataclass(frozen=True)
class Details:
    """Where published models of this kind differ (`Config.implementation`).

    activation: of every MLP. project: the slot encoder's MLP goes D → project · D → U, 0: D → D → D. slot_attention:
    options of `SlotAttention`. final_norm: whether a LayerNorm follows the transformer decoder.
    """

    activation: str = "relu"
    project: int = 0
    slot_attention: tuple[tuple[str, str | float], ...] = ()
    final_norm: bool = True


DETAILS = {
    "spot": Details(),
    "ocbench": Details(activation="gelu", slot_attention=(("eps", 1e-5), ("eps_in", "sum")), final_norm=False),
    "dinosaur": Details(project=1),
    "videosaur": Details(project=2, slot_attention=(("hidden", "normed"),)),
}


@dataclass
class SpotOutput:
    """slots [B, K, U]; slot_attn [B, N, K] and slot_logits [B, H, N, K] of the last slot-attention iteration;
    prediction [B, N, D]; decoder masks [B, N, K]."""

    slots: Tensor
    slot_attn: Tensor
    slot_logits: Tensor
    prediction: Tensor
    masks: Tensor


class SlotEncoder(nn.Module):
    """Features → slots: LayerNorm, MLP D→D→D, initial slots, slot attention (SPOT, section 3.1); details: of others.

    Initial slots are `gaussian` (one learned mean and log-scale for all slots, noise drawn at evaluation too) or
    `learned` (one embedding per slot).
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        slot_dim: int,
        slot_mlp: int,
        *,
        heads: int = 1,
        iterations: int = 3,
        init: str = "gaussian",
        truncation: str = "none",
        details: Details = DETAILS["spot"],
    ) -> None:
        super().__init__()
        if init not in INITIALISERS:
            raise ValueError(f"init={init!r} is unknown: use one of {', '.join(INITIALISERS)}")
        self.num_slots, self.slot_dim, self.init = num_slots, slot_dim, init
        self.norm = nn.LayerNorm(dim)
        width = slot_dim if details.project else dim
        self.mlp = mlp(dim, (details.project or 1) * dim, width, activation=details.activation)
        if init == "gaussian":
            self.slot_mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_dim)))
            self.slot_log_scale = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_dim)))
        else:
            self.slot_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_slots, slot_dim)))
        self.attention = SlotAttention(
            width,
            slot_dim,
            mlp_hidden=slot_mlp,
            heads=heads,
            iterations=iterations,
            truncation=truncation,
            activation=details.activation,
            **dict(details.slot_attention),
        )

    def initial_slots(self, batch: int, noise: Tensor | None = None) -> Tensor:
        """Initial slots [B, K, U]; noise [B, K, U] is the standard-normal draw of `gaussian`, None draws it here."""
        if self.init == "learned":
            return self.slot_embedding.expand(batch, -1, -1)
        shape = (batch, self.num_slots, self.slot_dim)
        if noise is None:
            noise = torch.randn(shape, device=self.slot_mean.device, dtype=self.slot_mean.dtype)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise {tuple(noise.shape)} must be {shape}: one draw per image, slot and channel")
        return self.slot_mean + self.slot_log_scale.exp() * noise

    def forward(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, N, D] → slots [B, K, U], attn [B, N, K] (summed over heads), logits [B, H, N, K]."""
        return self.attention(self.mlp(self.norm(features)), self.initial_slots(features.shape[0], noise))


def _transformer(config: Config, encoder: Encoder) -> AutoregressiveDecoder:
    details = DETAILS[config.implementation]
    return AutoregressiveDecoder(
        encoder.dim,
        config.slot_dim,
        encoder.grid,
        blocks=config.dec_blocks,
        heads=config.dec_heads,
        cross_heads=config.dec_cross_heads,
        orders=config.orders,
        cappa=config.cappa,
        activation=details.activation,
        final_norm=details.final_norm,
    )


def _mlp(config: Config, encoder: Encoder) -> MlpDecoder:
    if config.cappa > 0:
        raise UserError(f"--cappa {config.cappa} belongs to the transformer decoder: drop it or --decoder mlp")
    return MlpDecoder(
        encoder.dim,
        config.slot_dim,
        encoder.num_tokens,
        hidden=config.dec_mlp_hidden,
        project_slots=config.mlp_slot_proj,
    )


# --decoder → what builds it; one of your own goes in here (docs/extending.md).
DECODERS: dict[str, Callable[[Config, Encoder], nn.Module]] = {"transformer": _transformer, "mlp": _mlp}


def _build_decoder(config: Config, encoder: Encoder) -> nn.Module:
    if config.orders != "standard" and (config.decoder == "mlp" or config.cappa > 0):
        option = "--decoder mlp" if config.decoder == "mlp" else f"--cappa {config.cappa}"
        raise UserError(f"{option} works in the standard patch order only: add --orders standard")
    if config.decoder not in DECODERS:
        raise UserError(f"--decoder {config.decoder} is unknown: use one of {', '.join(DECODERS)}")
    return DECODERS[config.decoder](config, encoder)


class Spot(nn.Module):
    """The whole model around a shared frozen encoder.

    Stage 1 (`config.stage == 1`) trains `slot_encoder` and `decoder` on frozen features; stage 2 also has
    `last_blocks`, a trainable copy of the encoder's last blocks. Nothing in it depends on training mode. A teacher is
    another Spot around the same Encoder object.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        if config.implementation not in DETAILS:
            raise UserError(f"--implementation {config.implementation} is unknown: use one of {', '.join(DETAILS)}")
        self.config = config
        self.origin: Path | None = None  # the run folder or file that it was loaded from
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
                details=DETAILS[config.implementation],
            )
            self.decoder = _build_decoder(config, encoder)
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
            self.last_blocks.eval()
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
    ) -> SpotOutput:
        """Slots of `features` and the decoder's reading of them, both [B, N, D].

        Args:
            features, target: from `encode`; the decoder is fed the target.
            order_index: patch order of the step as an int64 tensor [] or [B] on the model's device; None = order 0.
            noise: standard-normal draw [B, K, U] for gaussian slots; None draws it.
            parallel: a CapPa step.
        """
        slots, attn, logits = self.slot_encoder(features, noise)
        prediction, masks = self.decoder(slots, target, order_index, parallel=parallel)
        return SpotOutput(slots, attn, logits, prediction, masks)

    def decode_masks(self, slots: Tensor, target: Tensor, order_index: Tensor | None = None) -> Tensor:
        """The decoder masks [B, N, K] alone: what a teacher is asked for."""
        return self.decoder.masks(slots, target, order_index)

    def decode_all_orders(self, slots: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction [B, N, D] and masks [B, N, K] averaged over all patch orders (ENS)."""
        return mean_of_orders(self.decode_orders(slots, target))

    def decode_orders(self, slots: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Prediction and masks in each patch order in turn, order 0 first."""
        if hasattr(self.decoder, "all_orders"):
            yield from self.decoder.all_orders(slots, target)
            return
        for index in range(self.num_orders):
            yield self.decoder(slots, target, torch.full((), index, dtype=torch.int64, device=slots.device))

    @torch.no_grad()
    def segment(self, images: Tensor, *, orders: str = "0", noise: Tensor | None = None) -> SpotOutput:
        """Normalised images [B, 3, S, S] → outputs with patch order 0 (`orders="0"`) or all averaged (`"all"`)."""
        if orders not in ("0", "all"):
            raise ValueError(f"orders {orders!r} is unknown: use '0' or 'all'")
        features, target = self.encode(images)
        if orders == "0":
            return self(features, target, noise=noise)
        slots, attn, logits = self.slot_encoder(features, noise)
        return SpotOutput(slots, attn, logits, *self.decode_all_orders(slots, target))

    def segment_images(self, images: Any, **options: Any) -> Segmentation:
        """PIL images, arrays or tensors of any sizes → masks at their sizes, and slots: see `api.segment_images`."""
        from spot_fast.api import segment_images

        return segment_images(self, images, **options)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, device: str | torch.device | None = None) -> Spot:
        """The model of a run folder, a saved folder, a checkpoint of the authors or `owner/name` on the hub."""
        from spot_fast.api import load

        return load(path, device)

    def save_pretrained(self, folder: str | os.PathLike, *, scores: Mapping[str, float] | None = None) -> Path:
        """Writes a new folder that can be moved and shared: see `pretrained.save_pretrained`."""
        from spot_fast.checkpoints.shared_folder import save_pretrained

        return save_pretrained(self, folder, scores=scores)

    def learned_state_dict(self) -> dict[str, Tensor]:
        """All that training changes: the state dict without the frozen encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def load_learned_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `learned_state_dict` gave.

        UserError names a tensor that is missing, unknown, of other shape or not finite.
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
        self.load_state_dict(dict(state), strict=False)


def mean_of_orders(decoded: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean prediction [B, N, D] and masks [B, N, K] of what the decoder gives in each order; one at a time is kept."""
    decoded = iter(decoded)
    prediction, masks = next(decoded)
    count = 1
    for more_prediction, more_masks in decoded:
        prediction, masks, count = prediction + more_prediction, masks + more_masks, count + 1
    return prediction / count, masks / count


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_REC: mean squared error over tokens and channels, float32 at least; the target gets no gradient."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return F.mse_loss(prediction.to(dtype), target.detach().to(dtype))
