"""The decoder's matrix products in float8, through torchao: `--float8`.

Weights stay float32; each product scales and rounds its factors (e4m3; gradients e5m2) and sums in float32. What that
costs in accuracy is measured on a run's first batch and printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spot_fast.errors import UserError
from spot_fast.system.optional import required

_CAPABILITY = (8, 9)
_MULTIPLE = 16  # the hardware multiplies tiles of 16: a layer's widths must be multiples


def require(device: torch.device) -> None:
    """UserError where `device` or the installation has no float8."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise UserError(f"--float8 needs an NVIDIA GPU of compute capability 8.9 or more, not {device}: leave it out")
    required("torchao.float8", "--float8", "torchao")


def convert(decoder: nn.Module, *, emulate: bool = False) -> int:
    """Makes the decoder's linear layers, where their widths are multiples of 16, multiply in float8; returns how many.

    Parameters and their names stay. emulate: the same rounding on a device that cannot multiply float8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, name: str) -> bool:
        return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0

    convert_to_float8_training(
        decoder, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    )
    return len(_layers(decoder))


def _layers(decoder: nn.Module) -> list[nn.Linear]:
    from torchao.float8.float8_linear import Float8Linear

    return [layer for layer in decoder.modules() if isinstance(layer, Float8Linear)]


@contextlib.contextmanager
def left_out(decoder: nn.Module) -> Iterator[None]:
    """A context in which the converted layers multiply as they did before."""
    layers = _layers(decoder)
    for layer in layers:
        layer.forward = partial(nn.Linear.forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def errors(decoder: nn.Module, loss, parameters: Sequence[nn.Parameter]) -> tuple[float, float]:
    """Relative errors from float8: of the value of `loss()`, and of its gradients (norm of the difference)."""

    def outcome() -> tuple[Tensor, Tensor]:
        value = loss()
        gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
        return value.detach(), torch.cat([g.flatten() for g in gradients if g is not None])

    value, gradient = outcome()
    with left_out(decoder):
        exact, exact_gradient = outcome()
    return (abs(value / exact - 1)).item(), ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
