"""Times other configurations of the kernels beside the one in their tables, at the benchmark's shapes.

    python bench/sweep.py [--only slot_attention] [--shape SPOT] [--minutes 8] [--jobs 12]

Each `config` function of spot_kernels.gpu is replaced for a moment by one that changes some of its answer. What does
not compile, does not fit the chip or computes something else is left out; the rest takes turns with the table's own
choice. Configurations are compiled by --jobs processes first. Prints, for each function and shape, the table's choice
and the best ones. Exit code 0, 3 where --minutes are over (then --only does the rest).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from harness.kernel_bench import Case, Setting, all_cases, doubled, evaluate
from harness.kernel_clock import clock_of, interleaved
from harness.kernel_rows import BOTH, COMPILE, EAGER, FORWARD, OURS, duration

from spot_kernels import dispatch

Change = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A function that makes a configuration, and what to change about its answer.

    function: `module.name` in spot_kernels.gpu. which: the time it is judged by. grid: fields of the answer (a named
    tuple, or that in its field `part`) and their values. only: arguments that a call must have to be changed. make:
    (answer, change, arguments) → the changed answer, where it is not a named tuple.
    """

    operator: str
    function: str
    which: str
    grid: dict[str, tuple[int, ...]]
    only: dict[str, object] = field(default_factory=dict)
    part: str = ""
    make: Callable[[Any, Change, dict[str, Any]], Any] | None = None

    @property
    def place(self) -> tuple[ModuleType, str]:
        module, _, name = self.function.rpartition(".")
        return importlib.import_module(f"spot_kernels.gpu.{module}"), name

    @property
    def title(self) -> str:
        only = ", ".join(f"{name}={value}" for name, value in self.only.items())
        return self.function + (f"({only})" if only else "") + (f".{self.part}" if self.part else "")

    def apply(self, answer: Any, change: Change, arguments: dict[str, Any]) -> Any:
        if self.make is not None:
            return self.make(answer, change, arguments)
        if self.part:
            return answer._replace(**{self.part: getattr(answer, self.part)._replace(**change)})
        return answer._replace(**change)

    def changes(self) -> list[Change]:
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def _split(answer: tuple[int, int], change: Change, arguments: dict[str, Any]) -> tuple[int, int]:
    """slot_attention_plan.splits with a given number of programs a sample."""
    span = math.ceil(arguments["tokens"] / change["number"])
    return math.ceil(arguments["tokens"] / span), span


_LOOP = {"tokens": (32, 64, 128), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3)}
_NUMBERS = {"number": (1, 2, 3, 4, 8, 16, 32, 64)}
_TILES = {"block_m": (32, 64, 128), "block_n": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)}
_BLOCK = {"block_n": (16, 32, 64), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
_NORM = {"rows": (1, 2, 4), "num_warps": (1, 2, 4), "programs": (4, 6, 8, 12), "num_stages": (1, 2, 3)}
_ROWS_BY_CHANNELS = {
    "block_n": (16, 32, 64, 128),
    "block_d": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
}
_ROWS = {"rows": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)}
SWEEPS = (
    Sweep(
        "slot_attention_step",
        "slot_attention_plan.plan",
        FORWARD,
        _LOOP,
        {"backward": False},
    ),
    Sweep(
        "slot_attention_step",
        "slot_attention_plan.plan",
        BOTH,
        _LOOP,
        {"backward": True},
    ),
    Sweep("slot_attention_step", "slot_attention_plan.splits", FORWARD, _NUMBERS, {"backward": False}, make=_split),
    Sweep("slot_attention_step", "slot_attention_plan.splits", BOTH, _NUMBERS, {"backward": True}, make=_split),
    Sweep("permuted_causal_attention", "permuted_attention_plan.config", FORWARD, _TILES, part="forward"),
    Sweep("permuted_causal_attention", "permuted_attention_plan.config", BOTH, _TILES, part="queries"),
    Sweep("permuted_causal_attention", "permuted_attention_plan.config", BOTH, _TILES, part="keys"),
    Sweep("slot_cross_attention", "slot_cross_attention._forward_config", FORWARD, _BLOCK),
    Sweep("slot_cross_attention", "slot_cross_attention._backward_config", BOTH, _BLOCK),
    Sweep("folded_cross_attention", "folded_cross_attention._forward_config", FORWARD, _ROWS_BY_CHANNELS),
    Sweep("folded_cross_attention", "folded_cross_attention._tokens_config", BOTH, _ROWS_BY_CHANNELS),
    Sweep("folded_cross_attention", "folded_cross_attention._slots_config", BOTH, _ROWS_BY_CHANNELS),
    Sweep("SlotAttention", "gru_norm._forward_config", FORWARD, _ROWS),
    Sweep("SlotAttention", "gru_norm._backward_config", BOTH, _ROWS),
    Sweep("add_norm", "add_norm._forward_config", FORWARD, {"rows": (1, 2, 4, 8), "num_warps": (2, 4, 8)}),
    Sweep("add_norm", "add_norm._backward_config", BOTH, _NORM),
    Sweep(
        "linear_relu",
        "linear_relu._backward_config",
        BOTH,
        {"rows": (8, 16, 32), "columns": (128, 256), "programs": (2, 4, 8, 16), "num_warps": (4, 8)},
    ),
    Sweep("match_masks", "mask_matching.config", FORWARD, {"tokens": (32, 64, 128, 256), "warps": (1, 2, 4, 8)}),
)


@contextlib.contextmanager
def changed(sweep: Sweep, change: Change | None, seen: list | None = None) -> Iterator[None]:
    """The configuration with a change in this block; answers as they were without one are appended to `seen`."""
    module, name = sweep.place
    original = getattr(module, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        if any(arguments.get(key) != value for key, value in sweep.only.items()):
            return answer
        if seen is not None:
            seen.append(answer)
        return answer if change is None else sweep.apply(answer, change, arguments)

    setattr(module, name, function)
    try:
        with dispatch.use_backend("triton"):
            yield
    finally:
        setattr(module, name, original)


def shapes(sweep: Sweep, setting: Setting) -> list[Case]:
    """Of the sweep's operator, the cases that stand for a shape class: those with a torch.compile baseline, if any."""
    found = [case for case in all_cases(setting) if case.operator == sweep.operator]
    if setting.tiny:
        return found[:1]
    main = [
        case for case in found if COMPILE in case.techniques and case.dtype != "float32" and "logits" not in case.shape
    ]
    return main or found


def compile_one(job: tuple[int, int, Change, bool, bool]) -> None:
    """Runs a change once, in a process of its own, so that its kernels lie in Triton's cache."""
    sweep_number, shape_number, change, gpu, tiny = job
    sweep, setting = SWEEPS[sweep_number], Setting(gpu, tiny)
    problem = shapes(sweep, setting)[shape_number].build()
    with contextlib.suppress(Exception), changed(sweep, change):
        evaluate(problem.techniques[OURS](), problem.inputs(0), problem.parameters)


def run(sweep: Sweep, case: Case, setting: Setting, best: int = 4) -> str:
    """The table's choice and the best others at one shape, as text."""
    problem = case.build()
    inputs, parameters = problem.inputs(0), problem.parameters
    ours = problem.techniques[OURS]()
    exact = evaluate(problem.exact, doubled(inputs), problem.exact_parameters)
    plain = evaluate(problem.techniques[EAGER](), inputs, parameters)
    seen: list = []
    with changed(sweep, None, seen):
        problem.errors(OURS, evaluate(ours, inputs, parameters), exact, plain)
    if not seen:
        return f"{sweep.title} · {case.shape}: not used here"
    calls, refused = {}, {}
    todo: list[Change | None] = [None, *sweep.changes()]
    for change in todo:
        name = "table" if change is None else ", ".join(f"{key}={value}" for key, value in change.items())
        try:
            with changed(sweep, change):
                problem.errors(OURS, evaluate(ours, inputs, parameters), exact, plain)
        except Exception as error:  # too large for the chip, or not a program: no candidate
            refused[name] = type(error).__name__
            continue

        def call(i: int, change: Change | None = change) -> None:
            with changed(sweep, change):
                if sweep.which == FORWARD or case.backward is None:
                    ours(*inputs)
                else:
                    evaluate(ours, inputs, parameters)

        calls[name] = call
    limits = {"seconds": 0.0, "least": 1, "most": 1} if setting.tiny else {"seconds": 0.05, "least": 5}
    times = interleaved(clock_of(setting.device), calls, **limits)
    table = times.pop("table")
    which = "forward" if sweep.which == FORWARD or case.backward is None else "forward + backward"
    own = getattr(seen[0], sweep.part) if sweep.part else seen[0]
    lines = [f"{sweep.title} · {case.shape} {case.dtype} · {which}", f"  table {duration(table):>9}  {own}"]
    for name, seconds in sorted(times.items(), key=lambda item: item[1])[:best]:
        lines.append(f"        {duration(seconds):>9}  {name}  ({100 * (seconds / table - 1):+.0f} %)")
    if refused:
        reasons = ", ".join(sorted(set(refused.values())))
        lines.append(f"  {len(refused)} of {len(todo) - 1} do not run or are wrong: {reasons}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="functions whose name contains this")
    parser.add_argument("--shape", default="", help="shapes whose name begins with this")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop starting sweeps after this time")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile; 0: none")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape each, also under TRITON_INTERPRET=1")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu and not (args.tiny and dispatch.INTERPRETED):
        print("error: a sweep needs a GPU (or --tiny and TRITON_INTERPRET=1)", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    setting = Setting(gpu, args.tiny)
    chosen = [(i, sweep) for i, sweep in enumerate(SWEEPS) if args.only in sweep.function]
    with contextlib.ExitStack() as stack:
        pool = None
        if gpu and args.jobs:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=context))
        for number, sweep in chosen:
            for place, case in enumerate(shapes(sweep, setting)):
                if not case.shape.startswith(args.shape):
                    continue
                if time.monotonic() > end:
                    print("out of time: --only does the rest")
                    return 3
                if pool is not None:
                    list(pool.map(compile_one, [(number, place, change, gpu, args.tiny) for change in sweep.changes()]))
                print(run(sweep, case, setting), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
