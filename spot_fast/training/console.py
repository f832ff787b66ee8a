"""What a run shows while it trains: means of its losses, a progress bar, lines, TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spot_fast.errors import one_line


class Meter:
    """Sums of the numbers that a step returns, over the current interval and the current epoch.

    names: of the numbers, in the order of the first step's. The sums stay on the device: nothing waits for a step
    until `read` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start(())

    def _start(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.interval, self.epoch = (torch.zeros(len(names), dtype=torch.float64, device=self.device) for _ in "ie")

    def add(self, values: dict[str, Tensor], bad: Tensor) -> None:
        """Scalars of one step by name; where bad [] is 1 they are left out."""
        if not self.names:
            self._start(tuple(values))
        # masked_fill, because NaN times zero would still be NaN.
        counted = torch.stack([values[name] for name in self.names]).detach().double().masked_fill(bad > 0, 0.0)
        self.interval += counted
        self.epoch += counted

    def read(self, sums: Tensor, steps: int) -> dict[str, float]:
        """Means over `steps` of `interval` or `epoch`, whose sums begin again; NaN without a step."""
        means = dict(zip(self.names, (sums / steps).tolist(), strict=True))
        sums.zero_()
        return means

    def restore(self, names: Sequence[str], interval: Tensor, epoch: Tensor) -> None:
        """Continues saved sums."""
        self._start(names)
        self.interval.copy_(interval)
        self.epoch.copy_(epoch)


class Events:
    """TensorBoard's event files in `folder`. A failure is reported once, and the run goes on without events."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        self._say, self._writer = say, None
        with self._without_on_failure():
            from torch.utils.tensorboard import SummaryWriter

            # A killed run may have logged steps that this one logs again: TensorBoard hides the older events.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        with self._without_on_failure():
            for name, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        with self._without_on_failure():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _without_on_failure(self) -> Iterator[None]:
        # Any exception: another protobuf fails at the import, a full disk in the thread that writes.
        try:
            yield
        except Exception as error:
            self._writer = None
            self._say(
                f"note: TensorBoard's events are not written from here on ({one_line(error)}); metrics.jsonl has all "
                "numbers, --no-tensorboard leaves events out"
            )


class Display:
    """Bar on a terminal, lines everywhere; TensorBoard scalars in `folder`/tensorboard. A quiet one shows nothing."""

    def __init__(
        self, folder: Path, *, title: str, step: int, total_steps: int, tensorboard: bool, quiet: bool = False
    ) -> None:
        self.step, self.total_steps, self._quiet = step, total_steps, quiet
        tensorboard = tensorboard and not quiet
        self._bar = tqdm(
            total=total_steps, initial=step, desc=title, unit="step", disable=quiet or None, dynamic_ncols=True
        )
        self._first, self._start = step, 0.0
        self._events = Events(folder / "tensorboard", step, self.line) if tensorboard else None

    def advance(self) -> None:
        """One step more. The clock starts after the first, which compiles and allocates."""
        self.step += 1
        if self.step == self._first + 1:
            self._start = time.monotonic()
        self._bar.update()

    def numbers(self, group: str, values: dict[str, float]) -> None:
        """Scalars of the current step for TensorBoard; a training loss also for the bar."""
        if self._events is not None:
            self._events.add(group, values, self.step)
        if "images_per_s" in values:
            text = f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s"
            self._bar.set_postfix_str(text, refresh=False)

    def line(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def time_left(self) -> str:
        """Estimate of the remaining time, such as 12 min; empty before the second step."""
        done = self.step - self._first - 1
        if done < 1:
            return ""
        return duration((time.monotonic() - self._start) / done * (self.total_steps - self.step))

    def close(self) -> None:
        self._bar.close()
        if self._events is not None:
            self._events.close()


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def epoch_line(
    epoch: int,
    epochs: int,
    step: int,
    total_steps: int,
    values: dict[str, float],
    scores: dict[str, float],
    time_left: str,
) -> str:
    """One line about an epoch, with the scores of a validation at its end."""
    losses = f"loss {values['loss']:.4f}"
    terms = [f"{name.removeprefix('loss_')} {value:.4f}" for name, value in values.items() if name.startswith("loss_")]
    if terms:
        losses += f" ({', '.join(terms)})"
    parts = [
        f"epoch {epoch}/{epochs}",
        f"step {step}/{total_steps}",
        losses,
        f"lr {values['lr']:.2e}",
        f"{values['images_per_s']:.0f} images/s",
        f"{values['step_ms']:.3g} ms",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    parts.append(f"{values['peak_memory'] / 1e9:.1f} GB")
    if scores:
        parts.append(scores_text(scores))
    if step < total_steps and time_left:
        parts.append(f"{time_left} left")
    return "  ".join(parts)


def scores_text(scores: dict[str, float]) -> str:
    """Such as: val loss 0.5123, mBO_i 41.3 (decoder) 43.0 (slots)."""
    text = f"val loss {scores['val_loss']:.4f}"
    if "mbo_i_decoder" in scores:
        text += f", mBO_i {100 * scores['mbo_i_decoder']:.1f} (decoder) {100 * scores['mbo_i_slots']:.1f} (slots)"
    return text
