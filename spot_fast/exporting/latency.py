"""How fast one graph is in PyTorch, under torch.compile and in ONNX Runtime: side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from spot_fast.errors import UserError, one_line
from spot_fast.exporting.formats import Runner
from spot_fast.exporting.graph import SegmentationGraph

_ROUNDS = 7
_CALLS = 3  # timed in a round, after one that is not: threads of the one before may still be spinning


@dataclass(frozen=True)
class Latency:
    """ms: median milliseconds of one image; images_per_s: of a larger batch, by its median time."""

    ms: float
    images_per_s: float


def in_pytorch(graph: SegmentationGraph) -> dict[str, Runner]:
    """The graph eager and compiled."""
    return {"PyTorch": torch.no_grad()(graph), "torch.compile": _Compiled(graph)}


class _Compiled:
    """The graph under torch.compile, for each size of batch on its own; UserError where that cannot be."""

    def __init__(self, graph: SegmentationGraph) -> None:
        self._graph = torch.compile(graph, dynamic=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        try:
            return self._graph(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"--latency: torch.compile failed ({one_line(error)}): install a C++ compiler") from error


def measure(runners: Mapping[str, Runner], images: Tensor) -> dict[str, Latency]:
    """Times every runner on the first of `images` and on all: a few calls of each in turn, several rounds."""
    seconds = {(name, count): [] for name in runners for count in (1, len(images))}
    for _ in range(_ROUNDS):
        for name, count in seconds:
            batch, run = images[:count], runners[name]
            run(batch)
            for _ in range(_CALLS if count == 1 else 1):
                start = time.perf_counter()
                run(batch)
                seconds[name, count].append(time.perf_counter() - start)
    return {
        name: Latency(1e3 * median(seconds[name, 1]), len(images) / median(seconds[name, len(images)]))
        for name in runners
    }
