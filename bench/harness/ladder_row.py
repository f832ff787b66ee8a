"""One row of the ladder as a process of its own, and its parent's end of the line.

The process gets its `Job` and `Technique` as JSON arguments, answers with a line of JSON for the check of its first
step, then for every `step` it is sent, and at `end` with its peak memory. Without a technique it is the reference in
float64: it keeps what it computed in the job's folder, says what plain PyTorch's errors are, and ends.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
_MARK = "ladder "
_EXACT = "exact.safetensors"


@dataclass(frozen=True)
class Technique:
    """A row: its name, whether it is the reference, precision, cached features, further settings of the trainer.

    without: techniques of `spot_kernels.dispatch.TECHNIQUES` that its process does without, from the trainer's making
    on. adds: the one of them that the row is about.
    """

    name: str
    reference: bool = False
    precision: str = "float32"
    cached: bool = False
    changes: dict = field(default_factory=dict)
    without: tuple[str, ...] = ()
    adds: str = ""


@dataclass(frozen=True)
class Job:
    """What all rows of a stage have in common; teacher: its run folder or nothing; folder: where results are kept."""

    stage: int
    batch_size: int
    device: str
    tiny: bool
    teacher: str
    folder: str


class RowEnded(Exception):
    """The process ended while its row was timed: its last words."""


class Process:
    """The parent's end; a context manager."""

    def __init__(self, job: Job, technique: Technique | None) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        arguments = [json.dumps(asdict(job)), json.dumps(technique and asdict(technique))]
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        self._process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def read(self) -> dict:
        """The next answer, or `error` where the process ended; whatever else a library prints is passed over."""
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with exit code {self._process.returncode}"}

    def _ask(self, word: str) -> float:
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.read()
        if "error" in answer:
            raise RowEnded(answer["error"])
        return answer["value"]

    def step(self) -> float:
        """Seconds of one step; RowEnded where there will be none."""
        return self._ask("step")

    def end(self) -> float:
        """Peak memory in MiB; the process ends."""
        value = self._ask("end")
        self.close()
        return value

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            try:
                pipe.close()
            except BrokenPipeError:
                pass


# ---- the process


def _answer(**values) -> None:
    print(_MARK + json.dumps(values), flush=True)


def _exact(job: Job) -> None:
    """The reference in float64; the errors of plain float32 and of plain bfloat16 autocast."""
    from harness import step_flops
    from harness.step_runs import Outcome, ReferenceSteps

    device, config, teacher = _setting(job, None)
    found = {}
    for name, options in (("float32", {}), ("bf16", {"autocast": True}), ("exact", {"dtype": torch.float64})):
        steps = ReferenceSteps(config, device, teacher, **options)
        found[name] = steps.first()
        flops = {
            str(cached): step_flops.step(steps.trainer.model, steps.trainer.teacher, cached=cached)
            for cached in (False, True)
        }
        del steps  # before the next one needs its memory
    plain = {name: outcome.errors(found["exact"]) for name, outcome in found.items() if name != "exact"}
    exact: Outcome = found["exact"]
    # Gradients are kept in float32: its rounding is far below any error they are compared for.
    save_file(
        {"gradients": exact.gradients.float().cpu(), "loss": torch.tensor(exact.loss, dtype=torch.float64)},
        Path(job.folder) / _EXACT,
    )
    _answer(plain=plain, flops=flops)


def _row(job: Job, technique: Technique) -> None:
    from harness.step_runs import Outcome, ReferenceSteps, TrainerSteps

    device, config, teacher = _setting(job, technique)
    if technique.reference:
        steps = ReferenceSteps(config, device, teacher)
    else:
        steps = TrainerSteps(config, device, teacher, cached=technique.cached)
    kept = load_file(Path(job.folder) / _EXACT)
    loss_error, gradient_error = steps.first().errors(Outcome(kept["loss"].item(), kept["gradients"].to(device)))
    del kept
    gc.collect()
    _reset_peak(device)
    _answer(loss_error=loss_error, gradient_error=gradient_error)
    for line in sys.stdin:
        if line.strip() == "end":
            _answer(value=_peak(device) / 2**20)
            return
        begin = time.perf_counter()
        steps.next()
        if device.type == "cuda":
            torch.cuda.synchronize()
        _answer(value=time.perf_counter() - begin)


def _setting(job: Job, technique: Technique | None):
    from harness.step_runs import settings

    changes = technique.changes if technique else {}
    precision = technique.precision if technique else "float32"
    config = settings(job.stage, precision=precision, batch_size=job.batch_size, tiny=job.tiny, **changes)
    return torch.device(job.device), config, Path(job.teacher) if job.teacher else None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # the peak is then that since the start


def _peak(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]
    given, wanted = map(json.loads, sys.argv[1:])
    if wanted is None:
        _exact(Job(**given))
    else:
        from spot_kernels import dispatch

        with dispatch.without(*wanted["without"]):
            _row(Job(**given), Technique(**wanted))
