"""Whether a patched module computes what the original does: both run on small inputs before anything is replaced.

They run on copies with random parameters, in training and evaluation, and are compared in results, gradients and random
draws, twice:

- in float64, where a difference above rounding is another formula;
- in the module's own dtype on its device, where the operators have to be about as close to float64 as the original is.

The module itself, its gradients, the random generators and the default dtype stay as they were. The default dtype,
which belongs to the process, is float64 meanwhile, so that constants and noise that the code makes without naming a
dtype are float64, too: other threads should not make tensors at that moment.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from spot_kernels import dispatch


class Call(NamedTuple):
    """The arguments of one call of a method."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    method: str = "forward"


# draw(*shape) gives random inputs of the module's dtype.
Draw = Callable[..., Tensor]
ExampleCalls = Callable[[nn.Module, Draw], list[Call]]

OTHER_LAYOUT = "the results differ in number, shape, dtype or layout"
# The largest difference in float64, relative to the largest value: another formula is further away.
_ROUNDING = 1e-9
# The error in a module's own dtype, relative to the norm: that of TF32 and of a few roundings to bfloat16; a wrong
# operator is further away. More is allowed where the original is about as far from float64.
_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
_TIMES_THE_ORIGINALS = 3.0
_TRIALS = 5
# Noise of another dtype is another noise; the same noise is rounded to it.
_SAME_NOISE = 1e-3


def disagreement(module: nn.Module, patched: type, example_calls: ExampleCalls) -> str:
    """In what `patched`, a class derived from the module's, differs from it, in a few words; empty: in nothing."""
    parameter = next(module.parameters())
    if parameter.device.type == "meta":
        return "its parameters are on the meta device: move them first"
    comparison = _Comparison(type(module), patched, example_calls, _Generators(parameter.device))
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(parameter.device.type, enabled=False):
            return comparison.of_formula(module) or comparison.of_operators(module, parameter.dtype)
    except Exception as error:  # whatever third-party code raises: the module is left alone, and the report says why
        first_line = str(error).partition("\n")[0]
        return f"it could not be compared: {type(error).__name__}: {first_line}"
    finally:
        comparison.generators.rewind()


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
    """Records the results of random operators; or replays recorded ones, in whatever dtype is asked for."""

    def __init__(self, replayed: list[Tensor] | None = None):
        super().__init__()
        self.recorded, self.replayed = [], None if replayed is None else iter(replayed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        if func is torch.ops.aten.native_dropout.default:  # its result depends on its input, too: replay the mask
            result, mask = result
            self._draw(mask)
            return result.copy_(args[0] * mask * (0.0 if args[1] >= 1 else 1 / (1 - args[1]))), mask
        return self._draw(result) if isinstance(result, Tensor) else result

    def _draw(self, result: Tensor) -> Tensor:
        if self.replayed is not None:
            result.copy_(next(self.replayed))
        self.recorded.append(result.clone())
        return result


@dataclass(frozen=True)
class _Run:
    """Results and gradients of one call. layout: structure, shapes, dtypes and strides of the results."""

    results: list[Any]
    gradients: list[Tensor]
    generator_states: list[Tensor]
    layout: Any
    draws: list[Tensor]


@dataclass(frozen=True)
class _Comparison:
    """The original class and the patched one side by side."""

    original: type
    patched: type
    example_calls: ExampleCalls
    generators: _Generators

    @property
    def has_float64(self) -> bool:
        return self.generators.device.type != "mps"

    def of_formula(self, module: nn.Module) -> str:
        if not self.has_float64:
            return ""
        wide = _with_random_parameters(module, torch.float64)
        with dispatch.use_backend("torch"), _default_dtype(torch.float64):
            reason, draws = self._formula(wide, _ROUNDING)
        # With float64 inputs and float32 as the default, noise shows in which of the two it is drawn.
        if not reason and draws:
            with dispatch.use_backend("torch"), _default_dtype(torch.float32):
                reason, _ = self._formula(wide, _SAME_NOISE)
        return reason

    def _formula(self, wide: nn.Module, allowed: float) -> tuple[str, bool]:
        """What differs in float64 by more than allowed, and whether random numbers were drawn."""
        draws = False
        for call in self._calls(wide, torch.float64):
            before = _state(wide)
            expected = self._run(wide, self.original, call)
            changed = sorted(name for name, value in _state(wide).items() if before.get(name) != value)
            other = f"its {call.method} computes something else: "
            if changed:
                return f"{other}it sets {', '.join(changed)}", draws
            actual = self._run(wide, self.patched, call)
            draws = draws or bool(expected.draws)
            reason = _layout_or_draws_differ(actual, expected) or _values_differ(actual, expected, allowed)
            if reason:
                return other + reason, draws
        return "", draws

    def of_operators(self, module: nn.Module, dtype: torch.dtype) -> str:
        if dtype == torch.float64:
            return ""
        allowed, errors = _ALLOWED.get(dtype, 0.0), []
        # Rounding may change the sign of a ReLU's input, and with it a whole gradient, in ours or in the original: with
        # most random parameters it does not, hence the median of a few.
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
        wide = copy.deepcopy(own).double() if self.has_float64 else None
        ours, originals = [], []
        for call in self._calls(own, dtype, seed):
            plain = self._run(own, self.original, call)
            actual = self._run(own, self.patched, call)
            if reason := _layout_or_draws_differ(actual, plain):
                return reason, 0.0, 0.0
            exact = plain
            if wide is not None:
                wide.train(own.training)
                inputs = tree_map_only(Tensor, lambda x: x.detach().double().requires_grad_(), call)
                with dispatch.use_backend("torch"), _default_dtype(torch.float64):
                    exact = self._run(wide, self.original, inputs, replayed=plain.draws, rounded_to=dtype)
            for name in ("results", "gradients"):
                a, b, c = (_tensors(getattr(run, name)) for run in (actual, plain, exact))
                if not all(bool(x.isfinite().all()) for x in a):
                    return f"{name} are not finite", 0.0, 0.0
                ours.append(_distance(a, c))
                originals.append(_distance(b, c))
        return "", max(ours), max(originals)

    def _calls(self, module: nn.Module, dtype: torch.dtype, seed: int = 0) -> Iterator[Call]:
        """The example calls in training, then in evaluation."""
        device = self.generators.device
        for training in (True, False):
            module.train(training)
            generator = torch.Generator().manual_seed(1 + seed)

            def draw(*shape: int, generator=generator) -> Tensor:
                return _normal(shape, generator).to(device, dtype).requires_grad_()

            yield from self.example_calls(module, draw)

    def _run(
        self,
        module: nn.Module,
        kind: type,
        call: Call,
        *,
        replayed: list[Tensor] | None = None,
        rounded_to: torch.dtype | None = None,
    ) -> _Run:
        """The call as the class `kind` has it, and its backward.

        rounded_to: dtype to which the weights of the loss are rounded.
        """
        self.generators.rewind()
        before, module.__class__ = type(module), kind
        try:
            with _Draws(replayed) as draws:
                # not module(…): hooks of the user would be called
                results, structure = tree_flatten(getattr(kind, call.method)(module, *call.args, **call.kwargs))
        finally:
            module.__class__ = before
        states = self.generators.states()
        layout = structure, [*map(_layout, results)]
        leaves = [*call.args, *call.kwargs.values(), *module.parameters()]
        leaves = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        weights = torch.Generator().manual_seed(2)
        loss = [
            (x * _normal(x.shape, weights).to(x.device, rounded_to or x.dtype).to(x.dtype)).sum()
            for x in results
            if isinstance(x, Tensor) and x.requires_grad
        ]
        gradients = []
        if loss:
            gradients = torch.autograd.grad(sum(loss), leaves, allow_unused=True, materialize_grads=True)
        return _Run(results, gradients, states, layout, draws.recorded)


def _with_random_parameters(module: nn.Module, dtype: torch.dtype | None = None, seed: int = 0) -> nn.Module:
    """A copy in which no layer is idle: zeros, as many models begin with, would hide differences."""
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


def _state(module: nn.Module) -> dict[str, Any]:
    """Attributes and versions of buffers: what a forward pass that leaves something behind changes."""
    buffers = {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
    return {name: id(value) for name, value in vars(module).items()} | buffers


def _layout(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return repr(x)
    # an axis of one element may have any stride
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides, x.requires_grad


def _layout_or_draws_differ(actual: _Run, expected: _Run) -> str:
    if actual.layout != expected.layout:
        return OTHER_LAYOUT
    if not all(torch.equal(a, b) for a, b in zip(actual.generator_states, expected.generator_states, strict=True)):
        return "it draws other random numbers"
    return ""


def _values_differ(actual: _Run, expected: _Run, allowed: float) -> str:
    for name in ("results", "gradients"):
        error = _largest_difference(*(_tensors(getattr(run, name)) for run in (actual, expected)))
        if not error <= allowed:  # NaN, too
            return f"{name} differ by {error:.2g} of the largest"
    return ""


def _tensors(values: list[Any]) -> list[Tensor]:
    return [x.detach().double().cpu() for x in values if isinstance(x, Tensor) and x.numel()]


def _largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest expected value of all tensors; NaN if there is one."""
    if not actual:
        return 0.0
    largest = max(x.abs().max().item() for x in expected)
    differences = torch.stack([(a - b).abs().max() for a, b in zip(actual, expected, strict=True)])
    return differences.max().item() / max(largest, 1e-30)


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference over all tensors, relative to that of the expected ones."""
    if not actual:
        return 0.0
    difference = torch.cat([(a - b).flatten() for a, b in zip(actual, expected, strict=True)])
    return difference.norm().item() / max(torch.cat([b.flatten() for b in expected]).norm().item(), 1e-30)
