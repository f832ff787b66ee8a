"""A whole training step recorded once as a CUDA graph and replayed: one launch instead of a thousand.

A recording holds the addresses of its tensors and the values of its Python numbers. So all that changes from step to
step comes in as tensors, which are copied to where the recording reads them; the step updates weights and moments in
place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spot_fast.config import OPTIONS
from spot_fast.errors import UserError
from spot_fast.training.compiled import signature

# Steps made before one is recorded: they compile kernels, make Adam's moments, and let libraries allocate.
WARMUP = 3


def resolve_cuda_graph(choice: str, device: torch.device, processes: int) -> str:
    """`auto` → yes on an NVIDIA GPU in a run of one process, else no; UserError for a yes on another device.

    Several processes record only on request: their exchanges of gradients (NCCL) are then part of the recording, which
    has not been tried on several GPUs yet.
    """
    if choice not in OPTIONS["cuda_graph"].choices:
        raise ValueError(f"--cuda-graph {choice} is unknown: use one of {', '.join(OPTIONS['cuda_graph'].choices)}")
    able = device.type == "cuda" and torch.version.cuda is not None
    if choice == "yes" and not able:
        raise UserError(f"--cuda-graph yes needs an NVIDIA GPU, not {device}: use auto or no")
    return "yes" if able and (choice == "yes" or choice == "auto" and processes == 1) else "no"


class Recorder:
    """Records on a stream of its own, on which it also warms up.

    Each stream has its own memory in the caching allocator, so a second one would hold another set of activations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the stream of recordings, in line with the present one."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            results = function()
        now.wait_stream(self._stream)
        return results

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records the GPU work of `function` without running it: (replay, results, which replays overwrite)."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are recorded: other threads copy batches to the GPU meanwhile.
        capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            results = function()
        return graph.replay, results


class Graphed:
    """`function`, recorded at the fourth call of each `signature` and replayed from then on.

    Arguments and results are pytrees of tensors and plain values. If recording fails, UserError is raised or, if
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
