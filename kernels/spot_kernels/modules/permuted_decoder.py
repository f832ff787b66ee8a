"""The permuted decoder: transformer blocks that decode patch tokens in any order, in raster layout on the outside.

Tokens are [B, N, D]; a patch order is an int64 tensor [N] or [B, N]. It only masks attention where tokens stay in
raster layout; where it pays, the decoder moves them into the order at its ends (`order_layout`), and its blocks get
`SEQUENCE` instead of an order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spot_kernels import dispatch
from spot_kernels.folded_cross_attention import folded_cross_attention, folded_cross_map
from spot_kernels.folded_cross_attention import takes as folded_cross_attention_takes
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
from spot_kernels.modules.order_layout import SEQUENCE, Order, from_sequence, prefers_order_layout, to_sequence
from spot_kernels.permuted_attention import permuted_causal_attention
from spot_kernels.slot_cross_attention import slot_cross_attention, slot_cross_map


class PermutedSelfAttention(nn.Module):
    """Bias-free multi-head self-attention, causal in a given order, or in the sequence of its tokens (`SEQUENCE`).

    Without an order all tokens see all.
    """

    def __init__(self, dim: int, heads: int, *, gain: float):
        super().__init__()
        check_heads("heads", dim, heads)
        self.heads = heads
        self.project_qkv = linear(dim, 3 * dim, bias=False, parts=3)
        self.project_o = linear(dim, dim, bias=False, gain=gain)

    def forward(self, tokens: torch.Tensor, order: Order) -> torch.Tensor:
        return self.attend(self.project_qkv(tokens), order)

    def attend(self, qkv: torch.Tensor, order: Order) -> torch.Tensor:
        """From the projected tokens [B, N, 3D]."""
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        if isinstance(order, torch.Tensor):
            out = permuted_causal_attention(q, k, v, order)
        elif order not in (None, SEQUENCE):
            raise ValueError(f"order {order!r} is unknown: pass an int64 tensor, {SEQUENCE!r} or None")
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=order == SEQUENCE)
        return self.project_o(merge_heads(out))


class KeysValues(NamedTuple):
    """What a cross-attention makes of the slots, the same for every order.

    keys, values: [B, H, K, d]; folded: times the projections of the queries and of the output, [B, H, K, D].
    """

    keys: torch.Tensor
    values: torch.Tensor
    folded: bool


class SlotCrossAttention(nn.Module):
    """Bias-free multi-head attention of tokens to slots; returns the map averaged over heads if asked for.

    The projections of the queries and of the output, two products of D × D over all tokens, are folded into the keys
    and values of the slots where that is less work: `folded_cross_attention`. Parameters are the same either way.
    """

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
        return self.attend(tokens, self.keys_values(slots), return_map=return_map)

    def keys_values(self, slots: torch.Tensor, projected: Sequence[torch.Tensor] | None = None) -> KeysValues:
        """Of slots [B, K, D]. projected: their k and v [B, K, D], if they are known."""
        k, v = projected or (self.project_k(slots), self.project_v(slots))
        if self._folds(slots, self.project_q, self.project_o):
            weights = self.project_q.weight, self.project_o.weight
            return KeysValues(fold_queries(k, weights[0], self.heads), fold_output(v, weights[1], self.heads), True)
        return KeysValues(split_heads(k, self.heads), split_heads(v, self.heads), False)

    def attend(
        self, tokens: torch.Tensor, slots: KeysValues, *, return_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if slots.folded:
            return folded_cross_attention(
                tokens, slots.keys, slots.values, scale=self._scale(tokens), return_map=return_map
            )
        q = split_heads(self.project_q(tokens), self.heads)
        out, mean_map = slot_cross_attention(q, slots.keys, slots.values, return_map=return_map)
        return self.project_o(merge_heads(out)), mean_map

    def map(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The map [B, N, K] alone, without the projections to v and to the output."""
        k = self.project_k(slots)
        if self._folds(slots, self.project_q):
            a = fold_queries(k, self.project_q.weight, self.heads)
            return folded_cross_map(tokens, a, scale=self._scale(tokens))
        return slot_cross_map(split_heads(self.project_q(tokens), self.heads), split_heads(k, self.heads))

    def _folds(self, slots: torch.Tensor, *layers: nn.Module) -> bool:
        """Whether to fold these layers into slots [B, K, D].

        For an image of N tokens both layers take 4 N D² FLOPs; folded it is 4 N H K D over the tokens and 4 K D² over
        the slots. With 4 H K ≤ D at least three quarters of the work over the tokens are saved, which leaves room for
        narrow products being slower than square ones; the work over the slots is less as long as N > 4/3 K. The layers
        have to be plain products, and the slots to fit the kernels where those run.
        """
        count, width = slots.shape[1:]
        if not dispatch.uses("folded_cross_attention") or not 0 < 4 * self.heads * count <= width:
            return False
        if not all(is_exactly(layer, nn.Linear) and layer.bias is None for layer in layers):
            return False
        return folded_cross_attention_takes(slots, self.heads, count)

    def _scale(self, tokens: torch.Tensor) -> float:
        """Of the logits. Left to the operator, which applies it in float32: nothing is rounded for it."""
        return (tokens.shape[-1] // self.heads) ** -0.5


def fold_queries(k: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """k_h W_q,h for every head h, of k [B, K, D] and the queries' projection [D, D] → [B, H, K, D]."""
    return _each_head(k, weight.unflatten(0, (heads, -1)))


def fold_output(v: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """v_h W_o,hᵀ for every head h, of v [B, K, D] and the output's projection [D, D] → [B, H, K, D]."""
    return _each_head(v, weight.unflatten(1, (heads, -1)).permute(1, 2, 0))


def _each_head(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [B, K, H·d] times weights [H, d, D] → [B, H, K, D]: one batched product, every head's slots of all images
    together, laid out as [H, B, K, D].
    """
    split = rows.flatten(0, 1).unflatten(-1, (weights.shape[0], -1)).transpose(0, 1)
    return torch.bmm(split, weights).unflatten(1, rows.shape[:2]).transpose(0, 1)


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
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        order: Order,
        *,
        return_map: bool = False,
        projected: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens [B, N, D], slots [B, K, D] → tokens [B, N, D], cross-attention map [B, N, K] or None.

        projected: the slots' k and v [B, K, D], if they are known.
        """
        stream, mean_map = self.advance(Stream(tokens), slots, order, return_map=return_map, projected=projected)
        return stream.total(), mean_map

    def advance(
        self,
        stream: Stream,
        slots: torch.Tensor,
        order: Order,
        *,
        return_map: bool = False,
        projected: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Stream, torch.Tensor | None]:
        """`forward` that leaves the last addition to the next block's first LayerNorm."""
        stream = self.attend_to_tokens(stream, order)
        return self.attend_to_slots(stream, self.cross_attention.keys_values(slots, projected), return_map=return_map)

    def attend_to_tokens(self, stream: Stream, order: Order) -> Stream:
        """The first part of the block, self-attention."""
        stream, normed = residual_norm(self.norm_self, stream, replaces=self.first)
        return stream._replace(delta=self.self_attention(normed, order))

    def attend_to_slots(
        self, stream: Stream, slots: KeysValues, *, return_map: bool = False
    ) -> tuple[Stream, torch.Tensor | None]:
        """The rest of the block: cross-attention to the slots, and FFN → stream, map or None."""
        stream, normed = residual_norm(self.norm_cross, stream)
        out, mean_map = self.cross_attention.attend(normed, slots, return_map=return_map)
        stream, normed = residual_norm(self.norm_ffn, stream._replace(delta=out))
        return stream._replace(delta=self.ffn(normed)), mean_map

    def map(self, tokens: torch.Tensor, slots: torch.Tensor, order: Order) -> torch.Tensor:
        """The map [B, N, K] alone, without the FFN and what else comes after it."""
        return self.map_of(Stream(tokens), slots, order)

    def map_of(self, stream: Stream, slots: torch.Tensor, order: Order) -> torch.Tensor:
        """`map` behind other blocks."""
        _, normed = residual_norm(self.norm_cross, self.attend_to_tokens(stream, order))
        return self.cross_attention.map(normed, slots)


def joins_projections(slots: torch.Tensor) -> bool:
    """Whether keys and values of slots [B, K, D] come from one product for all blocks.

    On a GPU, where products of so few rows take the time of a launch, of each forward and two backward; a CPU would
    gain nothing for the copy of the weights.
    """
    return dispatch.uses("joined_projections") and slots.device.type == "cuda" and slots.shape[0] > 0


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

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes tokens [B, N, D] with slots [B, K, D] in an order [N] or [B, N].

        order: None: no causal mask. "sequence" (`SEQUENCE`): tokens and results lie in the sequence in which they are
        decoded.

        Returns:
            out [B, N, D]; the last block's cross-attention [B, N, K], averaged over heads.
        """
        if isinstance(order, torch.Tensor) and prefers_order_layout(tokens):
            out, mean_map = self._decode(to_sequence(tokens, order), slots, SEQUENCE)
            return from_sequence(out, order), from_sequence(mean_map, order)
        return self._decode(tokens, slots, order)

    def _decode(self, tokens: torch.Tensor, slots: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self._project(self.blocks, slots)
        stream, _ = self._run(self.blocks[:-1], projected[:-1], Stream(tokens), slots, order)
        stream, mean_map = self._run(self.blocks[-1:], projected[-1:], stream, slots, order, return_map=True)
        return self._finish(stream), mean_map

    def _run(
        self,
        blocks: Sequence[nn.Module],
        projected: list[dict[str, Sequence[torch.Tensor]]],
        stream: Stream,
        slots: torch.Tensor,
        order: Order,
        *,
        return_map: bool = False,
    ) -> tuple[Stream, torch.Tensor | None]:
        """The stream behind these blocks, and the map of the last one, or None."""
        mean_map = None
        for block, known in zip(blocks, projected, strict=True):
            if is_exactly(block, PermutedDecoderBlock):
                stream, mean_map = block.advance(stream, slots, order, return_map=return_map, **known)
            else:  # hooks and wrappers see whole blocks
                tokens, mean_map = block(stream.total(), slots, order, return_map=return_map, **known)
                stream = Stream(tokens)
        return stream, mean_map

    def _finish(self, stream: Stream) -> torch.Tensor:
        """The prediction [B, N, D]."""
        if isinstance(self.norm, nn.Identity):
            return self.norm(stream.total())
        return residual_norm(self.norm, stream, for_product=False)[1]

    def _project(self, blocks: Sequence[nn.Module], slots: torch.Tensor) -> list[dict[str, Sequence[torch.Tensor]]]:
        """For each block the argument `projected`: k and v [B, K, D] of all by one product, which costs a copy of the
        weights. Without it where that does not pay, or a layer is more than a plain one.
        """
        layers = [layer for one in blocks for layer in (one.cross_attention.project_k, one.cross_attention.project_v)]
        plain = all(
            is_exactly(one, PermutedDecoderBlock) and is_exactly(one.cross_attention, SlotCrossAttention)
            for one in blocks
        )
        plain = plain and all(is_exactly(layer, nn.Linear) and layer.bias is None for layer in layers)
        if not (layers and plain and joins_projections(slots)):
            return [{} for _ in blocks]
        parts = F.linear(slots, torch.cat([layer.weight for layer in layers])).chunk(len(layers), -1)
        return [{"projected": pair} for pair in zip(parts[::2], parts[1::2], strict=True)]

    def masks(self, tokens: torch.Tensor, slots: torch.Tensor, order: Order) -> torch.Tensor:
        """The map [B, N, K] of `forward` without the work behind it, for a teacher, of whom nothing else is used."""
        if isinstance(order, torch.Tensor) and prefers_order_layout(tokens):
            return from_sequence(self._masks(to_sequence(tokens, order), slots, SEQUENCE), order)
        return self._masks(tokens, slots, order)

    def _masks(self, tokens: torch.Tensor, slots: torch.Tensor, order: Order) -> torch.Tensor:
        before = self.blocks[:-1]
        stream, _ = self._run(before, self._project(before, slots), Stream(tokens), slots, order)
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
        slots_kv = [
            block.cross_attention.keys_values(slots, **projected)
            for block, projected in zip(self.blocks, self._project(self.blocks, slots), strict=True)
        ]
        in_order = prefers_order_layout(tokens, gathered=True)
        for order, source in zip(orders, sources, strict=True):
            masked: Order = SEQUENCE if in_order else order
            source = source.index_select(0, order) if in_order else source
            out = first.self_attention.attend(qkv.index_select(1, source), masked)
            low = None if begin.low is None else begin.low.index_select(1, source)
            stream = Stream(begin.tokens.index_select(1, source), out, low)
            for i, (block, kv) in enumerate(zip(self.blocks, slots_kv, strict=True)):
                if i > 0:  # the first block's self-attention is done
                    stream = block.attend_to_tokens(stream, masked)
                stream, mean_map = block.attend_to_slots(stream, kv, return_map=i == last)
            out = self._finish(stream)
            yield (from_sequence(out, order), from_sequence(mean_map, order)) if in_order else (out, mean_map)
