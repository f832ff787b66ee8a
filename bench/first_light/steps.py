"""A training step with cached features: eager, compiled, and the compiled step as a CUDA graph.

    python bench/first_light/steps.py --stage 1 [--rehearse]
    python bench/first_light/steps.py --stage 1 --warm        compiles what the other call needs, keeps it on disk, ends

ViT-B/16, COCO's settings, batch 64. Before a variant is timed its gradients are compared: with plain PyTorch in
float32, from which they may be three times as far as plain PyTorch in bfloat16 is. Then three steps must not wait for
the device (`set_sync_debug_mode("error")`), and after timing SAME steps of the graph must end where as many plain ones
do. Eager steps come last, if there is time for them. The profile of the fastest before them is kept beside the CSV;
what its kernels are for, and the longest of them, are printed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import time as clocks
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from record import ABSENT, GO, NO_GO, Options, Recorder, Row, Time, best_of, parser, reason, run

import torch  # isort: skip
from harness.kernel_clock import spread
from harness.kernel_kinds import Share, by_kind, our_kernels
from harness.step_runs import TrainerSteps, settings, write_teacher
from torch import Tensor

from imitated_graph import ImitatedRecorder
from spot_fast.data.batch import Batch
from spot_fast.training.compiled import Compiled
from spot_fast.training.cuda_graph import Graphed
from spot_fast.training.cuda_graph import Recorder as GraphRecorder
from spot_fast.training.losses import loss_weights
from spot_fast.training.step import Update
from spot_fast.training.trainer import Trainer
from spot_kernels import use_backend

BATCH, SAME = 64, 20
AIMS = {1: 6.0, 2: 12.0}  # ms a step, of issue and README
EAGER, COMPILED, GRAPH = "eager", "compiled", "compiled, CUDA graph"
ROOM = 3.0  # how many times as far from float32 as plain bfloat16 a variant's gradients may be
_FIRST_STEP = 100  # where the learning rate is not small
_EAGER_SECONDS = 12.0  # eager steps are timed where so much is left
_LONGEST = 25  # kernels of a profile that are printed


@dataclass
class Stage:
    """The trainer of a stage, its batches, and its steps in variants."""

    steps: TrainerSteps
    options: Options

    @property
    def trainer(self) -> Trainer:
        return self.steps.trainer

    def be(self, variant: str) -> None:
        """Makes the next steps those of `variant`; weights, moments and recordings stay."""
        plain = variant == EAGER or variant == GRAPH and not self.options.gpu  # compiled code cannot be imitated
        self.update.losses = self.trainer.forward.losses if plain else self.compiled
        self.trainer.update = self.graphed if variant == GRAPH else self.update

    @functools.cached_property
    def update(self) -> Update:
        """The trainer's own update, which runs eagerly: `settings` has neither compilation nor graph."""
        return self.trainer.update

    @functools.cached_property
    def compiled(self) -> Compiled:
        backend = "inductor" if self.options.gpu else "eager"
        return Compiled(
            self.trainer.forward.losses, self.trainer.optimiser.leaves, backend=backend, say=lambda text: None
        )

    @functools.cached_property
    def graphed(self) -> Graphed:
        recorder = GraphRecorder(self.options.device) if self.options.gpu else ImitatedRecorder(self.state)
        return Graphed(self.update, recorder, say=lambda text: None)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.next()

    def wait(self) -> None:
        if self.options.gpu:
            torch.cuda.synchronize()

    def state(self) -> list[Tensor]:
        """Everything that a step changes in place."""
        trainer = self.trainer
        return [trainer.bad_steps.mean, *trainer.optimiser.tensors()]

    def restore(self, kept: list[Tensor]) -> None:
        for value, before in zip(self.state(), kept, strict=True):
            value.copy_(before)
        self.trainer.step = _FIRST_STEP
        self.steps.restart()

    def after(self, steps: int, kept: list[Tensor]) -> Tensor:
        """The weights after so many steps from a state that was kept."""
        self.restore(kept)
        self.run(steps)
        return torch.cat([p.detach().flatten() for p in self.trainer.parameters])


@contextlib.contextmanager
def stage_of(number: int, options: Options) -> Iterator[Stage]:
    batch = 4 if options.rehearse else BATCH
    # a rehearsal must not depend on whether the processor multiplies bfloat16
    precision = "bf16" if options.gpu else "float32"
    smaller = dict(dec_blocks=1, slot_iterations=2) if options.rehearse else {}
    config = settings(number, precision=precision, batch_size=batch, tiny=options.rehearse, **smaller)
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config) if number == 2 else None
        steps = TrainerSteps(config, options.device, teacher, cached=True)
    trainer = steps.trainer
    trainer.optimiser.rate_on_device()
    trainer.step = _FIRST_STEP
    yield Stage(steps, options)


# ---- right or wrong


def gradients(stage: Stage, function: Callable, batch: Batch) -> Tensor:
    """Of a batch, all in one vector, float32."""
    trainer = stage.trainer
    weights = loss_weights(trainer.config, _FIRST_STEP, trainer.total_steps, trainer.device)
    # The reference in float32 takes the weights as they are, not as a step's products do.
    rounded = trainer.forward.precision == trainer.precision
    with trainer.optimiser.in_use() if rounded else contextlib.nullcontext(trainer.parameters) as leaves:
        loss = function(batch, trainer.draw(_FIRST_STEP), weights)["loss"]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(found, trainer.parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs])


class Checks:
    """Relative errors of a stage's gradients from plain PyTorch in float32, with the teacher's labels given."""

    def __init__(self, stage: Stage) -> None:
        self.stage, trainer = stage, stage.trainer
        self.batch = next(stage.steps.batches)
        self.weights = [p.detach().clone() for p in trainer.parameters]
        forward = trainer.forward
        teach = forward.teach
        if trainer.teacher is not None:  # a label that falls on another side is no error of the gradients
            with forward.autocast():
                labels = teach(*forward.targets(self.batch), trainer.draw(_FIRST_STEP))
            forward.teach = lambda target, hidden, draws: labels
        try:
            with use_backend("torch"):
                forward.precision = "float32"
                self.exact = gradients(stage, forward.losses, self.batch)
                forward.precision = trainer.precision
                self.plain = self.error(gradients(stage, forward.losses, self.batch))
            self.found = {EAGER: self.error(gradients(stage, forward.losses, self.batch))}
        finally:
            forward.teach = teach

    def of_compiled(self) -> None:
        """Finds the error of the compiled pass, at the weights of the others."""
        with torch.no_grad():
            for parameter, before in zip(self.stage.trainer.parameters, self.weights, strict=True):
                parameter.copy_(before)
        # Beside the mean loss of trained weights, every step from these would be a spike, whose update is left out.
        self.stage.trainer.bad_steps.mean.zero_()
        self.found[COMPILED] = self.error(gradients(self.stage, self.stage.compiled, self.batch))

    def error(self, found: Tensor) -> float:
        return ((found - self.exact).norm() / self.exact.norm()).item()

    @property
    def allowed(self) -> float:
        return max(ROOM * self.plain, 1e-3)


def same_steps(stage: Stage, recorder: Recorder, subject: str, kept: list[Tensor]) -> None:
    """As many graphed steps as plain ones from the same state end in the same weights."""
    steps = 4 if stage.options.rehearse else SAME
    stage.be(COMPILED if stage.options.gpu else EAGER)
    before = stage.after(0, kept)
    plain, again = stage.after(steps, kept), stage.after(steps, kept)
    stage.be(GRAPH)
    graphed = stage.after(steps, kept)
    moved = (plain - before).norm()
    apart, repeat = ((other - plain).norm() / moved for other in (graphed, again))
    allowed = max(ROOM * repeat.item(), 1e-3)
    right = apart.item() <= allowed and moved.item() > 0
    bits = "the same bits" if torch.equal(graphed, plain) else f"plain steps repeat to {repeat.item():.1e}"
    recorder.add(
        subject,
        GRAPH,
        figure=f"{steps} steps are {steps} plain ones",
        error=apart.item(),
        allowed=allowed,
        verdict=GO if right else NO_GO,
        note=bits,
    )


# ---- time


def without_waiting(stage: Stage, recorder: Recorder, subject: str, variant: str) -> None:
    if not stage.options.gpu:
        recorder.add(subject, variant, figure="no host wait", verdict=ABSENT, note="there is no GPU to wait for")
        return
    try:
        torch.cuda.set_sync_debug_mode("error")
        stage.run(3)
        verdict, note = GO, ""
    except RuntimeError as error:
        verdict, note = NO_GO, reason(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.add(subject, variant, figure="no host wait in 3 steps", verdict=verdict, note=note)


def sample(stage: Stage, steps: int) -> float:
    """Milliseconds a step, of `steps` in a row."""
    if not stage.options.gpu:
        begin = clocks.perf_counter()
        stage.run(steps)
        return 1e3 * (clocks.perf_counter() - begin) / steps
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    stage.run(steps)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / steps


def timed(stage: Stage, recorder: Recorder, subject: str, variant: str, checks: Checks, time: Time) -> Row:
    begin = clocks.monotonic()
    stage.be(variant)
    stage.run(6)  # compiles, warms up, records
    stage.wait()
    recorder.add(subject, variant, figure="s until the seventh step", value=clocks.monotonic() - begin)
    if variant == COMPILED:
        checks.of_compiled()
    without_waiting(stage, recorder, subject, variant)
    if stage.options.gpu:
        torch.cuda.reset_peak_memory_stats()
    steps, most = (2, 2) if stage.options.rehearse else (10, 12) if variant == GRAPH else (5, 4)
    taken = [sample(stage, steps)]
    while len(taken) < most and (len(taken) < 4 or time.left > 20):
        taken.append(sample(stage, steps))
    found = spread(taken[1:])
    error = checks.found.get(variant, checks.found.get(COMPILED))
    memory = torch.cuda.max_memory_allocated() / 1e9 if stage.options.gpu else 0.0
    batch = stage.trainer.config.batch_size
    note = f"{1e3 * batch / found.median:,.0f} images/s" + (f", {memory:.2f} GB" if memory else "")
    if variant == GRAPH:
        note += ", recorded" if stage.trainer.update.recorded else ", NOT recorded"
    return recorder.add(
        subject,
        variant,
        figure="ms a step",
        value=found.median,
        low=found.low,
        high=found.high,
        error=error,
        allowed=checks.allowed,
        verdict=GO if error <= checks.allowed else NO_GO,
        note=note,
    )


def profile(stage: Stage, recorder: Recorder, subject: str) -> None:
    """What the kernels of the variant that is set are for, and how many operations of the device a step has."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    gpu, steps = stage.options.gpu, 1 if stage.options.rehearse else 5
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        stage.run(steps)
        stage.wait()
    kernels: dict[str, Share] = {}
    for event in found.events():
        if gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        us = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        kernels[event.name] = kernels.get(event.name, Share(0.0, 0.0)) + Share(us / steps, 1 / steps)
    report(recorder, subject, kernels)


def report(recorder: Recorder, subject: str, kernels: dict[str, Share]) -> None:
    """Rows of the kinds, the longest kernels in print, and all of them in the profile beside the CSV."""
    for kind, share in by_kind(kernels, our_kernels()).items():
        recorder.add(subject, kind, figure="µs a step", value=share.us, note=f"{share.launches:.1f} launches")
    lines = [
        f"{share.us:9.1f} µs {share.launches:6.1f} launches  {name}"
        for name, share in sorted(kernels.items(), key=lambda item: -item[1].us)
    ]
    path = recorder.path.with_name(recorder.path.stem.replace("_steps_", "_profile_") + ".txt")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join([f"{subject}, of a step:", *lines, ""]))
    print("\n".join(line[:130] for line in lines[:_LONGEST]), flush=True)
    whole = sum(kernels.values(), Share(0.0, 0.0))
    recorder.add(subject, figure="operations of the device a step", value=whole.launches, note=f"{whole.us:,.0f} µs")


def steps(recorder: Recorder, options: Options, time: Time, number: int) -> None:
    subject = f"stage {number}"
    with stage_of(number, options) as stage:
        checks = Checks(stage)
        recorder.add(
            subject,
            EAGER,
            figure="gradients, bfloat16 beside float32 PyTorch",
            error=checks.found[EAGER],
            allowed=checks.allowed,
            verdict=GO if checks.found[EAGER] <= checks.allowed else NO_GO,
            note=f"plain PyTorch {checks.plain:.1e}",
        )
        rows = [row for variant in (COMPILED, GRAPH) if (row := tried(stage, recorder, subject, variant, checks, time))]
        best = best_of(rows)
        if best is not None:
            stage.be(best.variant)
            try:
                profile(stage, recorder, subject)
            except Exception as error:
                recorder.add(subject, figure="profile", verdict=ABSENT, note=reason(error))
        if any(row.variant == GRAPH for row in rows):
            same_steps(stage, recorder, subject, [value.clone() for value in stage.state()])
        if time.left < _EAGER_SECONDS:
            recorder.add(subject, EAGER, verdict=ABSENT, note="no time is left to measure it")
        else:
            rows += filter(None, [tried(stage, recorder, subject, EAGER, checks, time)])
        best = best_of(rows)
        if best is not None:
            aim = AIMS[number]
            over = best.value - aim
            met = f"met by {-over:.2f} ms" if over <= 0 else f"missed by {over:.2f} ms ({100 * over / aim:.0f} %)"
            recorder.add(subject, "aim", figure="ms a step", value=aim, note=f"{met}: {best.variant}")


def tried(stage: Stage, recorder: Recorder, subject: str, variant: str, checks: Checks, time: Time) -> Row | None:
    """As `timed`; None, and a row that says why, where the variant cannot run."""
    try:
        return timed(stage, recorder, subject, variant, checks, time)
    except Exception as error:
        recorder.add(subject, variant, verdict=NO_GO, note=reason(error))
        torch._dynamo.reset()
        return None


def warm(number: int, options: Options) -> None:
    """Compiles forward and backward; torch keeps both on disk."""
    with stage_of(number, options) as stage:
        stage.be(COMPILED)
        stage.run(1)
        stage.wait()


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--stage", type=int, choices=(1, 2), required=True)
    words.add_argument("--warm", action="store_true", help="only compile")
    args = words.parse_args()
    if args.warm:
        warm(args.stage, Options(torch.cuda.is_available(), args.rehearse, args.out, args.seconds))
        sys.exit()
    sys.exit(run("steps", lambda *given: steps(*given, args.stage), args))
