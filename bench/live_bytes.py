"""How many bytes tensors hold at most while something runs, counted on any device.

Every operator's results are followed until they are freed. What a kernel allocates for itself inside an operator is not
seen, nor what an allocator rounds up or keeps.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that lived at once, `held` (there before, still there) included."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._follow(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_flatten(results)[0]:
            if isinstance(result, torch.Tensor):
                self._follow(result)
        return results

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        size = storage.nbytes()

        def freed(_) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def of_step(steps) -> int:
    """Peak bytes of the next step of `steps` (`step_runs.TrainerSteps`), after one that has made Adam's moments.

    Weights, moments and all else that a GPU would hold are in it; cached features are not.
    """
    steps.next()
    trainer = steps.trainer
    modules = [trainer.model, *([trainer.teacher] if trainer.teacher is not None else [])]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held += [p.grad for p in trainer.parameters if p.grad is not None]
    held += [tensor for state in trainer.optimiser.state.values() for tensor in state.values()]
    with LiveBytes(held) as counter:
        steps.next()
    return counter.peak
