"""Time of a call on the CPU and on a GPU, and the most that the machine can do.

A clock is asked for a `Plan` of a call once and for samples from then on. On a GPU the time is that of the device: a
sample puts a sleeping kernel in front, enqueues all its calls behind it, and reads two events, so that nothing of what
the host does between two launches is measured. Calls go round several sets of inputs that together are larger than the
last cache level there.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

# Takes the number of the set of inputs.
Call = Callable[[int], object]

# Cycles per second of the fastest GPU clock; a slower one sleeps longer, which does no harm.
_SLEEP_CLOCK = 2.1e9
# A launch takes the host some 4 µs; at 1,024 waiting launches the driver makes the host wait.
_LAUNCH_SECONDS, _WAITING_LAUNCHES = 4e-6, 800


@dataclass(frozen=True)
class Plan:
    """How a sample is taken: calls in a row, cycles of sleep in front (GPU), and the seconds a sample may take."""

    calls: int
    cycles: int
    seconds: float


class HostClock:
    """Wall clock, for calls that end when they return. A sample takes a millisecond at least."""

    def plan(self, call: Call) -> Plan:
        call(0)
        start = time.perf_counter()
        call(0)
        once = time.perf_counter() - start
        calls = min(100, max(1, math.ceil(1e-3 / max(once, 1e-9))))
        return Plan(calls, 0, calls * once)

    def sample(self, call: Call, plan: Plan) -> float:
        """Seconds per call."""
        start = time.perf_counter()
        for i in range(plan.calls):
            call(i)
        return (time.perf_counter() - start) / plan.calls


class DeviceClock:
    """Events on the current CUDA stream, behind a queue of work."""

    def plan(self, call: Call) -> Plan:
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(3):
            call(i)
        enqueued = (time.perf_counter() - start) / 3
        torch.cuda.synchronize()
        whole = (time.perf_counter() - start) / 3
        return device_plan(enqueued, whole)

    def sample(self, call: Call, plan: Plan) -> float:
        """Seconds per call."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(plan.cycles)
        start.record()
        for i in range(plan.calls):
            call(i)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / plan.calls


def device_plan(enqueued: float, whole: float) -> Plan:
    """A plan from the seconds the host takes to enqueue a call, and from enqueueing to the end on the device.

    About 5 ms of calls, 50 at most and no more than fit the queue; the sleep lasts half as long again as enqueueing
    them takes.
    """
    room = round(_WAITING_LAUNCHES * _LAUNCH_SECONDS / max(enqueued, 1e-9))
    calls = max(1, min(50, room, math.ceil(5e-3 / max(whole, 1e-9))))
    asleep = 1.5 * calls * enqueued + 50e-6
    return Plan(calls, int(asleep * _SLEEP_CLOCK), asleep + calls * whole)


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    return DeviceClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Spread:
    """Seconds per call: the median of all samples, and between what the middle six of ten lie (p20, p80)."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    low, high = (quantiles(samples, n=5, method="inclusive")[i] for i in (0, 3)) if len(samples) > 1 else samples * 2
    return Spread(median(samples), low, high)


def samples(
    clock: HostClock | DeviceClock, calls: Mapping[str, Call], *, seconds: float, least: int = 3, most: int = 30
) -> dict[str, list[float]]:
    """Samples of the seconds per call of each of `calls`.

    They take turns, starting with another one in each round, so that a change of clock or load meets all of them. Each
    is sampled until it has used up `seconds`, `least` times at least and `most` times at most.
    """
    plans = {name: clock.plan(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    left = {name: min(most, max(least, int(seconds / max(plan.seconds, 1e-9)))) for name, plan in plans.items()}
    names = list(calls)
    while names:
        for name in names:
            times[name].append(clock.sample(calls[name], plans[name]))
        names = [name for name in (*names[1:], names[0]) if len(times[name]) < left[name]]
    return times


def interleaved(
    clock: HostClock | DeviceClock, calls: Mapping[str, Call], *, seconds: float, least: int = 3, most: int = 30
) -> dict[str, float]:
    """Median seconds per call of each of `calls`, from `samples` of all in turns."""
    taken = samples(clock, calls, seconds=seconds, least=least, most=most)
    return {name: median(values) for name, values in taken.items()}


# Of captures that failed: PyTorch's allocator goes on asking their graphs, so they may not be freed.
_failed: list[torch.cuda.CUDAGraph] = []
_WARM_UP = 3


def captured(call: Call, sets: int) -> tuple[Call | None, str]:
    """A replay of the calls with all `sets` of inputs as one CUDA graph, and an empty text; None and the reason where
    the call cannot be captured.

    Warms up on the stream of the capture, as libraries make a workspace for each stream and thread. The rules of a
    capture hold for this thread alone: backward passes have one of their own, in which libraries may still allocate.
    """
    gc.collect()  # graphs of earlier calls in a cycle of references would keep their leaves' nodes, see `evaluate`
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for i in range(_WARM_UP):
                call(i % sets)
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            for i in range(sets):
                call(i)
    except Exception as error:
        _failed.append(graph)
        return None, _first_reason(error)
    finally:
        torch.cuda.set_stream(before)  # a capture that failed leaves its own
        before.wait_stream(side)
    return lambda i: graph.replay(), ""


def _first_reason(error: BaseException) -> str:
    """What went wrong first, in one line: the end of a capture only says that something did."""
    if "during capture" in str(error) and error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def graph_seconds(call: Call, sets: int) -> tuple[float | None, str]:
    """Seconds per call in a replayed CUDA graph, and an empty text; None and the reason where there is none."""
    replay, why = captured(call, sets)
    if replay is None:
        return None, why
    return interleaved(DeviceClock(), {"graph": replay}, seconds=0.05)["graph"] / sets, ""


# ---- what the machine can do


@dataclass(frozen=True)
class Work:
    """The least a call has to do: bytes (each input read and each result written once), floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy (read and written), operations per second of a large product by dtype."""

    bytes: float
    flops: Mapping[str, float]

    def floor(self, work: Work, dtype: str) -> tuple[float, str]:
        """The least seconds that `work` takes, and which side sets them: `bytes` or `flops`."""
        moving = work.bytes / self.bytes
        # mixed precision multiplies in bfloat16, labels are not multiplied at all
        products = {"bf16 autocast": "bfloat16"}.get(dtype, dtype)
        computing = work.flops / self.flops[products] if work.flops else 0.0
        return (computing, "flops") if computing > moving else (moving, "bytes")


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """A copy of 1 GiB on a GPU, 256 MiB on a CPU; square products, 8192 wide in bfloat16 on a GPU."""
    gpu = device.type == "cuda"
    clock = clock_of(device)
    source = torch.empty((2**30 if gpu else 2**28) >> (8 if tiny else 0), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda i: target.copy_(source)}
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        width = 128 if tiny else 1024 if not gpu else 8192 if dtype == torch.bfloat16 else 4096
        left = torch.randn(width, width, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        calls[name] = lambda i, left=left: left @ left
        flops[name] = 2 * width**3
    seconds = interleaved(clock, calls, seconds=0.5, least=2 if tiny else 5)
    return Ceilings(2 * source.numel() / seconds["copy"], {name: flops[name] / seconds[name] for name in flops})
