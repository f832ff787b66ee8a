"""Drop-in modules on the operators: `SlotAttention` and `PermutedDecoder`.

Tokens are in raster layout [B, N, D] everywhere; a patch order is an int64 tensor [N] or [B, N] and moves nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spot_kernels.permuted_attention import permuted_causal_attention
from spot_kernels.slot_attention import slot_attention_step
from spot_kernels.slot_cross_attention import slot_cross_attention

TRUNCATIONS = ("none", "fixed_point", "bi_level")


def linear(
    inputs: int, outputs: int, *, bias: bool = True, init: str = "xavier", gain: float = 1.0, parts: int = 1
) -> nn.Linear:
    """Linear layer with zero bias and `xavier` or `kaiming` (for a ReLU behind it) uniform weights times `gain`.

    `parts` > 1: that many layers of outputs/parts rows each, initialised one by one and stored under one another.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    for weight in layer.weight.data.chunk(parts):
        if init == "kaiming":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(weight)
        weight *= gain
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, *, gain: float = 1.0) -> nn.Sequential:
    """Linear (kaiming), ReLU, Linear (xavier × gain)."""
    return nn.Sequential(
        linear(inputs, hidden, init="kaiming"), nn.ReLU(), linear(hidden, outputs, gain=gain)
    )


def _split(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, D] → [B, H, N, d], a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(tokens: torch.Tensor) -> torch.Tensor:
    """[B, H, N, d] → [B, N, D]."""
    return tokens.transpose(1, 2).flatten(2)


def _check_heads(name: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{name}={heads} does not divide the width {width}: choose a divisor")


class SlotAttention(nn.Module):
    """Slot attention (SPOT, section 3.1; Locatello et al., 2020, algorithm 1).

    k and v are bias-free projections of LN(inputs), k scaled by (slot_dim / heads)^-1/2. Each iteration attends with
    q = bias-free projection of LN(slots), feeds the updates to a GRU whose hidden state is the slots, and adds an MLP
    of LN(slots).

    Args:
        input_dim: width D of the inputs.
        slot_dim: width U of the slots.
        mlp_hidden: hidden width of the slot MLP.
        heads: attention heads; the softmax runs over heads × slots jointly.
        iterations: how often the slots are refined, at least 1.
        truncation: which way gradients go. `none`: through all iterations; `fixed_point`: through the last one only;
            `bi_level`: as fixed_point, and straight through to the initial slots as well (BO-QSA).
        eps: added to the attention before it is normalised over tokens.
    """

    def __init__(
        self,
        input_dim: int,
        slot_dim: int,
        *,
        mlp_hidden: int,
        heads: int = 1,
        iterations: int = 3,
        truncation: str = "none",
        eps: float = 1e-8,
    ):
        super().__init__()
        _check_heads("heads", slot_dim, heads)
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: slot attention needs at least one")
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={truncation!r} is unknown: use one of {', '.join(TRUNCATIONS)}")
        self.heads, self.iterations, self.truncation, self.eps = heads, iterations, truncation, eps
        self.scale = (slot_dim // heads) ** -0.5
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        self.project_q = linear(slot_dim, slot_dim, bias=False)
        self.project_k = linear(input_dim, slot_dim, bias=False)
        self.project_v = linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        nn.init.xavier_uniform_(self.gru.weight_ih)
        nn.init.orthogonal_(self.gru.weight_hh)
        nn.init.zeros_(self.gru.bias_ih)
        nn.init.zeros_(self.gru.bias_hh)
        self.mlp = mlp(slot_dim, mlp_hidden, slot_dim)

    def _refine(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        q = _split(self.project_q(self.norm_slots(slots)), self.heads)
        updates, attn, logits = slot_attention_step(q, k, v, eps=self.eps, return_attn=last, return_logits=last)
        slots = self.gru(_merge(updates).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.mlp(self.norm_mlp(slots)), attn, logits

    def forward(self, inputs: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """inputs [B, N, D], initial slots [B, K, U] → slots [B, K, U], attn [B, N, K], logits [B, H, N, K].

        attn (summed over heads) and logits are those of the last iteration, before its GRU update.
        """
        inputs = self.norm_inputs(inputs)
        k = _split(self.project_k(inputs) * self.scale, self.heads)
        v = _split(self.project_v(inputs), self.heads)
        initial = slots
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.truncation == "none"):
            for _ in range(self.iterations - 1):
                slots, _, _ = self._refine(k, v, slots, last=False)
        if self.truncation != "none":
            slots = slots.detach()
        if self.truncation == "bi_level":
            # The value stays, the gradient of the last iteration's input goes to the initial slots.
            slots = slots + (initial - initial.detach())
        return self._refine(k, v, slots, last=True)


class PermutedSelfAttention(nn.Module):
    """Bias-free multi-head self-attention, causal in a given order; without an order every token sees all."""

    def __init__(self, dim: int, heads: int, *, gain: float):
        super().__init__()
        _check_heads("heads", dim, heads)
        self.heads = heads
        self.project_qkv = linear(dim, 3 * dim, bias=False, parts=3)
        self.project_o = linear(dim, dim, bias=False, gain=gain)

    def forward(self, tokens: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (_split(part, self.heads) for part in self.project_qkv(tokens).chunk(3, -1))
        if order is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = permuted_causal_attention(q, k, v, order)
        return self.project_o(_merge(out))


class SlotCrossAttention(nn.Module):
    """Bias-free multi-head attention of tokens to slots; gives the map averaged over heads when asked."""

    def __init__(self, dim: int, heads: int, *, gain: float):
        super().__init__()
        _check_heads("cross_heads", dim, heads)
        self.heads = heads
        self.project_q = linear(dim, dim, bias=False)
        self.project_k = linear(dim, dim, bias=False)
        self.project_v = linear(dim, dim, bias=False)
        self.project_o = linear(dim, dim, bias=False, gain=gain)

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, *, return_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q = _split(self.project_q(tokens), self.heads)
        k = _split(self.project_k(slots), self.heads)
        v = _split(self.project_v(slots), self.heads)
        out, mean_map = slot_cross_attention(q, k, v, return_map=return_map)
        return self.project_o(_merge(out)), mean_map


class PermutedDecoderBlock(nn.Module):
    """Pre-norm transformer block: causal self-attention in an order, cross-attention to slots, FFN (ReLU, 4 × dim).

    `first`: the self-attention's LayerNorm replaces the residual stream, x ← LN(x); x ← x + SA(x), as in the first
    block of the official decoder.
    """

    def __init__(self, dim: int, heads: int, cross_heads: int, *, gain: float, first: bool):
        super().__init__()
        self.first = first
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = PermutedSelfAttention(dim, heads, gain=gain)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = SlotCrossAttention(dim, cross_heads, gain=gain)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = mlp(dim, 4 * dim, dim, gain=gain)

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None, *, return_map: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens [B, N, D], slots [B, K, D] → tokens [B, N, D], cross-attention map [B, N, K] or None."""
        tokens, mean_map = self.attend(tokens, slots, order, return_map=return_map)
        return tokens + self.ffn(self.norm_ffn(tokens)), mean_map

    def attend(
        self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None, *, return_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block without its FFN: all that the map needs."""
        normed = self.norm_self(tokens)
        tokens = (normed if self.first else tokens) + self.self_attention(normed, order)
        out, mean_map = self.cross_attention(self.norm_cross(tokens), slots, return_map=return_map)
        return tokens + out, mean_map


class PermutedDecoder(nn.Module):
    """Stack of `PermutedDecoderBlock` with a final LayerNorm (SPOT, section 3.1).

    Args:
        dim: width D of tokens and slots.
        blocks: how many blocks.
        heads: heads of every self-attention and of the first block's cross-attention.
        cross_heads: heads of the cross-attention in the blocks after the first; None = heads.
    """

    def __init__(self, dim: int, *, blocks: int, heads: int, cross_heads: int | None = None):
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks={blocks}: the decoder needs at least one")
        gain = (3 * blocks) ** -0.5
        self.blocks = nn.ModuleList(
            PermutedDecoderBlock(dim, heads, heads if i == 0 else cross_heads or heads, gain=gain, first=i == 0)
            for i in range(blocks)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [B, N, D], slots [B, K, D], order [N] or [B, N] (None: no causal mask) → out [B, N, D], map [B, N, K].

        The map is the last block's cross-attention softmax averaged over heads.
        """
        for block in self.blocks[:-1]:
            tokens, _ = block(tokens, slots, order)
        tokens, mean_map = self.blocks[-1](tokens, slots, order, return_map=True)
        return self.norm(tokens), mean_map

    def masks(self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """The map [B, N, K] of `forward` alone, without the work behind it: what a teacher is asked for."""
        for block in self.blocks[:-1]:
            tokens, _ = block(tokens, slots, order)
        return self.blocks[-1].attend(tokens, slots, order, return_map=True)[1]
