"""Whether a patched module computes what the original does: both run on small inputs before anything is replaced.

They run on copies with random parameters, in float64 and then in the module's own dtype on its device, in training and
evaluation, and are compared in results, gradients and in how many random numbers they draw. The module itself, its
gradients, and the random generators stay as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from spot_kernels import dispatch

# The largest difference allowed, relative to the largest value: rounding in float64, where it is told from another
# formula; in a module's own dtype only that the operators work there.
_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.25}

Calls = Callable[[nn.Module, Callable[..., Tensor]], list[tuple[tuple[Any, ...], dict[str, Any]]]]


def disagreement(module: nn.Module, patched: type, calls: Calls) -> str:
    """In what `patched`, a class derived from the module's, differs from it, in a few words; empty: in nothing.

    calls(module, draw) gives the arguments of some calls; draw(*shape) random tensors.
    """
    device, dtype = _place(module)
    if device.type == "meta":
        return "its parameters are on the meta device: move them first"
    generators = _Generators(device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            own = _with_random_parameters(module)
            # MPS has no float64
            wide = None if device.type == "mps" else copy.deepcopy(own).double()
            if wide is not None:
                with dispatch.use_backend("torch"):
                    reason = _compare(wide, patched, calls, generators)
                if reason:
                    return f"its forward computes something else: {reason}"
            if dtype != torch.float64 and (reason := _compare(own, patched, calls, generators)):
                return f"its operators differ here: {reason}"
    except Exception as error:  # whatever a stranger's forward raises: it is left alone, and the report says why
        return f"it could not be compared: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        generators.rewind()
    return ""


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


class _Generators:
    """The states of the random generators of the CPU and of a device, to go back to."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = self.states()

    def states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(*self._which()))
        return states

    def rewind(self) -> None:
        torch.set_rng_state(self.start[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(self.start[1], *self._which())

    def _which(self) -> tuple[torch.device, ...]:
        return () if self.device.type == "mps" else (self.device,)


def _with_random_parameters(module: nn.Module) -> nn.Module:
    """A copy in which no layer is idle: zeros, as many models begin with, would hide what differs."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
                noise = _normal(parameter.shape, generator) * fan_in**-0.5
                # a standard deviation must not be negative
                noise = noise.abs() if "sigma" in name else noise
                parameter.copy_(noise + 0.3 * (parameter.dim() == 1))
    return module


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _compare(module: nn.Module, patched: type, calls: Calls, generators: _Generators) -> str:
    (device, dtype), original = _place(module), type(module)
    allowed = _ALLOWED.get(dtype, 0.0)
    for training in (True, False):
        module.train(training)
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, generator=generator) -> Tensor:
            return _normal(shape, generator).to(device, dtype).requires_grad_()

        for args, kwargs in calls(module, draw):
            before = _attributes(module)
            results, gradients, states = _run(module, original, args, kwargs, generators)
            changed = sorted(name for name, value in _attributes(module).items() if before.get(name) != value)
            if changed:
                return f"it sets {', '.join(changed)}"
            found, found_gradients, found_states = _run(module, patched, args, kwargs, generators)
            if not _alike(results, found):
                return "the results are others in number, shape, dtype or layout"
            if not all(torch.equal(a, b) for a, b in zip(states, found_states, strict=True)):
                return "it draws other random numbers"
            for what, a, b in (("results", results[0], found[0]), ("gradients", gradients, found_gradients)):
                if not (error := _difference(a, b)) <= allowed:
                    return f"{what} differ by {error:.2g} of the largest"
    return ""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward pass that leaves something behind would change."""
    buffers = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    return {name: id(value) for name, value in vars(module).items()} | buffers


def _run(
    module: nn.Module, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any], generators: _Generators
) -> tuple[tuple[list[Any], Any], list[Tensor], list[Tensor]]:
    """The forward of the class `kind` → the results and their structure, all gradients, the generators' states."""
    generators.rewind()
    before, module.__class__ = type(module), kind
    try:
        results, structure = tree_flatten(kind.forward(module, *args, **kwargs))
    finally:
        module.__class__ = before
    states = generators.states()
    inputs = [x for x in [*args, *kwargs.values(), *module.parameters()] if isinstance(x, Tensor) and x.requires_grad]
    weights = torch.Generator().manual_seed(2)
    loss = [
        (x * _normal(x.shape, weights).to(x)).sum()
        for x in results
        if isinstance(x, Tensor) and x.requires_grad
    ]
    if not loss:
        return (results, structure), [], states
    gradients = torch.autograd.grad(sum(loss), inputs, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
    return (results, structure), gradients, states


def _alike(one: tuple[list[Any], Any], other: tuple[list[Any], Any]) -> bool:
    def kind(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return repr(x)
        # an axis of one element may have any stride
        strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
        return x.shape, x.dtype, strides, x.requires_grad

    return one[1] == other[1] and [*map(kind, one[0])] == [*map(kind, other[0])]


def _difference(one: list[Any], other: list[Any]) -> float:
    """The largest difference of the tensors, relative to the largest value of all of them."""
    tensors = [(a.detach(), b.detach()) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor)]
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in tensors if a.numel()]
    if not pairs:
        return 0.0
    largest = max(a.abs().max().item() for a, _ in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / max(largest, 1e-30)
