"""Techniques side by side: right first, then timed in turns, in replayed graphs with inputs that are in no cache."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from record import ABSENT, GO, NO_GO, Options, Recorder, Row, reason

import torch  # isort: skip
from harness.kernel_bench import Function, Problem, doubled, evaluate, gradients_of, input_sets, outputs_of
from harness.kernel_clock import Call, DeviceClock, captured, clock_of, samples, spread
from harness.kernel_rows import EAGER


def compare(
    recorder: Recorder,
    options: Options,
    subject: str,
    problem: Problem,
    names: Mapping[str, str],
    exact: Mapping[str, Function] | None = None,
    *,
    backward: bool = True,
) -> list[Row]:
    """Rows of the problem's techniques, forward and backward; names: technique → what the row calls it.

    exact: of techniques that compute another function than the problem's, theirs. A technique that is wrong, that does
    not run here or that cannot be captured has a row without a time.
    """
    sets = input_sets(problem, options.device)
    first = sets[0]
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    grads = gradients_of(outputs_of(problem.exact(*doubled(first)))) if backward else None
    true_of: dict[Function, object] = {}
    plain = None
    for technique, name in names.items():
        try:
            function = problem.techniques[technique]()
            reference = (exact or {}).get(technique, problem.exact)
            if reference not in true_of:
                true_of[reference] = evaluate(reference, doubled(first), problem.exact_parameters, grads)
            true = true_of[reference]
            if plain is None and EAGER in problem.techniques:
                plain = evaluate(problem.techniques[EAGER](), first, problem.parameters, grads)
            computed = evaluate(function, first, problem.parameters, grads)
            errors[name] = _error(problem, technique, computed, true, plain if reference is problem.exact else None)
        except AssertionError as wrong:
            rows.append(recorder.add(subject, name, verdict=NO_GO, note=reason(wrong)))
            continue
        except Exception as error:
            rows.append(recorder.add(subject, name, verdict=ABSENT, note=reason(error)))
            continue
        used = [g.to(t.dtype) for g, t in zip(grads, computed.outputs, strict=True)] if backward else None

        def call(i: int, function: Function = function, used: list | None = used) -> object:
            given = sets[i % len(sets)]
            return evaluate(function, given, problem.parameters, used) if used is not None else function(*given)

        if options.gpu:
            replay, why = captured(call, len(sets))
            if replay is None:
                rows.append(recorder.add(subject, name, verdict=ABSENT, note=f"no graph: {why}"))
                continue
            calls[name] = replay
        else:
            calls[name] = call
    limits = {"seconds": 0.15, "least": 5} if options.gpu else {"seconds": 0.0, "least": 2, "most": 2}
    taken = samples(DeviceClock() if options.gpu else clock_of(options.device), calls, **limits)
    each = len(sets) if options.gpu else 1
    for name, values in taken.items():
        times = spread([value / each for value in values])
        rows.append(
            recorder.add(
                subject,
                name,
                figure="µs forward and backward" if backward else "µs forward",
                value=1e6 * times.median,
                low=1e6 * times.low,
                high=1e6 * times.high,
                error=errors[name],
                verdict=GO,
            )
        )
    return rows


def _error(problem: Problem, technique: str, computed, true, plain) -> float:
    """The largest relative error; AssertionError where it is too large. Of another function, beside nothing plain."""
    if plain is not None:
        return max(filter(lambda value: value is not None, problem.errors(technique, computed, true, plain)))
    pairs = [*zip(computed.outputs, true.outputs, strict=True), *zip(computed.gradients, true.gradients, strict=True)]
    worst = max(((ours.double() - exact).abs().max() / exact.abs().max()).item() for ours, exact in pairs)
    assert worst < 0.1, f"an error of {worst:.2g}"
    return worst


@contextlib.contextmanager
def fresh_compiler():
    """Shapes of earlier comparisons do not count towards torch.compile's limit of recompilations."""
    torch._dynamo.reset()
    yield
