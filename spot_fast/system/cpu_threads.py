"""One CPU thread for each core that other programs leave free.

PyTorch's threads synchronise some thousand times in a step, by spinning. Where another program takes one of their
cores, the spinning threads keep the other cores busy while the thread that they wait for is not scheduled: on two cores
a step took over twice what one thread needs (bench/README.md, Studies). So commands measure now and then how much of
their cores others use, and compute with fewer threads while that lasts. The number of threads decides in which order
numbers are added, hence the last bits of a result: --threads N never changes it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_EVERY = 0.5  # seconds between measurements; the system counts in hundredths
# Of a core: others take it if they use more, and have left it if they use less.
_TAKEN, _FREE = 0.25, 0.1
_CALM = 3  # measurements in a row with a free core before it is used again
_MOST_APART = 4
T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


class CpuThreads:
    """Keeps PyTorch's threads, `most` of them, off cores that other programs use.

    say: gets one sentence, the first time that there are fewer threads. busy_seconds: CPU seconds that all programs
    have used on the `cores` cores so far, None where the system does not report them.
    """

    def __init__(
        self,
        most: int,
        say: Callable[[str], None],
        *,
        cores: int | None = None,
        busy_seconds: Callable[[], float | None] | None = None,
        own_seconds: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.threads, self._say, self._said = most, most, say, False
        self._cores = cores or available_cores()
        self._busy, self._own, self._clock = busy_seconds or _busy_seconds, own_seconds, clock
        self._calm, self._last = 0, self._measure()
        torch.set_num_threads(most)

    def adapt(self) -> None:
        """Between two steps: measures if it is time to, and changes the number of threads if it should be another."""
        if self._clock() - self._last[0] < _EVERY:
            return
        now, busy, own = self._measure()
        (then, busy_then, own_then), self._last = self._last, (now, busy, own)
        if busy is None or busy_then is None:
            return
        others = (busy - busy_then - (own - own_then)) / (now - then)
        at_most, at_least = (
            max(1, min(self.most, self._cores - math.ceil(max(0.0, others - share)))) for share in (_TAKEN, _FREE)
        )
        self._calm = self._calm + 1 if at_least > self.threads else 0
        if at_most < self.threads:
            self._use(at_most)
            if not self._said:
                self._said = True
                self._say(
                    f"note: other programs use {others:.1f} of {self._cores} cores: {at_most} of {self.most} "
                    f"threads compute while they do (--threads {self.most}: always as many)"
                )
        elif self._calm >= _CALM:
            self._use(at_least)

    def _use(self, threads: int) -> None:
        self.threads, self._calm = threads, 0
        torch.set_num_threads(threads)

    def _measure(self) -> tuple[float, float | None, float]:
        return self._clock(), self._busy(), self._own()


@contextmanager
def computing(threads: int | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Inside, PyTorch computes with so many threads; None: with one a core at most, and fewer on a CPU that others use.

    What it yields is to be called between batches.
    """
    before = torch.get_num_threads()
    try:
        if threads is not None or device.type != "cpu":
            torch.set_num_threads(threads or before)
            yield lambda: None
        else:
            yield CpuThreads(min(before, available_cores()), lambda line: print(line, file=sys.stderr)).adapt
    finally:
        torch.set_num_threads(before)


def threads_apart(device: torch.device) -> int:
    """How many calls `side_by_side` runs at once: one for each of PyTorch's threads on a CPU, but at most 4, since
    Python runs one line at a time; one on a GPU."""
    return min(torch.get_num_threads(), _MOST_APART) if device.type == "cpu" else 1


def side_by_side(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """`function` of each of `items`, in their order; on a CPU several at once, each with its share of the threads.

    For work on small tensors that falls into independent parts: threads that share each product wait for each other
    thousands of times a second. Fewer run at once while PyTorch has fewer threads. Grad mode and autocast are a
    thread's own, so `function` sets them. An exception comes in its turn; then what has not begun is cancelled.
    """
    at_once, threads = threads_apart(device), torch.get_num_threads()
    if at_once == 1:
        yield from map(function, items)
        return

    def apart(item: T) -> R:
        torch.set_num_threads(max(1, threads // at_once))  # of this thread
        return function(item)

    pool, ahead = ThreadPoolExecutor(at_once, "side-by-side"), deque[Future[R]]()
    try:
        for item in items:
            while len(ahead) >= threads_apart(device):
                yield ahead.popleft().result()
            ahead.append(pool.submit(apart, item))
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # MKL's number is one for the whole process


def _busy_seconds() -> float | None:
    """On the cores of this process's affinity, since the machine was started; time that a hypervisor took counts."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        times = [list(map(int, words[1:9])) for words in lines if words[0] in cores]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # not Linux, or no permission
        return None
    if not any(map(any, times)):
        return None
    return sum(sum(fields) - fields[3] - fields[4] for fields in times) / ticks  # all but idle and waiting for a disk


def _quota() -> float:
    """Cores' worth of time that a container may use; infinite without a limit."""
    for path, period_path in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (_CGROUPS / path).read_text().split()
            if period_path:
                words += (_CGROUPS / period_path).read_text().split()
            quota, period = map(float, words)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return math.inf
