"""A whole training step recorded once as a CUDA graph and replayed: one launch instead of a thousand.

A recording has the addresses of its tensors and the values of its Python numbers in it. So everything that changes from
step to step comes in as a tensor, whose contents are copied to where the recording reads them; weights, moments and
whatever else the step updates in place stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spot_fast.errors import UserError
from spot_fast.training.compiled import signature

CUDA_GRAPH = ("auto", "yes", "no")
# Steps made before one is recorded: they compile kernels, make Adam's moments, and let libraries allocate.
WARMUP = 3


def resolve_cuda_graph(choice: str, device: torch.device, processes: int) -> str:
    """`auto` → yes on an NVIDIA GPU in a run of one process, else no; UserError for a yes where it cannot be.

    Several processes record only where it is asked for: their exchanges of gradients (NCCL) are then part of the
    recording, which has not been tried on several GPUs yet.
    """
    if choice not in CUDA_GRAPH:
        raise ValueError(f"--cuda-graph {choice} is unknown: use one of {', '.join(CUDA_GRAPH)}")
    able = device.type == "cuda" and torch.version.cuda is not None
    if choice == "yes" and not able:
        raise UserError(f"--cuda-graph yes needs an NVIDIA GPU, not {device}: use auto or no")
    return "yes" if able and (choice == "yes" or choice == "auto" and processes == 1) else "no"


class Recorder:
    """Records on a stream of its own, on which it also warms up.

    One stream for all of it: the caching allocator keeps the memory of each stream apart, so every further one would
    hold another set of activations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Runs `function` where recordings are made, in line with the present stream."""
        stream, now = self._side(), torch.cuda.current_stream(self._device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            results = function()
        now.wait_stream(stream)
        return results

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records what `function` does on the GPU, which it does not do yet: (replay, results, which replays
        overwrite)."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count as part of the recording: others copy batches to the GPU meanwhile.
        capture = torch.cuda.graph(graph, stream=self._side(), capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            results = function()
        return graph.replay, results


class Graphed:
    """`function`, for each `signature` of its arguments recorded at the fourth call and replayed from then on.

    Arguments and results are pytrees of tensors and plain values. Where recording fails UserError is raised or, if
    `optional`, everything runs unrecorded and `say` prints why.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        recorder: Recorder,
        *,
        optional: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._function, self._recorder, self._optional, self._say = function, recorder, optional, say
        self._calls: dict[Hashable, int] = {}
        # Of each signature: the arguments' tensors that the recording reads, its replay, the results it overwrites.
        self._recorded: dict[Hashable, tuple[Any, Callable[[], None], Any]] = {}
        self._given_up = False

    @property
    def recorded(self) -> bool:
        """Whether a recording exists, and none has failed."""
        return bool(self._recorded) and not self._given_up

    def __call__(self, *arguments: Any) -> Any:
        if self._given_up:
            return self._function(*arguments)
        key = signature(arguments)
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            # Warm-up steps are real steps of the run. Recording runs nothing, so the first replay is the next step.
            if self._calls[key] <= WARMUP:
                return self._recorder.warm_up(lambda: self._function(*arguments))
            own = pytree.tree_map_only(Tensor, Tensor.clone, arguments)
            try:
                self._recorded[key] = own, *self._recorder.record(lambda: self._function(*own))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                if not self._optional:
                    raise UserError(
                        f"the step cannot be recorded as a CUDA graph ({reason}): use --cuda-graph no"
                    ) from error
                self._given_up = True
                self._say(f"the step cannot be recorded as a CUDA graph ({reason}): it is launched piece by piece")
                return self._function(*arguments)
            if len(self._recorded) == 1:
                self._say("the step was recorded as a CUDA graph")
        own, replay, results = self._recorded[key]
        for ours, given in zip(pytree.tree_leaves(own), pytree.tree_leaves(arguments), strict=True):
            if isinstance(ours, Tensor):
                ours.copy_(given, non_blocking=True)
        replay()
        # The next replay overwrites its results.
        return pytree.tree_map_only(Tensor, Tensor.clone, results)
