"""A CUDA graph imitated on the CPU: the operators that ran are run again on the very same tensors.

Like a CUDA graph it knows nothing of Python numbers that have changed since, nor of tensors that were made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from spot_fast.training.cuda_graph import Graphed
from spot_fast.training.trainer import Trainer


class Operators(TorchDispatchMode):
    """Keeps every operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                # A view shows its tensor's new contents, and what was changed in place is changed.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class ImitatedRecorder:
    """Stands in for `cuda_graph.Recorder`. state: returns all that the function changes in place, when recording."""

    def __init__(self, state: Callable[[], Iterable[Tensor]]) -> None:
        self._state = state

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Leaves everything as it was: what the recorded run changes in place is restored."""
        operators = Operators()
        kept = [(value, value.clone()) for value in self._state()]
        with operators:
            results = function()
        with torch.no_grad():
            for value, before in kept:
                value.copy_(before)
        return operators.replay, results


def rate_on_device(trainer: Trainer) -> Trainer:
    """`trainer` with the Adam of recorded steps, whose learning rate is a float32 tensor."""
    trainer.optimiser.rate_on_device()
    return trainer


def graphed(trainer: Trainer) -> Trainer:
    """`trainer` with steps that are recorded, as on a GPU."""
    rate_on_device(trainer)

    def state() -> Iterable[Tensor]:
        return [trainer.bad_steps.mean, *trainer.optimiser.tensors()]

    trainer.update = Graphed(trainer.update, ImitatedRecorder(state), say=lambda text: None)
    return trainer
