"""Steps whose loss or gradient is not finite, left out without waiting for the device: `--on-nonfinite skip`."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError

MOST_IN_A_ROW = 10


class Skipped:
    """Which steps of a run were left out, counted from 1; known on the host after `read`, which waits for the device.

    `steps` is all that has to be saved with a run.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._told = 0
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, *values: Tensor) -> Tensor:
        """float32 [] on the device: 1 where one of the scalars `values` of `step` is not finite, else 0."""
        bad = (~torch.stack(values).detach().isfinite().all()).float()
        self._unread.append((step, bad))
        return bad

    def read(self) -> int | None:
        """Brings `steps` up to date; gives the step that was the tenth to be left out in a row, None if none was."""
        last = None
        if self._unread:
            numbers, flags = zip(*self._unread, strict=True)
            self._unread.clear()
            for step, bad in zip(numbers, torch.stack(flags).tolist(), strict=True):
                if bad:
                    self.steps.append(step)
                    if self.steps[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
                        last = last or step
        return last

    def count(self, after: int) -> int:
        """How many of the steps read lie after step `after`."""
        return sum(step > after for step in self.steps)

    def restore(self, steps: list[int], told: int) -> None:
        """As saved; steps up to `told` have been told of."""
        self.steps, self._told = list(steps), sum(step <= told for step in steps)
        self._unread.clear()

    def news(self) -> list[int]:
        """The steps read since this was last asked."""
        news, self._told = self.steps[self._told :], len(self.steps)
        return news


def skipped_line(news: list[int], total: int) -> str:
    """Such as: not finite, update left out: step 14, 17 (3 so far)."""
    return f"not finite, update left out: step {', '.join(map(str, news))} ({total} so far)"


def too_many(step: int, kept: str) -> UserError:
    return UserError(f"the loss or its gradient was not finite in {MOST_IN_A_ROW} steps in a row, the last of them "
                     f"step {step}: {kept}")  # fmt: skip
