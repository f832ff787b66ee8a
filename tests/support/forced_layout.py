"""Order layout where no GPU asks for it."""

import pytest
import torch

from spot_kernels import dispatch

_USERS = ("spot_kernels.modules.permuted_decoder", "spot_fast.model.decoders")


def in_order_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on decoders move tokens into the order on any device, unless they are to do without."""

    def prefers(tokens: torch.Tensor, *, gathered: bool = False) -> bool:
        return dispatch.uses("order_layout")

    for module in _USERS:
        monkeypatch.setattr(f"{module}.prefers_order_layout", prefers)
