"""Slots before the first iteration of slot attention: drawn around learned means, or learned themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spot_kernels.modules.layers import check_choice

INITIALS = ("gaussian", "slot_gaussian", "learned")
SPREADS = ("exp", "softplus", "abs")


class InitialSlots(nn.Module):
    """Initial slots [B, K, U].

    Args:
        slot_dim: width U of the slots.
        kind: `gaussian`: drawn around one learned `mean` for all slots, with one learned `scale`; `slot_gaussian`: a
            mean and scale for each slot; `learned`: the slots are learned means themselves.
        num_slots: K. For `gaussian` it is a default: calls may ask for any number.
        spread: how the standard deviation follows from `scale`: `exp` (scale is its logarithm), `softplus` or `abs`.
        eval_noise: whether noise is drawn in evaluation, too, as in nearly every published model; False: the slots are
            the mean then.

    Raises:
        ValueError: if `kind` or `spread` is unknown, or `num_slots` is missing or below 1.
    """

    def __init__(
        self,
        slot_dim: int,
        kind: str = "gaussian",
        *,
        num_slots: int | None = None,
        spread: str = "exp",
        eval_noise: bool = True,
    ):
        super().__init__()
        check_choice("initial", kind, INITIALS)
        check_choice("spread", spread, SPREADS)
        if kind != "gaussian" and num_slots is None:
            raise ValueError(f"initial={kind!r} has parameters for each slot: pass num_slots")
        if num_slots is not None and num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: pass at least 1")
        self.kind, self.num_slots, self.spread, self.eval_noise = kind, num_slots, spread, eval_noise
        shape = (1, 1 if kind == "gaussian" else num_slots, slot_dim)
        self.mean = nn.Parameter(torch.empty(shape))
        nn.init.xavier_uniform_(self.mean if kind == "gaussian" else self.mean.data[0])
        if kind != "learned":
            # a standard deviation of about 1, whatever the parametrisation
            self.scale = nn.Parameter(torch.full(shape, {"exp": 0.0, "softplus": 0.5413, "abs": 1.0}[spread]))
            if spread == "exp":
                nn.init.xavier_uniform_(self.scale if kind == "gaussian" else self.scale.data[0])

    def forward(
        self, batch: int, num_slots: int | None = None, *, noise: torch.Tensor | None = None, jitter: float = 0.0
    ) -> torch.Tensor:
        """Initial slots [batch, K, U].

        Args:
            batch: B.
            num_slots: K, if another one than the module's.
            noise: the standard-normal draw [B, K, U]; None: it is drawn here.
            jitter: for `learned` slots, the standard deviation in units of their own mean (BO-QSA lowers it from 1 to
                0 during training).

        Raises:
            ValueError: for a number of slots that the parameters do not have, or noise of another shape.
        """
        num_slots = num_slots if num_slots is not None else self.num_slots
        if num_slots is None:
            raise ValueError("initial slots: pass num_slots, to this call or to the constructor")
        if self.kind != "gaussian" and num_slots != self.num_slots:
            raise ValueError(f"initial slots: num_slots={num_slots}, but there are parameters for {self.num_slots}")
        mean = self.mean.expand(batch, num_slots, -1)
        if self.kind == "learned" and not jitter:
            return mean
        if noise is None and not (self.training or self.eval_noise):
            return mean
        if noise is None:
            noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        elif noise.shape != mean.shape:
            raise ValueError(f"initial slots: noise {tuple(noise.shape)} must be {tuple(mean.shape)}")
        if self.kind == "learned":
            return mean + noise * jitter * mean.detach()
        spread = {"exp": torch.exp, "softplus": F.softplus, "abs": torch.abs}[self.spread]
        return mean + spread(self.scale) * noise
