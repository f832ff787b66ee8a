"""What the transformer decoders share: projections of tokens and slots, blocks, and the start of short runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spot_kernels import PermutedDecoder
from spot_kernels.modules import linear
from spot_kernels.modules.layers import layer_norm

_TEMPERATURE = 3.0  # of the cross-attention's logits in `start_from_slots`


class Projection(nn.Sequential):
    """Linear layer without bias, then LayerNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(linear(inputs, outputs, bias=False), nn.LayerNorm(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return layer_norm(self[1], self[0](inputs))


class TransformerDecoder(nn.Module):
    """Projections and blocks; what the blocks read, and in which order, is a derived class's own.

    Args:
        dim: feature width D.
        slot_dim: slot width U.
        blocks, heads: of the transformer.
        cross_heads: heads of the cross-attentions after the first, 0 = heads.
        activation, final_norm: as in `PermutedDecoder`.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        *,
        blocks: int,
        heads: int,
        cross_heads: int = 0,
        activation: str = "relu",
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.input_proj = Projection(dim, dim)
        self.slot_proj = Projection(slot_dim, dim)
        self.transformer = PermutedDecoder(
            dim,
            blocks=blocks,
            heads=heads,
            cross_heads=cross_heads or None,
            activation=activation,
            final_norm=final_norm,
        )

    @torch.no_grad()
    def start_from_slots(self, rotation: Tensor) -> None:
        """Sets the weights so that, before training, a token attends to the slot most like the feature it reads.

        An autoregressive decoder reads each token's predecessor. Neighbours mostly belong to one object, so masks
        begin as those of the slots, moved on by one token.
        rotation: [U, D], of `SlotEncoder.start_as_clustering`.
        """
        to_dim = torch.eye(*self.slot_proj[0].weight.shape)
        self.slot_proj[0].weight.copy_(to_dim)
        self.input_proj[0].weight.copy_(to_dim @ rotation)
        for block in self.transformer.blocks:
            cross = block.cross_attention
            for layer in (cross.project_q, cross.project_k):
                layer.weight.copy_(_TEMPERATURE**0.5 * torch.eye(*layer.weight.shape))
            # What blocks add to the stream would hide the feature read from later blocks.
            for layer in (block.self_attention.project_o, cross.project_o, block.ffn[2]):
                layer.weight.mul_(0.2)
