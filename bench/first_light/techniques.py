"""What each technique of the step is worth: steps with all of them, without each one, and under options of Inductor.

    python bench/first_light/techniques.py [--stages 1 2] [--variants mix_order combo] [--rehearse]

A step is that of `steps.py`, compiled and replayed as a CUDA graph. Every row is a process of its own, so that all are
compiled side by side; when all are ready, or the time for that is over, they take turns while the others wait. A row
has its gradients' error, and by how many milliseconds it is slower than the step with everything. Techniques are those
of `spot_kernels.dispatch.TECHNIQUES`; VARIANTS are options of torch._inductor.config, of which `--variants` names some.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from record import GO, LATE, NO_GO, Options, Recorder, Time, options, parser, reason, run

import torch  # isort: skip
from harness.kernel_clock import spread
from steps import COMPILED, GRAPH, Checks, sample, stage_of

from spot_kernels import dispatch

# Name → options of torch._inductor.config.
VARIANTS: dict[str, dict[str, object]] = {
    "mix_order": {"triton.mix_order_reduction": False},
    "mix_order_split": {"triton.mix_order_reduction_autotune_split_size": True},
    "combo": {"combo_kernels": True},
    "coordinate": {"coordinate_descent_tuning": True},
    "gemm": {"max_autotune_gemm": True},
    "gemm_triton": {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"},
    "autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
    "no_epilogues": {"epilogue_fusion": False},
    "no_padding": {"shape_padding": False},
    "no_split": {"split_reductions": False},
    "no_loop_order": {"loop_ordering_after_fusion": False},
}
EVERYTHING, NOTHING = "everything", "without any"
_MARK = "technique "
# Of the part's seconds, those that are kept for taking turns, for each row.
_TURN_SECONDS, _ROUNDS, _STEPS = 1.2, 3, 20


@dataclass(frozen=True)
class Variant:
    """A row: techniques left out, and options of Inductor."""

    name: str
    without: tuple[str, ...] = ()
    inductor: str = ""


def variants(chosen: Sequence[str], *, few: bool = False) -> list[Variant]:
    """With everything, without each technique (`few`: not these), without any, and the `chosen` of VARIANTS."""
    techniques = tuple(dispatch.TECHNIQUES)
    return [
        Variant(EVERYTHING),
        *(Variant(f"without {name}", (name,)) for name in techniques if not few),
        Variant(NOTHING, techniques),
        *(Variant(f"Inductor: {name}", inductor=name) for name in chosen),
    ]


# ---- a row's process


def child(stage_number: int, variant: Variant, chosen: Options) -> None:
    """Compiles and records, says so, then answers every line with the milliseconds of a step."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.without(*variant.without))
        if variant.inductor:
            stack.enter_context(torch._inductor.config.patch(VARIANTS[variant.inductor]))
        stage = stack.enter_context(stage_of(stage_number, chosen))
        with one_at_a_time():  # plain PyTorch in float32 takes most of the memory
            checks = Checks(stage)
            _free()
        stage.be(COMPILED)
        checks.of_compiled()
        _free()
        stage.be(GRAPH)
        stage.run(6)
        stage.wait()
        _free()
        recorded = stage.trainer.update.recorded
        _say(error=checks.found[COMPILED], allowed=checks.allowed, recorded=recorded)
        for _ in sys.stdin:
            _say(ms=sample(stage, 2 if chosen.rehearse else _STEPS))


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of all rows' processes."""
    with open(__file__, encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _free() -> None:
    """Gives the device what PyTorch keeps for later, as there are many processes on it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(**values: object) -> None:
    print(_MARK + json.dumps(values), flush=True)


class Process:
    """The parent's end of a row: a process, and what it has said."""

    def __init__(self, stage: int, variant: Variant, words: Sequence[str], threads: int) -> None:
        self.stage, self.variant, self.samples = stage, variant, []
        about = json.dumps([stage, variant.name, variant.without, variant.inductor])
        self._answers: queue.Queue[dict] = queue.Queue()
        limits = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", about, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | limits,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        last = ""
        for line in self._process.stdout:
            if line.startswith(_MARK):
                self._answers.put(json.loads(line.removeprefix(_MARK)))
            elif line.strip():
                last = line.strip()
        self._answers.put({"problem": last or f"ended with exit code {self._process.wait()}"})

    def answer(self, seconds: float) -> dict:
        """What it says next; `late` where that takes longer."""
        try:
            return self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            return {"late": True}

    def ask(self) -> None:
        """For a time, which is the next answer."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def processes(made: Callable[[], list[Process]]) -> Iterator[list[Process]]:
    found: list[Process] = []
    try:
        found += made()
        yield found
    finally:
        for one in found:
            one.close()


# ---- the part


def techniques(recorder: Recorder, options: Options, time: Time, stages: Sequence[int], chosen: Sequence[str]) -> None:
    """All rows of all stages; a row that is not ready when the turns begin is out of time."""
    wanted = [(stage, variant) for stage in stages for variant in variants(chosen, few=options.rehearse)]
    words = ["--rehearse"] * options.rehearse
    threads = max(1, 2 * len(os.sched_getaffinity(0)) // len(wanted))
    with processes(lambda: [Process(stage, variant, words, threads) for stage, variant in wanted]) as running:
        until = max(5.0, time.left - _TURN_SECONDS * len(running) - 5)
        deadline = Time(until)
        ready: dict[Process, dict] = {}
        for one in running:
            found = one.answer(deadline.left)
            if "error" in found:
                ready[one] = found
            else:
                _without_a_time(recorder, one, found)
                one.close()  # it would disturb the others
        recorder.add("all rows", figure="s until they were compiled", value=until - deadline.left)
        for _ in range(_ROUNDS):
            for one in list(ready):
                one.ask()
                found = one.answer(max(5.0, time.left))
                if "ms" in found:
                    one.samples.append(found["ms"])
                else:
                    _without_a_time(recorder, one, found)
                    del ready[one]
    _report(recorder, ready)


def _without_a_time(recorder: Recorder, one: Process, found: dict) -> None:
    verdict = LATE if "late" in found else NO_GO
    recorder.add(f"stage {one.stage}", one.variant.name, verdict=verdict, note=found.get("problem", "")[:300])


def _report(recorder: Recorder, ready: dict[Process, dict]) -> None:
    whole = {one.stage: spread(one.samples).median for one in ready if one.variant.name == EVERYTHING}
    for one, found in ready.items():
        times = spread(one.samples)
        beside = times.median - whole.get(one.stage, float("nan"))
        notes = [f"{beside:+.3f} ms beside everything"] * (one.variant.name != EVERYTHING and one.stage in whole)
        notes += ["NOT recorded"] * (not found["recorded"])
        recorder.add(
            f"stage {one.stage}",
            one.variant.name,
            figure="ms a step",
            value=times.median,
            low=times.low,
            high=times.high,
            error=found["error"],
            allowed=found["allowed"],
            verdict=GO if found["error"] <= found["allowed"] else NO_GO,
            note=", ".join(notes),
        )


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    words.add_argument("--variants", nargs="*", default=["mix_order"], choices=VARIANTS, metavar="NAME", help="options")
    words.add_argument("--child", metavar="JSON", help="one row's process, which the others are started by")
    args = words.parse_args()
    if args.child:
        number, *about = json.loads(args.child)
        name, left_out, inductor = about
        try:
            child(number, Variant(name, tuple(left_out), inductor), options(args))
        except Exception as error:
            sys.exit(reason(error))
        sys.exit()
    sys.exit(run("techniques", lambda *given: techniques(*given, args.stages, args.variants), args))
