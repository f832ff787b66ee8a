"""The slot encoder (SPOT, section 3.1): LayerNorm and MLP on the features, then slot attention from initial slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spot_fast.model.implementations import IMPLEMENTATIONS, Implementation
from spot_kernels import SlotAttention
from spot_kernels.modules import mlp
from spot_kernels.modules.layers import layer_norm

INITIALISERS = ("gaussian", "learned")
_TEMPERATURE = 4.0  # of the clustering's logits, in `start_as_clustering`


class SlotEncoder(nn.Module):
    """Features [B, N, D] → slots [B, K, U].

    init: `gaussian` draws the initial slots around one learned mean with one learned log-scale, at evaluation too;
    `learned` has one embedding per slot. implementation: whose details the module has.
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
        implementation: Implementation = IMPLEMENTATIONS["spot"],
    ) -> None:
        super().__init__()
        if init not in INITIALISERS:
            raise ValueError(f"init={init!r} is unknown: use one of {', '.join(INITIALISERS)}")
        self.num_slots, self.slot_dim, self.init = num_slots, slot_dim, init
        self.norm = nn.LayerNorm(dim)
        width = slot_dim if implementation.project else dim
        self.mlp = mlp(dim, (implementation.project or 1) * dim, width, activation=implementation.activation)
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
            activation=implementation.activation,
            **dict(implementation.slot_attention),
        )

    @torch.no_grad()
    def start_as_clustering(self) -> Tensor:
        """Sets the weights so that slot attention is soft k-means of the features before its first training step.

        Returns the matrix [U, D] that takes normalised features into the space of the slots, a rotation where U = D.
        For SPOT's own modules (`implementation` "spot", one head).

        With SPOT's own start, masks are noise at first, while the decoder learns to do without slots.
        Here queries, keys and values are the normalised slots and features themselves (up to a rotation), the GRU
        hands on the mean of what a slot attends to, and the MLPs begin close to a rotation or to nothing.
        """
        attention, slot_dim = self.attention, self.slot_dim
        first, last = self.mlp[0], self.mlp[2]
        # A bias of two deviations makes nearly all inputs of the ReLU positive, and the MLP a rotation.
        rotation = nn.init.orthogonal_(torch.empty_like(first.weight))
        back = nn.init.orthogonal_(torch.empty_like(last.weight)) @ rotation.T
        first.weight.copy_(rotation)
        first.bias.fill_(2.0)
        last.weight.copy_(back)
        last.bias.copy_(-2.0 * back.sum(1))
        for layer in (attention.project_q, attention.project_k):
            layer.weight.copy_(_TEMPERATURE**0.5 * torch.eye(*layer.weight.shape))
        attention.project_v.weight.copy_(torch.eye(*attention.project_v.weight.shape))
        gru = attention.gru
        for weight in (gru.weight_ih, gru.weight_hh):
            weight.mul_(0.1)
        # tanh is close to linear for values of this size; the update gate passes nine tenths.
        gru.weight_ih[2 * slot_dim :].copy_(0.6 * torch.eye(*gru.weight_ih[2 * slot_dim :].shape))
        gru.bias_ih[slot_dim : 2 * slot_dim].fill_(-2.0)
        attention.mlp[2].weight.mul_(0.1)
        return attention.project_v.weight @ back @ rotation

    @torch.no_grad()
    def start_as(self, other: SlotEncoder) -> None:
        """Takes the weights of `other`, of the same shapes; where `other` draws initial slots and this one has learned
        ones [K, U], these are one draw.
        """
        weights = other.state_dict()
        if (self.init, other.init) == ("learned", "gaussian"):
            noise = torch.randn(1, other.num_slots, other.slot_dim).to(other.slot_mean)
            del weights["slot_mean"], weights["slot_log_scale"]
            weights["slot_embedding"] = other.initial_slots(1, noise)[0]
        self.load_state_dict(weights)

    def initial_slots(self, batch: int, noise: Tensor | None = None) -> Tensor:
        """Initial slots [B, K, U]. noise: the standard-normal draw [B, K, U] of `gaussian`; None draws it here."""
        if self.init == "learned":
            return self.slot_embedding.expand(batch, -1, -1)
        shape = (batch, self.num_slots, self.slot_dim)
        if noise is None:
            noise = torch.randn(shape, device=self.slot_mean.device, dtype=self.slot_mean.dtype)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise {tuple(noise.shape)} must be {shape}: one draw per image, slot and channel")
        # The scale is learned as its logarithm, which keeps it positive.
        return self.slot_mean + self.slot_log_scale.exp() * noise

    def forward(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, N, D] → slots [B, K, U], attn [B, N, K] (summed over heads), logits [B, H, N, K]."""
        return self.attention(self.mlp(layer_norm(self.norm, features)), self.initial_slots(features.shape[0], noise))
