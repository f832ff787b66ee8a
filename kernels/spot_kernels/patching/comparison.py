"""Whether a patched module computes what the original does: both run on small inputs before anything is replaced.

They run on copies with random parameters, in training and evaluation, and are compared in results, gradients and random
draws: in float64, where rounding is told from another formula; and in the module's own dtype on its device, where the
operators have to be about as close to float64 as the original is. The module itself, its gradients, the random
generators and the default dtype stay as they were.

The default dtype, which is the process's, is float64 meanwhile, so that constants and noise that the code makes without
naming a dtype are float64, too: other threads should not make tensors at that moment.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from spot_kernels import dispatch
from spot_kernels.patching.forward_reads import Recorder

# The largest difference in float64, relative to the largest value: another formula is further away.
_ROUNDING = 1e-9
# The error in a module's own dtype, as a part of the norm: of TF32 and of a few roundings to bfloat16; what is wrong is
# further away. More is allowed where the original is about as far from float64.
_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
_TIMES_THE_ORIGINALS = 3.0
_TRIALS = 5
# Noise of another dtype is another noise; the same one is rounded to it.
_SAME_NOISE = 1e-3

Calls = Callable[[nn.Module, Callable[..., Tensor]], list[tuple[tuple[Any, ...], dict[str, Any]]]]


def disagreement(module: nn.Module, patched: type, calls: Calls) -> tuple[str, set[str]]:
    """In what `patched`, a class derived from the module's, differs from it, in a few words, empty: in nothing; and the
    names of the attributes that the original asked for.

    calls(module, draw) gives the arguments of some calls; draw(*shape) random tensors.
    """
    device, dtype = _place(module)
    if device.type == "meta":
        return "its parameters are on the meta device: move them first", set()
    comparison = _Comparison(patched, Recorder(type(module)), calls, _Generators(device))
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            reason = comparison.of_formula(module) or comparison.of_operators(module)
    except Exception as error:  # whatever a stranger's forward raises: it is left alone, and the report says why
        said = str(error).splitlines()[0] if str(error) else ""
        reason = f"it could not be compared: {type(error).__name__}: {said}"
    finally:
        comparison.generators.rewind()
    return reason, comparison.recorder.names


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


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Draws(TorchDispatchMode):
    """Keeps what random operators give; or gives again what another one kept, in whatever dtype is asked for."""

    def __init__(self, again: list[Tensor] | None = None):
        super().__init__()
        self.kept, self.again = [], None if again is None else iter(again)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        if func is torch.ops.aten.native_dropout.default:  # its result depends on its input, too
            result, mask = result
            self._draw(mask)
            return result.copy_(args[0] * mask * (0.0 if args[1] >= 1 else 1 / (1 - args[1]))), mask
        return self._draw(result) if isinstance(result, Tensor) else result

    def _draw(self, result: Tensor) -> Tensor:
        if self.again is not None:
            result.copy_(next(self.again))
        self.kept.append(result.clone())
        return result


@dataclass(frozen=True)
class _Run:
    """What one forward and backward pass gave. alike: what has to be the same to the bit."""

    results: list[Any]
    gradients: list[Tensor]
    states: list[Tensor]
    alike: Any
    draws: list[Tensor]


@dataclass(frozen=True)
class _Comparison:
    """The patched class and the original, which is recorded, side by side."""

    patched: type
    recorder: Recorder
    calls: Calls
    generators: _Generators

    def of_formula(self, module: nn.Module) -> str:
        if self.generators.device.type == "mps":  # which has no float64
            return ""
        wide = _with_random_parameters(module, torch.float64)
        with dispatch.use_backend("torch"), _default_dtype(torch.float64):
            reason, draws = self._formula(wide, _ROUNDING)
        # and whether noise is drawn in the dtype of the inputs or in the default one
        if not reason and draws:
            with dispatch.use_backend("torch"), _default_dtype(torch.float32):
                reason, _ = self._formula(wide, _SAME_NOISE)
        return f"its forward computes something else: {reason}" if reason else ""

    def _formula(self, wide: nn.Module, allowed: float) -> tuple[str, bool]:
        """What differs in float64 by more than allowed, and whether random numbers were drawn."""
        draws = False
        for args, kwargs in self._arguments(wide, torch.float64):
            before = _attributes(wide)
            expected = self._run(wide, self.recorder.kind, args, kwargs)
            changed = sorted(name for name, value in _attributes(wide).items() if before.get(name) != value)
            if changed:
                return f"it sets {', '.join(changed)}", draws
            found = self._run(wide, self.patched, args, kwargs)
            draws = draws or bool(expected.draws)
            reason = _unlike(found, expected) or _too_far(found, expected, allowed)
            if reason:
                return reason, draws
        return "", draws

    def of_operators(self, module: nn.Module) -> str:
        _, dtype = _place(module)
        if dtype == torch.float64:
            return ""
        allowed, errors = _ALLOWED.get(dtype, 0.0), []
        # Rounding may change the sign of what a ReLU gets, and with it a whole gradient, in ours or in the original: in
        # most draws it does not.
        for seed in range(_TRIALS):
            reason, *pair = self._operators(_with_random_parameters(module, seed=seed), dtype, seed)
            if reason:
                return f"its operators differ here: {reason}"
            errors.append(pair)
            if seed == 0 and pair[0] <= allowed:
                return ""
        ours, originals = (statistics.median(error) for error in zip(*errors, strict=True))
        if ours <= max(allowed, _TIMES_THE_ORIGINALS * originals):
            return ""
        return f"its operators differ here: they are off by {ours:.2g}, the original by {originals:.2g}"

    def _operators(self, own: nn.Module, dtype: torch.dtype, seed: int) -> tuple[str, float, float]:
        """What differs in the module's own dtype whatever the numbers; the error of ours, and the original's."""
        wide = None if self.generators.device.type == "mps" else copy.deepcopy(own).double()
        ours, originals = [], []
        for args, kwargs in self._arguments(own, dtype, seed):
            plain = self._run(own, self.recorder.kind, args, kwargs)
            found = self._run(own, self.patched, args, kwargs)
            if reason := _unlike(found, plain):
                return reason, 0.0, 0.0
            exact = plain
            if wide is not None:
                wide.train(own.training)
                inputs = tree_map_only(Tensor, lambda x: x.detach().double().requires_grad_(), (args, kwargs))
                with dispatch.use_backend("torch"), _default_dtype(torch.float64):
                    exact = self._run(wide, self.recorder.kind, *inputs, again=plain.draws, rounded=dtype)
            for name in ("results", "gradients"):
                a, b, c = (_tensors(getattr(run, name)) for run in (found, plain, exact))
                if not all(bool(x.isfinite().all()) for x in a):
                    return f"{name} are not finite", 0.0, 0.0
                ours.append(_distance(a, c))
                originals.append(_distance(b, c))
        return "", max(ours), max(originals)

    def _arguments(
        self, module: nn.Module, dtype: torch.dtype, seed: int = 0
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Those of every call, in training and in evaluation."""
        device = self.generators.device
        for training in (True, False):
            module.train(training)
            generator = torch.Generator().manual_seed(1 + seed)

            def draw(*shape: int, generator=generator) -> Tensor:
                return _normal(shape, generator).to(device, dtype).requires_grad_()

            yield from self.calls(module, draw)

    def _run(
        self,
        module: nn.Module,
        kind: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        again: list[Tensor] | None = None,
        rounded: torch.dtype | None = None,
    ) -> _Run:
        """The forward of the class `kind`. again: what to draw. rounded: the dtype that the loss's weights have."""
        self.generators.rewind()
        before, module.__class__ = type(module), kind
        try:
            with _Draws(again) as draws:
                results, structure = tree_flatten(kind.forward(module, *args, **kwargs))
        finally:
            module.__class__ = before
        states = self.generators.states()
        alike = structure, [*map(_looks, results)]
        leaves = [*args, *kwargs.values(), *module.parameters()]
        leaves = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        weights = torch.Generator().manual_seed(2)
        loss = [
            (x * _normal(x.shape, weights).to(x.device, rounded or x.dtype).to(x.dtype)).sum()
            for x in results
            if isinstance(x, Tensor) and x.requires_grad
        ]
        if not loss:
            return _Run(results, [], states, alike, draws.kept)
        gradients = torch.autograd.grad(sum(loss), leaves, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
        return _Run(results, gradients, states, alike, draws.kept)


def _with_random_parameters(module: nn.Module, dtype: torch.dtype | None = None, seed: int = 0) -> nn.Module:
    """A copy in which no layer is idle: zeros, as many models begin with, would hide what differs."""
    module, generator = copy.deepcopy(module).to(dtype=dtype), torch.Generator().manual_seed(seed)
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


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward pass that leaves something behind would change."""
    buffers = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    return {name: id(value) for name, value in vars(module).items()} | buffers


def _looks(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return repr(x)
    # an axis of one element may have any stride
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides, x.requires_grad


def _unlike(found: _Run, expected: _Run) -> str:
    if found.alike != expected.alike:
        return "the results are others in number, shape, dtype or layout"
    if not all(torch.equal(a, b) for a, b in zip(found.states, expected.states, strict=True)):
        return "it draws other random numbers"
    return ""


def _too_far(found: _Run, expected: _Run, allowed: float) -> str:
    for name in ("results", "gradients"):
        error = _difference(*(_tensors(getattr(run, name)) for run in (found, expected)))
        if not error <= allowed:
            return f"{name} differ by {error:.2g} of the largest"
    return ""


def _tensors(values: list[Any]) -> list[Tensor]:
    return [x.detach().double().cpu() for x in values if isinstance(x, Tensor) and x.numel()]


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of all of the others; NaN where there is one."""
    if not some:
        return 0.0
    largest = max(x.abs().max().item() for x in others)
    differences = torch.stack([(a - b).abs().max() for a, b in zip(some, others, strict=True)])
    return differences.max().item() / max(largest, 1e-30)


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    """The difference of all together, relative to the norm of the others."""
    if not some:
        return 0.0
    difference = torch.cat([(a - b).flatten() for a, b in zip(some, others, strict=True)])
    return difference.norm().item() / max(torch.cat([b.flatten() for b in others]).norm().item(), 1e-30)
