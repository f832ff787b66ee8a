"""Adam and clipping by the infinity norm (SPOT, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

_FUSED = ("cpu", "cuda")
_STATE = "adam."


def adam(parameters: Iterable[nn.Parameter], *, graphed: bool = False) -> torch.optim.Adam:
    """Adam (0.9, 0.999) without weight decay; the learning rate is set before every step.

    graphed: its step may be recorded as a CUDA graph; the rate is then a tensor on the device.
    """
    parameters = list(parameters)
    fused = all(parameter.device.type in _FUSED for parameter in parameters)
    rate = torch.zeros((), dtype=torch.float32, device=parameters[0].device) if graphed else 0.0
    return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0, fused=fused, capturable=graphed)


def update(optimiser: torch.optim.Adam, bad: Tensor) -> None:
    """Adam's step. bad: [] float32 on the device; where it is 1 nothing changes, neither moments nor step count.

    The host never reads it. Only fused Adam supports this; on a device without it the step is always made.
    """
    # The attribute by which GradScaler tells fused Adam to leave a step out.
    optimiser.found_inf = bad if optimiser.param_groups[0]["fused"] else None
    optimiser.step()


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def clip_by_infinity_norm(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), norm being their largest absolute value; 0 = no clipping.

    Returns the norm before clipping, a scalar on the device; NaN where a gradient has one. Waits for nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient: call backward() first")
    if gradients[0].device.type == "cpu":
        # aminmax is ten times faster than norm on a CPU, whose reduction over absolute values is not vectorised.
        norm = torch.stack([bound for gradient in gradients for bound in gradient.aminmax()]).abs().max()
    else:
        norm = torch.stack(torch._foreach_norm(gradients, float("inf"))).max()
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimiser_tensors(optimiser: torch.optim.Adam, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Moments and step count of every parameter that has had a gradient, as adam.<what>.<parameter name>."""
    return {
        f"{_STATE}{what}.{names[parameter]}": value
        for parameter, state in optimiser.state.items()
        for what, value in state.items()
    }


def load_optimiser_tensors(
    optimiser: torch.optim.Adam, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimiser_tensors` returned."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if key.startswith(_STATE):
            what, name = key.removeprefix(_STATE).split(".", 1)
            parameter = by_name[name]
            # A copy, because a tensor from a file may lie at any address and its alignment would change the last bits.
            optimiser.state[parameter][what] = value.to(parameter.device, copy=True)
