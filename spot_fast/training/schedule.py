"""Learning rate and lambda as functions of the step (SPOT, section 4; rounded as in the authors' implementation)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spot_fast.config import Config
from spot_fast.errors import UserError


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `peak`, then a cosine to `low`. Steps count from 0.

    Both parts contain the peak, so it occurs twice; `low` is one step beyond the last.
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
            # The product may miss the peak by rounding.
            return self.peak if step == self.warmup_steps - 1 else step * (self.peak / (self.warmup_steps - 1))
        return cosine(self.peak, self.low, step - self.warmup_steps, self.total_steps - self.warmup_steps)


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at step `steps`."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def learning_rate(config: Config, images: int) -> LearningRate:
    """The schedule of a run over `images` training images; UserError if the warm-up is longer than the run.

    An epoch has floor(images / batch) steps, while `Config.warmup_epochs` does not round images / batch.
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
    """Lambda of a step: 0 before `att_warmup_steps`; then constant, or a cosine from `att_weight` to its end."""
    if step < config.att_warmup_steps:
        return 0.0
    if config.att_weight_final is None:
        return config.att_weight
    return cosine(config.att_weight, config.att_weight_final, step, total_steps)


def teacher_momentum(config: Config, step: int, total_steps: int) -> float:
    """Share of an online teacher's weights that remains in a step: a cosine from `ema_momentum` to 1, as in BYOL."""
    return cosine(config.ema_momentum, 1.0, step, total_steps)
