"""A run's speed against its device's peak: FLOPs of a step, MFU, memory; a profile on request."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spot_fast.files import atomic_write
from spot_fast.precision import float32_products
from spot_kernels import use_backend

TRACE, TABLE = "profile.json", "profile.txt"
_WARMUP = 5  # steps before those that are profiled
_ROWS = 40

# TFLOP/s of dense matrix products, (bf16 with float32 sums, float32 without TF32), from the makers' data sheets at
# full power. The longest name that the device's own name contains counts.
_PEAKS: dict[str, tuple[float, float]] = {
    "A100": (312, 19.5),
    "A10": (125, 31.2),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "H100": (989.4, 66.9),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H200": (989.4, 66.9),
    "H200 NVL": (835, 60),
    "B200": (2250, 75),
    "L4": (121, 30.3),
    "L40S": (362, 91.6),
    "RTX 3090": (71, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "MI300X": (1307.4, 163.4),
}


def peak_by_name(name: str, precision: str) -> float | None:
    """FLOP/s of the device that PyTorch calls `name` in a precision; None for one that is not in the table."""
    known = [part for part in _PEAKS if re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", name)]
    if not known:
        return None
    bf16, float32 = _PEAKS[max(known, key=len)]
    # All these cards multiply TF32 at half the rate of bfloat16.
    return 1e12 * {"bf16": bf16, "tf32": bf16 / 2, "float32": float32}[precision]


def measured_peak(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of `device` in square matrix products of that precision: the best of what fits into `seconds`."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Not random: the run's generators must not advance.
    one, other = (torch.linspace(-1, 1, side * side, device=device).view(side, side).to(dtype) for _ in "ab")
    best, end = float("inf"), time.monotonic() + seconds
    with float32_products(precision):
        while time.monotonic() < end or best == float("inf"):
            _wait(device)
            start = time.perf_counter()
            one @ other
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> int:
    """FLOPs of the matrix products in `loss` and its gradient; gradients are computed and discarded.

    Counted on plain PyTorch whatever the run uses, and causal attention counts in full.
    """
    with use_backend("torch"), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        torch.autograd.grad(loss(), list(parameters), allow_unused=True)
    return counter.flops


class _Counter(TorchDispatchMode):
    """PyTorch's FlopCounterMode without its hooks on modules, which fail where a module is called without gradients."""

    flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += formula(*arguments, **(options or {}), out_val=result)
        return result


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the peak that tensors took, on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


class Pace:
    """Images per second since the last reading."""

    def __init__(self, batch_size: int, step: int) -> None:
        self.batch_size = batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._clock = step, time.monotonic()

    def read(self, step: int) -> float:
        pace = (step - self._step) * self.batch_size / max(time.monotonic() - self._clock, 1e-9)
        self.restart(step)
        return pace


class Throughput:
    """Milliseconds a step, peak memory in bytes, and MFU as a fraction.

    MFU needs `peak`, the device's FLOP/s, and `flops`, those of a step in this process; 0 or None are unknown.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.flops = device, 0
        self.peak = peak_by_name(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None

    def read(self, images_per_s: float, batch_size: int) -> dict[str, float]:
        seconds = batch_size / images_per_s
        numbers = {"step_ms": 1e3 * seconds, "peak_memory": peak_memory(self.device)}
        if self.peak and self.flops:
            numbers["mfu"] = self.flops / seconds / self.peak
        return numbers


class Profile:
    """PyTorch's profiler over `steps` steps after the first few; 0: no profile.

    Writes profile.json, a trace for chrome://tracing or Perfetto, and profile.txt, a table of operations by time, into
    `folder`, and prints their paths with `say`. Call `step` after every step and `close` at the end.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._profiler = folder, say, None
        self._by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            when = schedule(wait=_WARMUP - 2, warmup=2, active=steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=when, on_trace_ready=self._write, acc_events=True)
            self._profiler.start()
            self._left = _WARMUP + steps

    def step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()
            self._left -= 1
            if not self._left:
                self._profiler.stop()
                self._profiler = None

    def _write(self, profiler: profile) -> None:
        table = profiler.key_averages().table(sort_by=self._by, row_limit=_ROWS, max_name_column_width=60)
        atomic_write(self._folder / TABLE, lambda partial: partial.write_text(table + "\n", encoding="utf-8"))
        atomic_write(self._folder / TRACE, lambda partial: profiler.export_chrome_trace(str(partial)))
        self._say(f"profile: the table is {self._folder / TABLE}, the trace {self._folder / TRACE}")

    def close(self) -> None:
        """Writes a profile that the run's end cuts short."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
