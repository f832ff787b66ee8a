"""What the operators' benchmarks share: a case, how it is checked and timed, and the floors it cannot beat.

`pytest bench/ --benchmark-only` times every technique at every shape and prints a table at the end.

A `bench_<operator>.py` has `cases(setting)`, the shapes with their formulas. All techniques of a case are compared
with float64 first: ours by the rule of tests/support/kernel_tier.py, others of PyTorch with ten times its room, as they
may add up in another order (the error is printed beside their time) but not compute something else. Those that pass
are timed in turns in one process.
"""

from __future__ import annotations

import gc
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / part) for part in ("bench", "kernels", "tests/support")]

import kernel_tier
from harness.kernel_clock import Call, Ceilings, Work, clock_of, graph_seconds, interleaved, measure_ceilings
from harness.kernel_rows import COMPILE, EAGER, FLEX, OURS, Row
from spot_kernels import dispatch

# How much more error than ours other implementations of PyTorch may have.
_ROOM = 10.0

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., "torch.Tensor | Sequence[torch.Tensor | None]"]


@dataclass(frozen=True)
class Setting:
    """Where the benchmarks run. tiny: sizes that take no time, to see that everything works."""

    gpu: bool
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of most operators: float32 has no tensor cores on a GPU."""
        return (torch.bfloat16,) if self.gpu else (torch.float32, torch.bfloat16)

    def batch(self, full: int, on_cpu: int) -> int:
        return 1 if self.tiny else full if self.gpu else on_cpu


@dataclass
class Problem:
    """A case with its tensors.

    inputs: seed → arguments; those to differentiate by require gradients. techniques: name → maker of a function of the
    arguments; making it may compile. exact: the plain function in float64. parameters and exact_parameters: what is
    differentiated by besides the arguments. check: (ours, exact, plain results) → largest relative errors of outputs
    and gradients, AssertionError where they are too large; None: `relative_errors`, which judges the gradients of a
    long chain of products together (`joint`), as the tests do: alone each would pass or fail by PyTorch's luck with it.
    """

    inputs: Callable[[int], Tensors]
    techniques: Mapping[str, Callable[[], Function]]
    exact: Function
    parameters: Tensors = ()
    exact_parameters: Tensors = ()
    check: Callable[[Results, Results, Results], tuple[float | None, float | None]] | None = None
    joint: bool = False

    def errors(self, technique: str, *results: Results) -> tuple[float | None, float | None]:
        """What `check` says of computed, exact and plain results."""
        if self.check is not None:
            return self.check(*results)
        room = 1.0 if technique.startswith(OURS) else _ROOM
        return relative_errors(*(_joined(results) if self.joint else results), room=room)


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `shape` begins with its name and has the sizes really used; backward: None without."""

    operator: str
    shape: str
    dtype: str
    forward: Work
    backward: Work | None
    techniques: tuple[str, ...]
    build: Callable[[], Problem]
    # The operator whose backend is shown; the case's own unless that is a module.
    backend_of: str = ""
    # Techniques that wait for the host, which no CUDA graph can hold.
    waiting: tuple[str, ...] = ()


@dataclass
class Results:
    outputs: Tensors
    gradients: Tensors


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes(name: str, batch: int, full: int, rest: str) -> str:
    """`SPOT 64×196 K7`, or `SPOT 8 of 64×196 K7` for a smaller batch than the shape is known by."""
    return f"{name} {batch}×{rest}" if batch == full else f"{name} {batch} of {full}×{rest}"


def randn(seed: int, *shapes: Sequence[int], device: torch.device, dtype: torch.dtype, grad: bool = True) -> Tensors:
    """Normal tensors, the same for a seed on a kind of device, each with the heads' axis where modules put it.

    A shape [B, H, N, d] is laid out as [B, N, H, d], as a projection leaves it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = []
    for shape in shapes:
        stored = (shape[0], shape[2], shape[1], *shape[3:]) if len(shape) == 4 else shape
        tensor = torch.randn(stored, generator=generator, device=device).to(dtype)
        made.append((tensor.transpose(1, 2) if len(shape) == 4 else tensor).detach().requires_grad_(grad))
    return tuple(made)


def compiled(function: Function) -> Callable[[], Function]:
    """Maker of the function as torch.compile has it."""
    return lambda: torch.compile(function, fullgraph=True, dynamic=False)


def under(backend: str, function: Function) -> Function:
    """The function with its operators on `backend`."""

    def call(*inputs: torch.Tensor) -> object:
        with dispatch.use_backend(backend):
            return function(*inputs)

    return call


class Backends(TorchDispatchMode):
    """Notes on which backend the operators called in its block run: `found` has those that are not plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        names = [argument.name for argument in func._schema.arguments]
        if space == "spot_kernels" and "backend" in names:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.found[name] = given["backend"]
        return func(*args, **(kwargs or {}))


# ---- right or wrong


def outputs_of(computed: object) -> Tensors:
    """What a function gave, as a tuple of tensors; what it left out is not in it."""
    return (computed,) if isinstance(computed, torch.Tensor) else tuple(t for t in computed if t is not None)


def gradients_of(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Normal gradients of the outputs, the same at every call; rounded to bfloat16, so that every dtype is given the
    same."""
    if not outputs:
        return []
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(t.shape, generator=generator, device=t.device).bfloat16() for t in outputs]


def evaluate(
    function: Function, inputs: Tensors, parameters: Tensors = (), grads: Sequence[torch.Tensor] | None = None
) -> Results:
    """Outputs, and gradients by all inputs and parameters that require them, for the outputs' gradients `grads`.

    Nothing of the graph outlives the call: outputs are detached, and the inputs are leaves made here. A leaf's node
    belongs to the stream on which it was made; one that is kept would bind every later backward pass to that stream,
    which no capture on another stream survives.
    """
    inputs = tuple(t.detach().requires_grad_() if t.requires_grad else t for t in inputs)
    outputs = outputs_of(function(*inputs))
    detached = tuple(t.detach() for t in outputs)
    wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
    if not wanted:
        return Results(detached, ())
    if grads is None:
        grads = [torch.ones_like(t) for t in outputs]
    grads = [grad.to(t.dtype) for grad, t in zip(grads, outputs, strict=True)]
    return Results(detached, torch.autograd.grad(outputs, wanted, grads))


def _joined(results: Sequence[Results]) -> list[Results]:
    """Computed, exact and plain results with each one's gradients as a single vector."""
    named = [dict(enumerate(one.gradients)) for one in results]
    exact = {name: value.cpu() for name, value in named[1].items()}
    return [
        Results(one.outputs, (kernel_tier.joined({k: v.cpu() for k, v in gradients.items()}, exact),))
        for one, gradients in zip(results, named, strict=True)
    ]


def relative_errors(
    computed: Results, exact: Results, plain: Results, *, room: float = 1.0
) -> tuple[float, float | None]:
    """Largest differences from float64 by the largest value.

    AssertionError where they are beyond the plain reference's own by more than 2 (outputs) or 3 (gradients) × `room`.
    """
    kinds = (
        ("output", room * kernel_tier.OUTPUT, computed.outputs, exact.outputs, plain.outputs),
        ("gradient", room * kernel_tier.GRADIENT, computed.gradients, exact.gradients, plain.gradients),
    )
    errors: list[float | None] = []
    for kind, factor, *triples in kinds:
        worst = None
        for i, (ours, true, other) in enumerate(zip(*triples, strict=True)):
            kernel_tier.assert_as_exact(f"{kind} {i}", ours, true, other, factor)
            scale = true.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            worst = max(worst or 0.0, ((ours.double() - true).abs().max() / scale).item())
        errors.append(worst)
    return errors[0] or 0.0, errors[1]


def doubled(tensors: Iterable[torch.Tensor]) -> Tensors:
    """Float64 copies of floating tensors, which require gradients where those do; others as they are."""
    return tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors)


# ---- measuring


def sets_needed(size: float, device: torch.device, most: int = 16) -> int:
    """Of how many sets of `size` bytes a GPU's last cache level holds no more than half; 1 on a CPU, `most` at most."""
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return min(most, max(2, math.ceil(2 * cache / size)))


def input_sets(problem: Problem, device: torch.device) -> list[Tensors]:
    """Arguments to go round, so that none of them is in a cache when it is read."""
    first = problem.inputs(0)
    size = sum(t.numel() * t.element_size() for t in first)
    return [first] + [problem.inputs(seed) for seed in range(1, sets_needed(size, device))]


class Bench:
    """Measures cases and keeps their rows. Only the case at hand keeps its tensors."""

    def __init__(self, setting: Setting):
        self.setting, self.device = setting, setting.device
        self.clock = clock_of(self.device)
        self.ceilings: Ceilings | None = None
        self.rows: list[Row] = []
        self._case: Case | None = None
        self._found: dict[str, Row] = {}
        self._calls: dict[str, Call] = {}

    def row(self, case: Case, technique: str) -> Row:
        """The row of one technique; all of the case are measured when the first is asked for."""
        if self._case is not case:
            self._case, self._found, self._calls = None, {}, {}
            gc.collect()
            if self.ceilings is None:
                self.ceilings = measure_ceilings(self.device, tiny=self.setting.tiny)
            self._found = self._measure(case)
            self.rows += self._found.values()
            self._case = case
        return self._found[technique]

    def call(self, technique: str) -> Callable[[], object]:
        """One call of a technique of the case at hand, from Python until the device is done."""
        call = self._calls[technique]
        if not self.setting.gpu:
            return lambda: call(0)

        def until_done() -> None:
            call(0)
            torch.cuda.synchronize()

        return until_done

    def _measure(self, case: Case) -> dict[str, Row]:
        if {COMPILE, FLEX} & set(case.techniques):
            torch._dynamo.reset()  # shapes of earlier cases count towards its limit of recompilations
        problem = case.build()
        inputs = problem.inputs(0)
        both = case.forward + (case.backward or Work(0, 0))
        blank = Row(
            case.operator,
            case.shape,
            case.dtype,
            "",
            forward_bytes=case.forward.bytes,
            forward_flops=case.forward.flops,
            both_bytes=both.bytes,
            both_flops=both.flops,
        )
        exact_inputs = doubled(inputs)
        grads = gradients_of(outputs_of(problem.exact(*exact_inputs))) if case.backward else None
        exact = evaluate(problem.exact, exact_inputs, problem.exact_parameters, grads)
        plain = evaluate(problem.techniques[EAGER](), inputs, problem.parameters, grads)
        rows, functions = {}, {}
        for name in case.techniques:
            row = replace(blank, technique=name)
            try:
                function = problem.techniques[name]()
                computed = evaluate(function, inputs, problem.parameters, grads)
                if name == OURS:
                    with Backends() as backends:
                        function(*inputs)
                    row = replace(row, backend=backends.found.get(case.backend_of or case.operator, "torch"))
                errors = problem.errors(name, computed, exact, plain)
                row = replace(row, output_error=errors[0], gradient_error=errors[1])
                functions[name] = function
            except AssertionError as wrong:
                row = replace(row, problem=f"FAILED: {wrong}")
            except Exception as error:  # a baseline that does not run here is a dash; an operator of ours has to run
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                row = replace(row, problem=f"FAILED: {reason}" if name in (OURS, EAGER) else f"not here: {reason}")
            rows[name] = row
        del exact, plain, exact_inputs
        return self._time(case, problem, rows, functions)

    def _time(
        self, case: Case, problem: Problem, rows: dict[str, Row], functions: dict[str, Function]
    ) -> dict[str, Row]:
        sets = input_sets(problem, self.device)
        forwards: dict[str, Call] = {}
        boths: dict[str, Call] = {}
        for name, function in functions.items():
            outputs = evaluate(function, sets[0], problem.parameters).outputs if case.backward else ()
            grads = [g.to(t.dtype) for g, t in zip(gradients_of(outputs), outputs, strict=True)]
            forwards[name] = lambda i, f=function: f(*sets[i % len(sets)])
            boths[name] = lambda i, f=function, g=grads: evaluate(f, sets[i % len(sets)], problem.parameters, g)
        self._calls = boths if case.backward else forwards
        limits = {"seconds": 0.25 if self.setting.gpu else 0.15}
        if self.setting.tiny:
            limits = {"seconds": 0.0, "least": 1, "most": 1}
        gc.collect()
        gc.disable()
        try:
            forward = interleaved(self.clock, forwards, **limits)
            both = interleaved(self.clock, boths, **limits) if case.backward else {}
        finally:
            gc.enable()
        for name in functions:
            rows[name] = replace(rows[name], forward_s=forward[name], both_s=both.get(name))
            if self.setting.gpu:
                call = self._calls[name]
                graph, why = (None, "") if name in case.waiting else graph_seconds(call, len(sets))
                rows[name] = replace(rows[name], peak_bytes=_peak(call), graph_s=graph, not_captured=why)
        return rows


def _peak(call: Call) -> float:
    """Bytes that a call takes on the device at its peak, beyond its arguments."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def all_cases(setting: Setting) -> list[Case]:
    """The cases of every bench_<operator>.py."""
    modules = [importlib.import_module(path.stem) for path in sorted((_ROOT / "bench").glob("bench_*.py"))]
    return [case for module in modules if hasattr(module, "cases") for case in module.cases(setting)]
