"""A CPU with the functions of a GPU that benches call, and a problem that they can measure on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
import torch
from harness.kernel_bench import Case, Problem, Work, randn
from harness.kernel_rows import EAGER, OURS


class Device:
    """An event, a stream or a graph that replays nothing."""

    def __init__(self, *args, **kwargs) -> None:
        self.start = 0.0

    def record(self) -> None:
        self.start = time.perf_counter()

    def elapsed_time(self, stop: Device) -> float:
        return 1e3 * (stop.start - self.start)

    synchronize = wait_stream = replay = lambda self, *args: None


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, within = lambda *args: None, lambda *args, **kwargs: contextlib.nullcontext()
    functions = dict.fromkeys(("Event", "Stream", "CUDAGraph", "current_stream"), Device)
    quiet = "_sleep", "synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "set_stream"
    functions |= dict.fromkeys(quiet, nothing)
    functions |= dict.fromkeys(("stream", "graph", "device"), within)
    functions |= {
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 10**9,
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 100}),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function, raising=False)


def square_case(ours: Callable, others: dict[str, Callable] | None = None) -> Case:
    """A square of 20 values; `others` maps techniques to functions that build them."""
    techniques = {OURS: lambda: ours, EAGER: lambda: lambda x: x * x} | (others or {})

    def build() -> Problem:
        def inputs(seed: int):
            return randn(seed, (4, 5), device=torch.device("cpu"), dtype=torch.float32)

        return Problem(inputs, techniques, lambda x: x * x)

    return Case("slot_attention_step", "square", "float32", Work(160, 20), Work(240, 40), tuple(techniques), build)
