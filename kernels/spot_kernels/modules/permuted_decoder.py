"""The permuted decoder: transformer blocks that decode patch tokens in any order while they stay in raster layout.

Tokens are [B, N, D]; a patch order is an int64 tensor [N] or [B, N] that only masks attention: no token moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from spot_kernels.modules.layers import (
    ACTIVATIONS,
    Stream,
    check_choice,
    check_heads,
    is_exactly,
    linear,
    merge_heads,
    mlp,
    residual_norm,
    split_heads,
)
from spot_kernels.permuted_attention import permuted_causal_attention
from spot_kernels.slot_cross_attention import slot_cross_attention, slot_cross_map


class PermutedSelfAttention(nn.Module):
    """Bias-free multi-head self-attention, causal in a given order; without an order all tokens see all."""

    def __init__(self, dim: int, heads: int, *, gain: float):
        super().__init__()
        check_heads("heads", dim, heads)
        self.heads = heads
        self.project_qkv = linear(dim, 3 * dim, bias=False, parts=3)
        self.project_o = linear(dim, dim, bias=False, gain=gain)

    def forward(self, tokens: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        return self.attend(self.project_qkv(tokens), order)

    def attend(self, qkv: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """From the projected tokens [B, N, 3D]."""
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        if order is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = permuted_causal_attention(q, k, v, order)
        return self.project_o(merge_heads(out))


class SlotCrossAttention(nn.Module):
    """Bias-free multi-head attention of tokens to slots; returns the map averaged over heads if asked for."""

    def __init__(self, dim: int, heads: int, *, gain: float):
        super().__init__()
        check_heads("cross_heads", dim, heads)
        self.heads = heads
        self.project_q = linear(dim, dim, bias=False)
        self.project_k = linear(dim, dim, bias=False)
        self.project_v = linear(dim, dim, bias=False)
        self.project_o = linear(dim, dim, bias=False, gain=gain)

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, *, return_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(tokens, *self.keys_values(slots), return_map=return_map)

    def keys_values(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, H, K, d] of slots [B, K, D]: the same for every order."""
        return split_heads(self.project_k(slots), self.heads), split_heads(self.project_v(slots), self.heads)

    def attend(
        self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q = split_heads(self.project_q(tokens), self.heads)
        out, mean_map = slot_cross_attention(q, k, v, return_map=return_map)
        return self.project_o(merge_heads(out)), mean_map

    def map(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The map [B, N, K] alone, without the projections to v and to the output."""
        q, k = self.project_q(tokens), self.project_k(slots)
        return slot_cross_map(split_heads(q, self.heads), split_heads(k, self.heads))


class PermutedDecoderBlock(nn.Module):
    """Pre-norm transformer block: causal self-attention in an order, cross-attention to slots, FFN of width 4 × dim.

    `first`: the self-attention's LayerNorm replaces the residual stream, x ← LN(x); x ← x + SA(x), as in the first
    block of the official decoder.
    """

    def __init__(self, dim: int, heads: int, cross_heads: int, *, gain: float, first: bool, activation: str = "relu"):
        super().__init__()
        self.first = first
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = PermutedSelfAttention(dim, heads, gain=gain)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = SlotCrossAttention(dim, cross_heads, gain=gain)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = mlp(dim, 4 * dim, dim, gain=gain, activation=activation)

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None, *, return_map: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens [B, N, D], slots [B, K, D] → tokens [B, N, D], cross-attention map [B, N, K] or None."""
        stream, mean_map = self.advance(Stream(tokens), slots, order, return_map=return_map)
        return stream.total(), mean_map

    def advance(
        self, stream: Stream, slots: torch.Tensor, order: torch.Tensor | None, *, return_map: bool = False
    ) -> tuple[Stream, torch.Tensor | None]:
        """`forward` that leaves the last addition to the next block's first LayerNorm."""
        k, v = self.cross_attention.keys_values(slots)
        return self.attend_to_slots(self.attend_to_tokens(stream, order), k, v, return_map=return_map)

    def attend_to_tokens(self, stream: Stream, order: torch.Tensor | None) -> Stream:
        """The first part of the block, self-attention."""
        stream, normed = residual_norm(self.norm_self, stream, replaces=self.first)
        return stream._replace(delta=self.self_attention(normed, order))

    def attend_to_slots(
        self, stream: Stream, k: torch.Tensor, v: torch.Tensor, *, return_map: bool = False
    ) -> tuple[Stream, torch.Tensor | None]:
        """The rest of the block: cross-attention to the slots' k and v [B, H, K, d], and FFN → stream, map or None."""
        stream, normed = residual_norm(self.norm_cross, stream)
        out, mean_map = self.cross_attention.attend(normed, k, v, return_map=return_map)
        stream, normed = residual_norm(self.norm_ffn, stream._replace(delta=out))
        return stream._replace(delta=self.ffn(normed)), mean_map

    def map(self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """The map [B, N, K] alone, without the FFN and what else comes after it."""
        return self.map_of(Stream(tokens), slots, order)

    def map_of(self, stream: Stream, slots: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """`map` behind other blocks."""
        _, normed = residual_norm(self.norm_cross, self.attend_to_tokens(stream, order))
        return self.cross_attention.map(normed, slots)


class PermutedDecoder(nn.Module):
    """Stack of `PermutedDecoderBlock`, by default with a final LayerNorm (SPOT, section 3.1).

        decoder = PermutedDecoder(768, blocks=4, heads=6)
        out, attn = decoder(tokens, slots, torch.randperm(196))  # tokens [B, 196, 768], slots [B, K, 768]

    Args:
        dim: width D of tokens and slots.
        blocks: number of blocks, at least 1.
        heads: heads of every self-attention and of the first block's cross-attention.
        cross_heads: heads of the cross-attention in the blocks after the first; None: heads.
        activation: of the FFNs, `relu` or `gelu`.
        final_norm: False: the last block's output is the prediction.

    Raises:
        ValueError: naming the option that is unknown, too small, or does not divide the width.
    """

    def __init__(
        self,
        dim: int,
        *,
        blocks: int,
        heads: int,
        cross_heads: int | None = None,
        activation: str = "relu",
        final_norm: bool = True,
    ):
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks={blocks}: the decoder needs at least one")
        check_choice("activation", activation, ACTIVATIONS)
        gain = (3 * blocks) ** -0.5
        self.blocks = nn.ModuleList(
            PermutedDecoderBlock(
                dim, heads, heads if i == 0 else cross_heads or heads, gain=gain, first=i == 0, activation=activation
            )
            for i in range(blocks)
        )
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes tokens [B, N, D] with slots [B, K, D] in an order [N] or [B, N] (None: no causal mask).

        Returns:
            out [B, N, D]; the last block's cross-attention [B, N, K], averaged over heads.
        """
        stream, _ = self._run(self.blocks[:-1], Stream(tokens), slots, order)
        stream, mean_map = self._run(self.blocks[-1:], stream, slots, order, return_map=True)
        return self._finish(stream), mean_map

    def _run(
        self,
        blocks: nn.ModuleList,
        stream: Stream,
        slots: torch.Tensor,
        order: torch.Tensor | None,
        *,
        return_map: bool = False,
    ) -> tuple[Stream, torch.Tensor | None]:
        """The stream behind these blocks, and the map of the last one, or None."""
        mean_map = None
        for block in blocks:
            if is_exactly(block, PermutedDecoderBlock):
                stream, mean_map = block.advance(stream, slots, order, return_map=return_map)
            else:  # hooks and wrappers see whole blocks
                tokens, mean_map = block(stream.total(), slots, order, return_map=return_map)
                stream = Stream(tokens)
        return stream, mean_map

    def _finish(self, stream: Stream) -> torch.Tensor:
        """The prediction [B, N, D]."""
        if isinstance(self.norm, nn.Identity):
            return self.norm(stream.total())
        return residual_norm(self.norm, stream, for_product=False)[1]

    def masks(self, tokens: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """The map [B, N, K] of `forward` without the work behind it, for a teacher, of whom nothing else is used."""
        stream, _ = self._run(self.blocks[:-1], Stream(tokens), slots, order)
        return self.blocks[-1].map_of(stream, slots, order)

    def decode_orders(
        self, tokens: torch.Tensor, slots: torch.Tensor, orders: torch.Tensor, sources: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields `forward` for several orders, one after the other.

        What does not depend on the order is computed once: everything up to the first self-attention, and the keys and
        values of the slots.

        Args:
            tokens: all inputs that occur in any order, [B, M, D].
            slots: [B, K, D].
            orders: int64 [P, N].
            sources: int64 [P, N], the index among the M inputs of the token at each raster position.
        """
        first, last = self.blocks[0], len(self.blocks) - 1
        begin, normed = residual_norm(first.norm_self, Stream(tokens), replaces=True)
        qkv = first.self_attention.project_qkv(normed)
        slots_kv = [block.cross_attention.keys_values(slots) for block in self.blocks]
        for order, source in zip(orders, sources, strict=True):
            out = first.self_attention.attend(qkv.index_select(1, source), order)
            low = None if begin.low is None else begin.low.index_select(1, source)
            stream = Stream(begin.tokens.index_select(1, source), out, low)
            for i, (block, kv) in enumerate(zip(self.blocks, slots_kv, strict=True)):
                if i > 0:  # the first block's self-attention is done
                    stream = block.attend_to_tokens(stream, order)
                stream, mean_map = block.attend_to_slots(stream, *kv, return_map=i == last)
            yield self._finish(stream), mean_map
