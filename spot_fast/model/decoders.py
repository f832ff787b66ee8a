"""The two decoders (SPOT, sections 3.1-3.3 and table 4): autoregressive transformer and per-slot MLP.

Both take slots [B, K, U] and give a prediction of the target features [B, N, D] with soft masks [B, N, K], raster
layout. The autoregressive one is teacher-forced with the target features, at evaluation too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.model.patch_orders import patch_orders
from spot_kernels import PermutedDecoder, shift_by_order
from spot_kernels.modules import linear


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    """Bias-free linear layer followed by LayerNorm."""
    return nn.Sequential(linear(inputs, outputs, bias=False), nn.LayerNorm(outputs))


class AutoregressiveDecoder(nn.Module):
    """Transformer that predicts each patch from its predecessors in a patch order and from the slots.

    Args:
        dim: feature width D.
        slot_dim: slot width U.
        grid: patches per side, N = grid².
        blocks, heads: of the transformer; cross_heads: of its cross-attentions after the first, 0 = heads.
        orders: `spot9` or `standard`; every order has its own [BOS].
        cappa: probability p of a parallel training step (CapPa, table 3). p > 0 adds learned positions to the inputs
            at every step; p ≥ 1 always decodes in parallel. Standard order only. The caller draws the step.
        activation, final_norm: of the transformer, as in `PermutedDecoder`.
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
        super().__init__()
        self.register_buffer("orders", patch_orders(grid, orders), persistent=False)
        self.cappa = cappa
        self.bos = nn.Parameter(torch.empty(self.num_orders, dim).normal_(std=0.02))
        self.input_proj = _projection(dim, dim)
        self.slot_proj = _projection(slot_dim, dim)
        self.transformer = PermutedDecoder(
            dim,
            blocks=blocks,
            heads=heads,
            cross_heads=cross_heads or None,
            activation=activation,
            final_norm=final_norm,
        )
        if cappa > 0:
            if self.num_orders > 1:
                raise ValueError(f"cappa={cappa} decodes in the standard order only, not in {orders!r}")
            self.positions = nn.Parameter(torch.empty(grid * grid, dim).normal_(std=0.02))
            self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))

    @property
    def num_orders(self) -> int:
        return self.orders.shape[0]

    def _pick(self, order_index: Tensor | None) -> tuple[Tensor, Tensor]:
        """bos [D] and order [N] of one order for all samples, or bos [B, D] and order [B, N] of one each."""
        if order_index is None:
            return self.bos[0], self.orders[0]
        # index_select, because indexing with a scalar tensor reads it on the host.
        index = order_index.reshape(-1)
        bos, order = self.bos.index_select(0, index), self.orders.index_select(0, index)
        return (bos, order) if order_index.dim() else (bos.squeeze(0), order.squeeze(0))

    def inputs(self, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False) -> Tensor:
        """What the input projection sees, [B, N, D] raster: target features shifted by one in the order, after [BOS].

        With CapPa positions are added; in parallel every token is the mask token instead.
        """
        if parallel:
            tokens = self.mask_token.expand_as(target)
        else:
            bos, order = self._pick(order_index)
            tokens = shift_by_order(target, bos, order)
        return tokens + self.positions if self.cappa > 0 else tokens

    def _prepare(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None, parallel: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if parallel and self.cappa <= 0:
            raise ValueError("parallel=True needs a decoder with cappa > 0: it has no mask token")
        parallel = parallel or self.cappa >= 1
        tokens = self.input_proj(self.inputs(target, order_index, parallel=parallel))
        return tokens, self.slot_proj(slots), None if parallel else self._pick(order_index)[1]

    def forward(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """slots [B, K, U], target features [B, N, D] → prediction [B, N, D], masks [B, N, K].

        order_index: int64 [] or [B] on the slots' device, None = order 0. parallel: decode from mask tokens without
        the causal mask.
        """
        return self.transformer(*self._prepare(slots, target, order_index, parallel))

    def masks(self, slots: Tensor, target: Tensor, order_index: Tensor | None = None) -> Tensor:
        """The masks of `forward` alone, [B, N, K]."""
        return self.transformer.masks(*self._prepare(slots, target, order_index, parallel=False))

    def all_orders(self, slots: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`forward` in every order in turn (ENS), which projects the target features once for all of them."""
        if self.num_orders == 1:
            yield self(slots, target)
            return
        batch, tokens = target.shape[:2]
        bos = self.bos.to(target.dtype).expand(batch, -1, -1)
        # Raster positions 0 … N−1 hold the patches, N + p the [BOS] of order p.
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
    """

    num_orders = 1

    def __init__(self, dim: int, slot_dim: int, num_tokens: int, *, hidden: int, project_slots: bool = True) -> None:
        super().__init__()
        width = dim if project_slots else slot_dim
        self.slot_proj = _projection(slot_dim, dim) if project_slots else nn.Identity()
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

    def forward(
        self, slots: Tensor, target: Tensor, order_index: Tensor | None = None, *, parallel: bool = False
    ) -> tuple[Tensor, Tensor]:
        """slots [B, K, U] → prediction [B, N, D], masks [B, N, K]; target, order_index and parallel change nothing."""
        first, last = self.mlp[0], self.mlp[-1]
        # The first layer is linear in slot + position: two small products instead of one of B × K × N rows.
        hidden = F.linear(self.slot_proj(slots), first.weight).unsqueeze(2) + first(self.positions)
        hidden = self.mlp[1:-1](hidden)
        logits = F.linear(hidden, last.weight[-1:], last.bias[-1:]).squeeze(-1)
        weights = logits.float().softmax(1) if logits.dtype in (torch.bfloat16, torch.float16) else logits.softmax(1)
        masks = weights.transpose(1, 2)
        # Mixing weights sum to 1, so mixing the hidden layer and projecting once equals projecting every slot.
        mixed = (masks.to(hidden.dtype).unsqueeze(2) @ hidden.transpose(1, 2)).squeeze(2)
        return F.linear(mixed, last.weight[:-1], last.bias[:-1]), masks

    def masks(self, slots: Tensor, target: Tensor, order_index: Tensor | None = None) -> Tensor:
        """The masks of `forward` alone, [B, N, K]."""
        return self(slots, target)[1]
