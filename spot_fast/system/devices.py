"""Which device a command runs on, and how tensors get there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spot_fast.errors import UserError


def named_device(name: str | None) -> torch.device:
    """cpu, cuda, cuda:N as --device names it; None: a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def usable_device(name: str | None, choose: Callable[[str | None], torch.device] = named_device) -> torch.device:
    """The device that `choose` makes of --device; UserError where it is unknown or takes no tensor."""
    try:
        device = choose(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to a GPU it is copied in line with the present stream, and the host does not wait.

    A copy out of memory that is not pinned would wait for the device, without PyTorch's sync debug mode noticing.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
