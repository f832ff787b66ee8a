"""The decoders (SPOT, sections 3.1-3.3 and table 4): autoregressive transformer, per-slot MLP, and those that
`DECODERS` names beside them.

A decoder predicts the target features [B, N, D] from slots [B, K, U] and returns soft masks [B, N, K] with them, all in
raster layout. The transformer is teacher-forced with the target features, at evaluation too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.config import ONE_ORDER, Config, check_orders
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.implementations import IMPLEMENTATIONS
from spot_fast.model.masked_decoder import MaskedDecoder
from spot_fast.model.patch_orders import patch_orders
from spot_fast.model.transformer_decoder import Projection, TransformerDecoder
from spot_kernels import dispatch, shift_by_order
from spot_kernels.modules.layers import layer_norm
from spot_kernels.modules.order_layout import SEQUENCE, Order, from_sequence, prefers_order_layout, take_rows


class AutoregressiveDecoder(TransformerDecoder):
    """Transformer that predicts each patch from its predecessors in a patch order and from the slots.

    Args:
        dim: feature width D.
        slot_dim: slot width U.
        grid: patches per side, N = grid².
        blocks, heads: of the transformer.
        cross_heads: heads of the cross-attentions after the first, 0 = heads.
        orders: `spot9` or `standard`; every order has its own [BOS].
        cappa: probability p of a parallel training step (CapPa, table 3), which the caller draws. p > 0 adds learned
            positions to the inputs at every step; p ≥ 1 always decodes in parallel. Standard order only.
        activation, final_norm: as in `PermutedDecoder`.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        grid: int,
        *,
        blocks: int,
        heads: int,
        cross_heads: int = 0,
        orders: str = "spot9",
        cappa: float = 0.0,
        activation: str = "relu",
        final_norm: bool = True,
    ) -> None:
        # Drawn before the modules, so that a seed gives the weights it always gave.
        orders_of_grid = patch_orders(grid, orders)
        bos = torch.empty(len(orders_of_grid), dim).normal_(std=0.02)
        super().__init__(
            dim,
            slot_dim,
            blocks=blocks,
            heads=heads,
            cross_heads=cross_heads,
            activation=activation,
            final_norm=final_norm,
        )
        self.register_buffer("orders", orders_of_grid, persistent=False)
        self.cappa = cappa
        self.bos = nn.Parameter(bos)
        if cappa > 0:
            if self.num_orders > 1:
                raise ValueError(f"cappa={cappa} decodes in the standard order only, not in {orders!r}")
            self.positions = nn.Parameter(torch.empty(grid * grid, dim).normal_(std=0.02))
            self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))

    @property
    def num_orders(self) -> int:
        return self.orders.shape[0]

    def _pick(self, order_index: Tensor | None) -> tuple[Tensor, Tensor]:
        """[BOS] and order: [D] and [N] if all samples share one order, [B, D] and [B, N] if each has its own."""
        if order_index is None:
            return self.bos[0], self.orders[0]
        # index_select, because indexing with a scalar tensor would read it on the host: a synchronisation, and a
        # recompilation for every order.
        index = order_index.reshape(-1)
        bos, order = self.bos.index_select(0, index), self.orders.index_select(0, index)
        return (bos, order) if order_index.dim() else (bos.squeeze(0), order.squeeze(0))

    def inputs(self, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False) -> Tensor:
        """The input projection's input [B, N, D] in raster layout: the target shifted by one in the order, after [BOS].

        A parallel step has the mask token everywhere instead; CapPa adds positions.
        """
        if parallel:
            tokens = self.mask_token.expand_as(target)
        else:
            bos, order = self._pick(order_index)
            tokens = shift_by_order(target, bos, order)
        return tokens + self.positions if self.cappa > 0 else tokens

    def _tokens(self, target: Tensor, bos: Tensor, order: Tensor, in_order: bool) -> Tensor:
        """The projected input [B, N, D] of an autoregressive step, in raster layout or in the order's sequence.

        [BOS] needs a gradient and the target none. So [BOS] is projected apart, and backward multiplies one row by the
        projection's weights instead of one for each token.
        """
        batch, count, _ = target.shape
        if self.cappa > 0 or not dispatch.uses("input_path"):
            if in_order:
                rows = take_rows(target, order[..., :-1])
                shifted = torch.cat([bos.to(target.dtype).expand(batch, -1).unsqueeze(1), rows], 1)
            else:
                shifted = shift_by_order(target, bos, order)
            return self.input_proj(shifted + self.positions if self.cappa > 0 else shifted)
        project, norm = self.input_proj
        first = project(bos if bos.dim() == 2 else bos.unsqueeze(0)).expand(batch, -1).unsqueeze(1)
        if in_order:
            # The projection has no bias: [BOS] is added to a row of zeros, whose gradient needs no masking.
            rows = F.pad(take_rows(target, order[..., :-1]), (0, 0, 1, 0))
            return layer_norm(norm, project(rows) + F.pad(first, (0, 0, 0, count - 1)))
        before = torch.empty_like(order).scatter_(-1, order, order.roll(1, -1))
        tokens = project(take_rows(target, before))
        begin = order[..., :1, None].expand(batch, 1, tokens.shape[2])
        return layer_norm(norm, tokens.scatter(1, begin, first.to(tokens.dtype)))

    def _prepare(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None, parallel: bool
    ) -> tuple[tuple[Tensor, Tensor, Order], Tensor | None]:
        """What the transformer takes, and the order in which its tokens lie, None for raster layout."""
        if parallel and self.cappa <= 0:
            raise ValueError("parallel=True needs a decoder with cappa > 0: it has no mask token")
        if parallel or self.cappa >= 1:
            tokens = self.input_proj(self.inputs(target, order_index, parallel=True))
            return (tokens, self.slot_proj(slots), None), None
        bos, order = self._pick(order_index)
        in_order = prefers_order_layout(target)
        tokens = self._tokens(target, bos, order, in_order)
        return (tokens, self.slot_proj(slots), SEQUENCE if in_order else order), order if in_order else None

    def forward(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """slots [B, K, U], target features [B, N, D] → prediction [B, N, D], masks [B, N, K].

        order_index: int64 [] or [B] on the slots' device, None = order 0. parallel: decode from mask tokens without
        the causal mask.
        """
        prediction, masks, order = self.decode(slots, target, order_index, parallel=parallel)
        return (prediction, masks) if order is None else (from_sequence(prediction, order), from_sequence(masks, order))

    def decode(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward` without moving its results: they lie in the order that comes third, [N] or [B, N]; None: raster."""
        inputs, order = self._prepare(slots, target, order_index, parallel)
        return *self.transformer(*inputs), order

    def masks(self, slots: Tensor, target: Tensor, order_index: Tensor | None = None) -> Tensor:
        """The masks of `forward` alone, [B, N, K]."""
        inputs, order = self._prepare(slots, target, order_index, parallel=False)
        masks = self.transformer.masks(*inputs)
        return masks if order is None else from_sequence(masks, order)

    def all_orders(self, slots: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`forward` in every order in turn (ENS); the target features are projected once for all of them."""
        if self.num_orders == 1:
            yield self(slots, target)
            return
        batch, tokens = target.shape[:2]
        bos = self.bos.to(target.dtype).expand(batch, -1, -1)
        # The input of a token is the projected feature of its predecessor, so a shift is a gather from one table:
        # rows 0 … N−1 hold the patches, row N + p the [BOS] of order p.
        begin = torch.arange(tokens, tokens + self.num_orders, device=target.device).unsqueeze(1)
        before = torch.cat([begin, self.orders[:, :-1]], 1)
        sources = torch.empty_like(self.orders).scatter_(1, self.orders, before)
        inputs = self.input_proj(torch.cat([target, bos], 1))
        yield from self.transformer.decode_orders(inputs, self.slot_proj(slots), self.orders, sources)


class MlpDecoder(nn.Module):
    """Spatial-broadcast MLP decoder (SPOT, table 4): slot + position → four layers → features and a mixing logit.

    Args:
        dim: feature width D.
        slot_dim: slot width U.
        num_tokens: patch tokens N.
        hidden: width of the three hidden layers.
        project_slots: bring slots to the feature width (linear + LayerNorm) before they are broadcast.
        top_k: slots decoded for each token, those with the largest slot attention (FT-DINOSAUR, arXiv 2408.09162);
            the masks of the others are 0 there. 0, or no fewer than there are slots: all.
    """

    num_orders = 1

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        num_tokens: int,
        *,
        hidden: int,
        project_slots: bool = True,
        top_k: int = 0,
    ) -> None:
        super().__init__()
        width = dim if project_slots else slot_dim
        self.slot_proj = Projection(slot_dim, dim) if project_slots else nn.Identity()
        self.positions = nn.Parameter(torch.empty(num_tokens, width).normal_(std=0.02))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim + 1),
        )
        for layer in self.mlp[::2]:
            nn.init.zeros_(layer.bias)
        self.top_k = top_k
        self.needs = ("slot_attn",) if top_k else ()

    def forward(
        self,
        slots: Tensor,
        target: Tensor,
        order_index: Tensor | None = None,
        *,
        parallel: bool = False,
        slot_attn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """slots [B, K, U], with top_k also slot_attn [B, N, K] → prediction [B, N, D], masks [B, N, K].

        The other arguments are ignored.
        """
        first, last = self.mlp[0], self.mlp[-1]
        chosen = self._chosen(slots, slot_attn)
        # The first layer is linear in slot + position: products with B · K and N rows replace one with B · K · N.
        hidden = F.linear(self.slot_proj(slots), first.weight)
        hidden = hidden.unsqueeze(2) if chosen is None else _rows(hidden, chosen)
        hidden = self.mlp[1:-1](hidden + first(self.positions))
        logits = F.linear(hidden, last.weight[-1:], last.bias[-1:]).squeeze(-1)
        # Softmax over slots, in float32 at least: masks are compared and averaged later.
        weights = logits.float().softmax(1) if logits.dtype in (torch.bfloat16, torch.float16) else logits.softmax(1)
        masks = weights.transpose(1, 2)
        # Weights sum to 1 over slots, so mixing the hidden layer and projecting once equals mixing K projections.
        mixed = (masks.to(hidden.dtype).unsqueeze(2) @ hidden.transpose(1, 2)).squeeze(2)
        if chosen is not None:
            everywhere = masks.new_zeros(*masks.shape[:2], slots.shape[1])
            masks = everywhere.scatter(2, chosen.transpose(1, 2), masks)
        return F.linear(mixed, last.weight[:-1], last.bias[:-1]), masks

    def _chosen(self, slots: Tensor, slot_attn: Tensor | None) -> Tensor | None:
        """The slots [B, k, N] that each token is decoded from; None for all."""
        if not 0 < self.top_k < slots.shape[1]:
            return None
        if slot_attn is None:
            raise ValueError(f"slot_attn is missing: with top_k={self.top_k} it says which slots decode a token")
        return slot_attn.detach().topk(self.top_k, dim=-1).indices.transpose(1, 2)

    def masks(
        self,
        slots: Tensor,
        target: Tensor,
        order_index: Tensor | None = None,
        *,
        slot_attn: Tensor | None = None,
    ) -> Tensor:
        """The masks of `forward` alone, [B, N, K]."""
        return self(slots, target, slot_attn=slot_attn)[1]


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, K, D], index int64 [B, k, N] → rows [B, k, N, D].

    As a product with ones and zeros: the backward pass of a gather would add rows up in no fixed order on a GPU.
    """
    ones = index.flatten(1).unsqueeze(-1) == torch.arange(tokens.shape[1], device=index.device)
    return (ones.to(tokens.dtype) @ tokens).unflatten(1, index.shape[1:])


def _of_transformer(config: Config) -> dict[str, Any]:
    """The settings that the transformer decoders share."""
    implementation = IMPLEMENTATIONS[config.implementation]
    return dict(
        blocks=config.dec_blocks,
        heads=config.dec_heads,
        cross_heads=config.dec_cross_heads,
        activation=implementation.activation,
        final_norm=implementation.final_norm,
    )


def _transformer(config: Config, encoder: Encoder) -> AutoregressiveDecoder:
    return AutoregressiveDecoder(
        encoder.dim,
        config.slot_dim,
        encoder.grid,
        orders=config.orders,
        cappa=config.cappa,
        **_of_transformer(config),
    )


def _masked(config: Config, encoder: Encoder) -> MaskedDecoder:
    return MaskedDecoder(
        encoder.dim,
        config.slot_dim,
        encoder.num_tokens,
        shown=config.masked_shown,
        drawn=config.masked_drawn,
        **_of_transformer(config),
    )


def _mlp(config: Config, encoder: Encoder) -> MlpDecoder:
    return MlpDecoder(
        encoder.dim,
        config.slot_dim,
        encoder.num_tokens,
        hidden=config.dec_mlp_hidden,
        project_slots=config.mlp_slot_proj,
        top_k=config.mlp_top_k,
    )


# --decoder → its builder. A script registers a decoder of its own here (docs/extending.md).
DECODERS: dict[str, Callable[[Config, Encoder], nn.Module]] = {
    "transformer": _transformer,
    "masked": _masked,
    "mlp": _mlp,
}


def build_decoder(config: Config, encoder: Encoder) -> nn.Module:
    """The decoder that `config` names, with random weights; UserError for settings that do not go together."""
    check_orders(config)
    if config.cappa > 0 and config.decoder in ONE_ORDER:
        raise UserError(
            f"--cappa {config.cappa} belongs to the transformer decoder: drop it or --decoder {config.decoder}"
        )
    if config.decoder not in DECODERS:
        raise UserError(
            f"--decoder {config.decoder} is unknown: use one of {', '.join(DECODERS)}, or call the command from the "
            "script that registers it (docs/extending.md)"
        )
    return DECODERS[config.decoder](config, encoder)


def decoder_name(config: Config) -> str:
    """The decoder in words; a registered one goes by its own name."""
    if config.decoder in ("transformer", "masked"):
        kind = "masked transformer" if config.decoder == "masked" else "transformer"
        return f"{kind} decoder of {config.dec_blocks} blocks"
    if config.decoder == "mlp":
        return f"MLP decoder of each token's top {config.mlp_top_k} slots" if config.mlp_top_k else "MLP decoder"
    return f"{config.decoder} decoder"
