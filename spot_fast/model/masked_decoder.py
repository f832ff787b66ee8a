"""The masked decoder (DIAS, arXiv 2507.23755, and SmoothSA): a transformer that fills in hidden tokens.

It is trained on random subsets of the tokens, of any size. Self-attention is full, so that the random order in which
the authors' code lays out tokens changes nothing: it only says which come first and are shown.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spot_fast.model.transformer_decoder import TransformerDecoder

_SMALL = 0.1  # of positions beside features, in `start_from_slots`


class MaskedDecoder(TransformerDecoder):
    """Predicts all tokens from the slots and from the tokens that are shown; every token sees all others.

    A hidden token's projected feature is replaced by a learned token; learned positions are added to all. The loss is
    that of all tokens. Without draws nothing is hidden: so a teacher's masks, and those of evaluation, are made.

    Args:
        dim, slot_dim, blocks, heads, further: as in `TransformerDecoder`.
        num_tokens: patch tokens N.
        shown: share of the tokens shown of an image whose share is not drawn.
        drawn: probability that an image's number of shown tokens is drawn from 0, 1, …, N - 2 instead.
    """

    num_orders = 1
    needs = ("draws",)

    def __init__(
        self, dim: int, slot_dim: int, num_tokens: int, *, shown: float = 0.1, drawn: float = 0.5, **further: Any
    ) -> None:
        super().__init__(dim, slot_dim, **further)
        self.shown, self.drawn = shown, drawn
        # A projected token has a variance of 1, and positions are as large, as in the authors' code.
        self.positions = nn.Parameter(torch.empty(num_tokens, dim).normal_())
        self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=dim**-0.5))

    @torch.no_grad()
    def start_from_slots(self, rotation: Tensor) -> None:
        """As in `TransformerDecoder`; a token reads its own feature, so with nothing hidden masks begin as the slots'.

        Beside features positions begin small, or they would choose the slots too. Hidden tokens have no feature to look
        up with: what they attend to is random until self-attention has learned to bring them their neighbours'.
        """
        super().start_from_slots(rotation)
        self.positions.mul_(_SMALL)

    def draws(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """hidden: bool [B, N] on the generator's device, which tokens of a training step are hidden."""
        tokens = len(self.positions)

        def uniform(numbers: int) -> Tensor:
            shape = (batch_size, numbers)
            return torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)

        place = uniform(tokens).argsort(1)  # of each token in a random order
        drawn = (uniform(1) * (tokens - 1)).long()
        shown = torch.where(uniform(1) < self.drawn, drawn, int(self.shown * tokens))
        return {"hidden": place >= shown}

    def _tokens(self, target: Tensor, hidden: Tensor | None = None) -> Tensor:
        """What the transformer reads, [B, N, D]."""
        tokens = self.input_proj(target)
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        return tokens + self.positions

    def forward(
        self,
        slots: Tensor,
        target: Tensor,
        order_index: Tensor | None = None,
        *,
        parallel: bool = False,
        draws: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """slots [B, K, U], target features [B, N, D] → prediction [B, N, D], masks [B, N, K].

        draws: of a training step; None hides nothing. The other arguments are ignored.
        """
        hidden = None if draws is None else draws["hidden"]
        return self.transformer(self._tokens(target, hidden), self.slot_proj(slots), None)

    def masks(self, slots: Tensor, target: Tensor, order_index: Tensor | None = None) -> Tensor:
        """The masks of `forward` alone, [B, N, K], with nothing hidden."""
        return self.transformer.masks(self._tokens(target), self.slot_proj(slots), None)
