"""Adam and clipping by the infinity norm (SPOT, section 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from spot_fast.training.shared_gradients import LocalGradients

BETAS, EPS = (0.9, 0.999), 1e-8
FUSED = ("cpu", "cuda")
_STATE = "adam."


class Optimiser(Protocol):
    """What `Adam` and `flat.FlatAdam` have in common for those who set their rate or save their state."""

    param_groups: list[dict[str, Any]]
    state: Mapping[nn.Parameter, Mapping[str, Tensor]]
    slow: Slow | None

    def load(self, parameter: nn.Parameter, what: str, value: Tensor) -> None: ...


class Slow(NamedTuple):
    """Parameters whose learning rate is `factor` times that of the others."""

    parameters: list[nn.Parameter]
    factor: float


class Adam(torch.optim.Adam):
    """torch's Adam with the methods of `flat.FlatAdam`."""

    slow: Slow | None = None

    @property
    def leaves(self) -> list[nn.Parameter]:
        """What backward has to give gradients to."""
        return self.param_groups[0]["params"]

    def in_use(self) -> AbstractContextManager[list[nn.Parameter]]:
        """The block of a forward and backward pass."""
        return contextlib.nullcontext(self.leaves)

    def take_from(self, gradients: LocalGradients) -> None:
        """Gradients are always those of the parameters."""

    def collect(self) -> None:
        """After each backward pass."""

    def clip(self, limit: float) -> Tensor:
        return clip_by_infinity_norm(self.leaves, limit)

    def update(self, bad: Tensor) -> None:
        with slowed(self.slow):
            update(self, bad)

    def last_gradients(self) -> list[Tensor | None]:
        """The gradients of the last step, clipped."""
        return [parameter.grad for parameter in self.leaves]

    def rate_on_device(self) -> None:
        """From now on the learning rate is a tensor on the device, which recorded steps read."""
        (group,) = self.param_groups
        device = self.leaves[0].device
        group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
        group["capturable"] = device.type == "cuda"

    def load(self, parameter: nn.Parameter, what: str, value: Tensor) -> None:
        # A copy, because a tensor from a file may lie at any address and its alignment would change the last bits.
        self.state[parameter][what] = value.to(parameter.device, copy=True)

    def tensors(self) -> list[Tensor]:
        """All that `update` changes in place, weights first."""
        moments = (value for state in self.state.values() for value in state.values())
        return [*(parameter.data for parameter in self.leaves), *moments]


def adam(parameters: Iterable[nn.Parameter], *, graphed: bool = False) -> Adam:
    """Adam (0.9, 0.999) without weight decay; the learning rate is set before every step.

    graphed: its step may be recorded as a CUDA graph, so the rate is a tensor on the device.
    """
    parameters = list(parameters)
    fused = all(parameter.device.type in FUSED for parameter in parameters)
    rate = torch.zeros((), dtype=torch.float32, device=parameters[0].device) if graphed else 0.0
    return Adam(parameters, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, fused=fused, capturable=graphed)


def update(optimiser: torch.optim.Adam, bad: Tensor) -> None:
    """Adam's step. bad: [] float32 on the device, which the host never reads: if it is 1, nothing changes.

    Only fused Adam supports this; elsewhere the step is always made.
    """
    # The attribute by which GradScaler tells fused Adam to leave a step out.
    optimiser.found_inf = bad if optimiser.param_groups[0]["fused"] else None
    optimiser.step()


@contextlib.contextmanager
def slowed(slow: Slow | None) -> Iterator[None]:
    """Around Adam's step, which is proportional to the rate: the slow parameters make `factor` of it.

    So they need no group of their own, which buffers, kernels and recorded steps would have to know.
    """
    if slow is None:
        yield
        return
    with torch.no_grad():
        weights = [parameter.data for parameter in slow.parameters]
        before = [weight.clone() for weight in weights]
        yield
        torch._foreach_lerp_(weights, before, 1 - slow.factor)


def set_learning_rate(optimiser: Optimiser, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def clip_by_infinity_norm(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), norm being their largest absolute value; 0 = no clipping.

    Returns the norm before clipping, a scalar on the device; NaN if a gradient has one.
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


def optimiser_tensors(optimiser: Optimiser, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Moments and step counts of all parameters that have had a gradient, as adam.<what>.<parameter name>."""
    return {
        f"{_STATE}{what}.{names[parameter]}": value
        for parameter, state in optimiser.state.items()
        for what, value in state.items()
    }


def load_optimiser_tensors(
    optimiser: Optimiser, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimiser_tensors` returned."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if key.startswith(_STATE):
            what, name = key.removeprefix(_STATE).split(".", 1)
            optimiser.load(by_name[name], what, value)
