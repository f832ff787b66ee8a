"""The online teacher of stage 2: the exponential moving average of its own student's weights (`--teacher ema`).

SPOT's authors name it as future work: no second run, one more copy of the weights, and a teacher that improves while
its student does, as in Mean Teacher, BYOL and DINO.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from spot_fast.model.spot import Spot
from spot_fast.training.flat import FlatAdam
from spot_fast.training.optimiser import Adam


def frozen_copy(model: Spot) -> Spot:
    """A copy of all that trains, in eval mode and without gradients, around the same frozen encoder."""
    # deepcopy takes what its memo maps an object to.
    return copy.deepcopy(model, {id(model.encoder): model.encoder}).eval().requires_grad_(False)


class MovingAverage:
    """Keeps the weights of `teacher`, a `frozen_copy` of `student`, at the average of the student's, in float32.

    Where the optimiser has the student's weights in one buffer, so have the teacher's theirs, and a step is one
    operation.
    """

    def __init__(self, teacher: Spot, student: Spot, optimiser: Adam | FlatAdam) -> None:
        students = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        own = dict(teacher.named_parameters())
        if isinstance(optimiser, FlatAdam):
            buffer = torch.zeros_like(optimiser.weights)
            for name, weight in students.items():
                view = optimiser.view(buffer, weight)
                view.copy_(own[name].data)
                own[name].data = view
            self._pairs = [(buffer, optimiser.weights)]
        else:
            self._pairs = [(own[name].data, weight.data) for name, weight in students.items()]
        self.weights: dict[str, Tensor] = {name: own[name].data for name in students}

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """weights ← momentum · weights + (1 − momentum) · student's; waits for nothing on the device."""
        for average, weights in self._pairs:
            average.lerp_(weights, 1 - momentum)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Sets the averages, by name."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
