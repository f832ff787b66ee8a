"""Go or no-go for every kernel at its real shape: forward and backward against float64, and the same bits every time.

    python bench/first_light/operators.py [--rehearse] [--jobs N] [--only slot_attention_step]
    python bench/first_light/operators.py --once match_masks           small calls, for compute-sanitizer

Shapes and their exact versions are those of the benches (`bench_<operator>.py`), the tolerance is the tests': twice
(outputs) and three times (gradients) plain PyTorch's own error in that dtype. Every operator then has to give the same
bits REPEATS times. Each has a process of its own, because one illegal access ends all that its process was to do; they
run side by side, most of their time being compilation. compute-sanitizer searches for races where it is installed.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from record import ABSENT, GO, LATE, NO_GO, Options, Recorder, Row, Time, options, parser, reason, run

import torch  # isort: skip
from harness.kernel_bench import Case, Results, Setting, all_cases, doubled, evaluate, gradients_of, outputs_of
from harness.kernel_rows import EAGER, OURS

import spot_kernels

REPEATS = 20
# What compute-sanitizer inspects: the two kernels whose threads hand values to one another in ways of their own.
RACES = ("match_masks", "permuted_causal_attention")
_SANITIZER_SECONDS = 75.0


def cases(setting: Setting, operator: str = "") -> list[Case]:
    """The benches' cases with a kernel of ours, the shapes that only show how something scales left out."""
    found = [case for case in all_cases(setting) if OURS in case.techniques]
    return [case for case in found if operator in ("", case.operator) and not case.shape.startswith(("N ", "K "))]


def check(case: Case, repeats: int) -> list[Row]:
    """Whether the operator is right at this shape, and whether it repeats."""
    about = {"part": "operators", "subject": f"{case.operator}, {case.shape}", "variant": case.dtype}
    problem = case.build()
    inputs = problem.inputs(0)
    ours = problem.techniques[OURS]()
    grads = None
    if case.backward is not None:
        grads = gradients_of(outputs_of(ours(*inputs)))
    exact = evaluate(problem.exact, doubled(inputs), problem.exact_parameters, grads)
    plain = evaluate(problem.techniques[EAGER](), inputs, problem.parameters, grads)
    first = evaluate(ours, inputs, problem.parameters, grads)
    rows = []
    try:
        output, gradient = problem.errors(OURS, first, exact, plain)
        worst = max(filter(lambda value: value is not None, (output, gradient)))
        rows.append(Row(**about, figure="error against float64", error=worst, verdict=GO))
    except AssertionError as wrong:
        rows.append(Row(**about, figure="error against float64", verdict=NO_GO, note=reason(wrong)))
    different = 0
    for _ in range(repeats - 1):
        again = evaluate(ours, inputs, problem.parameters, grads)
        different += not all(map(torch.equal, _tensors(first), _tensors(again)))
    rows.append(
        Row(
            **about,
            figure=f"the same bits {repeats} times",
            verdict=NO_GO if different else GO,
            note=f"{different} of {repeats - 1} differ" if different else "",
        )
    )
    return rows


def _tensors(results: Results) -> Sequence[torch.Tensor]:
    return [*results.outputs, *results.gradients]


def checks_of(operator: str, options: Options, results) -> None:
    """All cases of one operator; rows go to `results` as they come. What a process of its own does."""
    repeats = 3 if options.rehearse else REPEATS
    for case in cases(Setting(options.gpu, tiny=options.rehearse), operator):
        try:
            rows = check(case, repeats)
        except Exception as error:
            rows = [Row("operators", f"{case.operator}, {case.shape}", case.dtype, verdict=NO_GO, note=reason(error))]
        for row in rows:
            results.put(row)


def names(options: Options) -> list[str]:
    return list(dict.fromkeys(case.operator for case in cases(Setting(options.gpu, tiny=options.rehearse))))


def operators(
    recorder: Recorder, options: Options, time: Time, jobs: int, only: str = "", *, races: bool = True
) -> None:
    wanted = [name for name in names(options) if only in name]
    sanitizers = [start_sanitizer(name) for name in RACES] if races and not options.rehearse and not only else []
    if jobs == 0:  # in this process
        results = _Direct(recorder)
        for name in wanted:
            checks_of(name, options, results)
    else:
        side_by_side(recorder, options, time, wanted, jobs)
    if options.rehearse:
        recorder.add("races", ", ".join(RACES), verdict=ABSENT, note="there is no GPU for compute-sanitizer")
    for process in sanitizers:
        report_sanitizer(recorder, process, time)


class _Direct:
    """Instead of a queue: rows are added at once."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def put(self, row: Row) -> None:
        add(self.recorder, row)


def add(recorder: Recorder, row: Row) -> None:
    values = asdict(row)
    recorder.add(values.pop("subject"), values.pop("variant"), **{k: v for k, v in values.items() if k != "part"})


def side_by_side(recorder: Recorder, options: Options, time: Time, wanted: Sequence[str], jobs: int) -> None:
    """A process for each operator, `jobs` at a time."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    waiting, running = list(wanted), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = context.Process(target=checks_of, args=(name, options, results))
                running[name].start()
            drain(recorder, results, 0.2)
            for name, process in list(running.items()):
                if not process.is_alive():
                    del running[name]
                    drain(recorder, results, 0.2)
                    if process.exitcode:
                        recorder.add(name, verdict=NO_GO, note=f"its process ended with code {process.exitcode}")
            if time.left < 3:
                break
    finally:
        for process in running.values():
            process.kill()
        drain(recorder, results, 0.2)
        for name in [*running, *waiting]:
            recorder.add(name, verdict=LATE)


def drain(recorder: Recorder, results, seconds: float) -> None:
    """Adds the rows that have come, and those that come within `seconds` of each other."""
    while True:
        try:
            add(recorder, results.get(timeout=seconds))
        except queue.Empty:
            return


# ---- races


def start_sanitizer(name: str) -> tuple[str, subprocess.Popen | None]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return name, None
    command = [tool, "--tool", "racecheck", "--error-exitcode", "9", sys.executable, __file__, "--once", name]
    return name, subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def report_sanitizer(recorder: Recorder, started: tuple[str, subprocess.Popen | None], time: Time) -> None:
    name, process = started
    if process is None:
        recorder.add("races", name, verdict=ABSENT, note="compute-sanitizer is not installed")
        return
    try:
        text, _ = process.communicate(timeout=max(1.0, min(_SANITIZER_SECONDS, time.left - 2)))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        recorder.add("races", name, verdict=LATE)
        return
    hazards = [
        line.strip("= ") for line in text.splitlines() if "RACECHECK SUMMARY" in line or "hazard" in line.lower()
    ]
    note = hazards[-1] if hazards else (text.strip().splitlines() or ["no output"])[-1][:200]
    clean = process.returncode == 0 and any("0 hazards" in line for line in hazards)
    verdict = GO if clean else NO_GO if process.returncode == 9 else ABSENT
    recorder.add("races", name, figure="compute-sanitizer, racecheck", verdict=verdict, note=note)


def once(name: str, device: torch.device) -> None:
    """Small calls of an operator that reach every way in which its threads hand values to one another.

    Matching: a search held by one warp, and one spread over two, which exchange through shared memory. Attention:
    several tiles of rows and columns, forward and backward.
    """
    generator = torch.Generator().manual_seed(0)
    if name == "match_masks":
        for slots in (7, 24, 64):
            maps = (torch.randint(slots, (2, 196), generator=generator).to(device) for _ in range(2))
            spot_kernels.match_masks(*maps, slots)
    else:
        q, k, v = (
            torch.randn(1, 2, 196, 128, generator=generator).to(device, torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        order = torch.randperm(196, generator=generator).to(device)
        spot_kernels.permuted_causal_attention(q, k, v, order).float().square().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--jobs", type=int, default=8, metavar="N", help="processes at a time; 0: all in this one")
    words.add_argument("--only", default="", help="operators whose name contains this")
    words.add_argument("--no-races", action="store_true", help="without compute-sanitizer")
    words.add_argument("--once", choices=RACES, help="small calls of an operator, nothing else")
    args = words.parse_args()
    if args.once:
        sys.exit(once(args.once, options(args).device))
    sys.exit(run("operators", lambda *given: operators(*given, args.jobs, args.only, races=not args.no_races), args))
