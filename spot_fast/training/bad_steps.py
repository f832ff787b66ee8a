"""Steps whose loss or gradient is not finite or whose loss leaps: found and left out without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spot_fast.errors import UserError

MOST_IN_A_ROW = 10
# A loss is compared with the mean of about so many steps before it, once there have been _FEWEST.
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
    """Finds the bad steps of a run; they are known on the host after `read`, which waits for the device.

    spike: how many times the mean of the losses before it a loss may be; 0: any finite one.
    What has to be saved with a run: `found`, and `state`, float32 [2] on the device (mean loss; steps it is made of).
    """

    def __init__(self, device: torch.device, spike: float) -> None:
        self.spike, self.state = spike, torch.zeros(2, dtype=torch.float32, device=device)
        self.found: list[BadStep] = []
        self._told = 0
        self._unread: list[tuple[int, Tensor]] = []

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Of a step's loss and gradient norm, scalars: whether it is bad, 1 or 0, the loss, the mean before it.

        float32 [3] on the device. A good loss goes into the mean.
        """
        loss, norm = loss.detach().float(), norm.detach().float()
        mean, count = self.state.unbind()
        bad = ~(loss.isfinite() & norm.isfinite())
        if self.spike > 0:
            bad = bad | ((loss > self.spike * mean) & (count >= _FEWEST))
        verdict = torch.stack([bad.float(), loss, mean])
        better = torch.stack([mean + (loss - mean) / (count + 1).clamp(max=_WINDOW), count + 1])
        self.state.copy_(torch.where(bad, self.state, better))
        return verdict

    def note(self, step: int, verdict: Tensor) -> None:
        """Keeps what `judge` gave for `step`; the tensor may not change afterwards."""
        self._unread.append((step, verdict))

    def read(self) -> int | None:
        """Brings `found` up to date; gives the step that was the tenth to be bad in a row, None if none was."""
        last = None
        if self._unread:
            numbers, verdicts = zip(*self._unread, strict=True)
            self._unread.clear()
            for step, (bad, loss, mean) in zip(numbers, torch.stack(verdicts).tolist(), strict=True):
                if bad:
                    self.found.append(BadStep(step, loss, mean))
                    recent = [each.step for each in self.found[-MOST_IN_A_ROW:]]
                    if recent == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
                        last = last or step
        return last

    def count(self, after: int) -> int:
        """How many of the steps read lie after step `after`."""
        return sum(each.step > after for each in self.found)

    def restore(self, found: list[list[float]], state: Tensor, told: int) -> None:
        """As saved; steps up to `told` have been told of."""
        self.found = [BadStep(*each) for each in found]
        self._told = sum(each.step <= told for each in self.found)
        self.state.copy_(state)
        self._unread.clear()

    def news(self) -> list[BadStep]:
        """The bad steps read since this was last asked."""
        news, self._told = self.found[self._told :], len(self.found)
        return news


def skipped_line(news: list[BadStep], total: int, images: str) -> str:
    """Such as: update left out: step 14 (loss nan, before it 0.41 on average); its images: … (3 so far)."""
    of = "its images" if len(news) == 1 else "the first one's images"
    return f"update left out: {', '.join(map(str, news))}; {of}: {images} ({total} so far)"


def too_many(step: int, kept: str) -> UserError:
    return UserError(
        f"the loss or its gradient was not finite, or the loss leapt, in {MOST_IN_A_ROW} steps in a row, "
        f"the last of them step {step}: {kept}"
    )
