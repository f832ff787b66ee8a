"""Learning rate and lambda of every step (SPOT, section 4; the rounding is the authors' implementation's).

Both are pure functions of the step, so a resumed run needs nothing but the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spot_fast.config import Config
from spot_fast.errors import UserError


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `peak`, then a cosine to `low`.

    Steps count from 0. Both parts contain the peak, so it occurs twice; `low` lies one step beyond the last.
    """

    peak: float
    low: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of step 0 ≤ step < total_steps."""
        if step < self.warmup_steps:
            if self.warmup_steps == 1:
                return 0.0
            # The peak itself, which the product below may miss by rounding.
            return self.peak if step == self.warmup_steps - 1 else step * (self.peak / (self.warmup_steps - 1))
        return cosine(self.peak, self.low, step - self.warmup_steps, self.total_steps - self.warmup_steps)


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at step `steps`."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def learning_rate(config: Config, images: int) -> LearningRate:
    """The schedule of a run over `images` training images; UserError when the warm-up is longer than the run.

    The warm-up has whole epochs: int(warmup_steps / (images / batch)), with images / batch not rounded, while an epoch
    has floor(images / batch) steps.
    """
    steps_per_epoch = images // config.batch_size
    epochs = config.warmup_epochs(images)
    if epochs > config.epochs:
        raise UserError(
            f"--warmup-steps {config.warmup_steps} is {epochs} epochs but --epochs is {config.epochs}: use "
            f"--warmup-steps {config.epochs * steps_per_epoch // 10} or more epochs"
        )
    return LearningRate(config.lr, config.lr_low, epochs * steps_per_epoch, config.epochs * steps_per_epoch)


def attention_weight(config: Config, step: int, total_steps: int) -> float:
    """Lambda of a step: constant, or a cosine from `att_weight` to `att_weight_final`."""
    if config.att_weight_final is None:
        return config.att_weight
    return cosine(config.att_weight, config.att_weight_final, step, total_steps)
