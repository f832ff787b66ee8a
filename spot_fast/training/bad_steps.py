"""Bad steps: a loss or gradient that is not finite, or a spike of the loss. Detected without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spot_fast.errors import UserError

MOST_IN_A_ROW = 10
# A loss is compared with the mean of about the last _WINDOW losses, once there have been _FEWEST.
_WINDOW, _FEWEST = 100, 20


class BadStep(NamedTuple):
    """A step, counted from 1, its loss, and the mean loss of the steps before it."""

    step: int
    loss: float
    mean: float

    def __str__(self) -> str:
        """Such as: step 14 (loss 12.3, before it 0.41 on average)."""
        before = f", before it {self.mean:.3g} on average" if self.mean else ""
        return f"step {self.step} (loss {self.loss:.3g}{before})"


class BadSteps:
    """The bad steps of a run; the host knows them after `read`, which waits for the device.

    spike: a loss above so many times the mean of the losses before it is bad; 0: any finite loss is good.
    steps: the bad ones, oldest first. mean: float32 [2] on the device, the mean loss and the steps it is made of.
    """

    def __init__(self, device: torch.device, spike: float) -> None:
        self.spike, self.mean = spike, torch.zeros(2, dtype=torch.float32, device=device)
        self.steps: list[BadStep] = []
        self._reported = 0
        self._unread: list[tuple[int, Tensor]] = []

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Verdict on a step's loss and gradient norm, scalars: 1 if it is bad, the loss, the mean before it.

        float32 [3] on the device. A good loss goes into the mean.
        """
        loss, norm = loss.detach().float(), norm.detach().float()
        mean, count = self.mean.unbind()
        bad = ~(loss.isfinite() & norm.isfinite())
        if self.spike > 0:
            bad = bad | ((loss > self.spike * mean) & (count >= _FEWEST))
        verdict = torch.stack([bad.float(), loss, mean])
        # A running mean: plain up to _WINDOW steps, then exponential with weight 1 / _WINDOW.
        better = torch.stack([mean + (loss - mean) / (count + 1).clamp(max=_WINDOW), count + 1])
        # In place, because a recorded step reads this very memory again.
        self.mean.copy_(torch.where(bad, self.mean, better))
        return verdict

    def note(self, step: int, verdict: Tensor) -> None:
        """Keeps the verdict on `step`, unread; the tensor may not change afterwards."""
        self._unread.append((step, verdict))

    def read(self) -> int | None:
        """Brings `steps` up to date. Returns the step that was the tenth bad one in a row, None if none was."""
        last = None
        if self._unread:
            numbers, verdicts = zip(*self._unread, strict=True)
            self._unread.clear()
            for step, (bad, loss, mean) in zip(numbers, torch.stack(verdicts).tolist(), strict=True):
                if bad:
                    self.steps.append(BadStep(step, loss, mean))
                    recent = [each.step for each in self.steps[-MOST_IN_A_ROW:]]
                    if recent == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
                        last = last or step
        return last

    def count(self, after: int) -> int:
        """How many bad steps, of those read, come after step `after`."""
        return sum(each.step > after for each in self.steps)

    def restore(self, steps: list[list[float]], mean: Tensor, reported: int) -> None:
        """Continues from saved `steps` and `mean`; bad steps up to step `reported` are not reported again."""
        self.steps = [BadStep(*each) for each in steps]
        self._reported = sum(each.step <= reported for each in self.steps)
        self.mean.copy_(mean)
        self._unread.clear()

    def unreported(self) -> list[BadStep]:
        """The bad steps read since the last call."""
        new, self._reported = self.steps[self._reported :], len(self.steps)
        return new


def skipped_line(new: list[BadStep], total: int, images: str) -> str:
    """Such as: update left out: step 14 (loss nan, before it 0.41 on average); its images: … (3 so far)."""
    whose = "its images" if len(new) == 1 else "the first one's images"
    return f"update left out: {', '.join(map(str, new))}; {whose}: {images} ({total} so far)"


def too_many(step: int, kept: str) -> UserError:
    return UserError(
        f"the loss or its gradient was not finite, or the loss spiked, in {MOST_IN_A_ROW} steps in a row, "
        f"the last of them step {step}: {kept}"
    )
