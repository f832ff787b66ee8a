"""Batches of training pictures in an order that depends on nothing but the seed and the epoch.

Order, mirroring and crop are pure functions of (seed, epoch, index of the picture). So a run that resumes at any step
sees the pictures it would have seen, whatever the number of workers.

Workers are threads: Pillow releases the interpreter lock while it decodes and resizes (two threads on two cores are
twice as fast), and threads need no shared memory, no pickling and no second copy of the file list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CorruptImage, UserError
from .base import ImageSet

# Streams of random numbers: the first word after the seed.
_ORDER, _FLIP, _CROP, _REPLACE = range(4)
MAX_CORRUPT = 0.01  # of the set; a single corrupt picture is always tolerated
_AHEAD = 2  # batches decoded beyond the one in use
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, S, S]; indices int64 [B], the pictures in it; flipped bool [B], which are mirrored."""

    images: torch.Tensor
    indices: torch.Tensor
    flipped: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)


class Loader:
    """Batches of `image_set`'s training pictures; an incomplete last batch is dropped.

    Of several processes each gets its share, `rank` of `world`, of the same batches: together they see what one would.

    A corrupt picture is replaced by another one, drawn deterministically, and is counted in `corrupt`
    {label: reason}; more than 1 % of the set corrupt is a UserError that names the first of them.
    """

    def __init__(self, image_set: ImageSet, batch_size: int, seed: int = 0, workers: int = 0, *, rank: int = 0,
                 world: int = 1) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: use 1 or more")
        if workers < 0:
            raise UserError(f"--workers {workers}: use 0 or more")
        if seed < 0:
            raise UserError(f"--seed {seed}: use 0 or more")
        if len(image_set) < batch_size:
            raise UserError(f"{image_set.name} has {len(image_set)} training images, fewer than --batch-size "
                            f"{batch_size}: use a smaller batch or more images")
        if batch_size % world:
            raise UserError(f"--batch-size {batch_size} cannot be divided among {world} processes: use a multiple")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}: expected 0 to {world - 1}, one below world")
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.rank, self.world = rank, world
        self.corrupt: dict[str, str] = {}

    @property
    def steps_per_epoch(self) -> int:
        return len(self.image_set) // self.batch_size

    @property
    def _tolerated(self) -> float:
        return max(1.0, MAX_CORRUPT * len(self.image_set))

    def order(self, epoch: int) -> torch.Tensor:
        """int64 [n]: the pictures in the sequence of this epoch; the last n mod batch_size are not used."""
        return torch.from_numpy(self._rng(_ORDER, epoch).permutation(len(self.image_set)))

    def flips(self, epoch: int) -> torch.Tensor:
        """bool [n]: which pictures, by index, are mirrored in this epoch."""
        count = len(self.image_set)
        if not self.image_set.flip:
            return torch.zeros(count, dtype=torch.bool)
        return torch.from_numpy(self._rng(_FLIP, epoch).random(count) < 0.5)

    def steps(self, epoch: int, start_step: int = 0) -> list[torch.Tensor]:
        """This process's share of the pictures of each step from `start_step` on: int64 [batch_size / world]."""
        share = self.batch_size // self.world
        whole = self.order(epoch).split(self.batch_size)[start_step : self.steps_per_epoch]
        return [indices[self.rank * share : (self.rank + 1) * share] for indices in whole]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on."""
        return self._batches(epoch, self.steps(epoch, start_step), self.flips(epoch))

    def pictures(self, steps: list[torch.Tensor]) -> Iterator[Batch]:
        """Batches of pictures asked for by index, int64 [B] each, not mirrored and not part of any epoch.

        In the place of a corrupt one stands another; `Batch.indices` then differs from what was asked for.
        """
        return self._batches(0, steps, torch.zeros(len(self.image_set), dtype=torch.bool))

    def stand_ins(self, epoch: int, indices: torch.Tensor, corrupt: Container[int]) -> torch.Tensor:
        """`indices` int64 [B] with those in `corrupt` replaced as a batch of that epoch would."""
        found = indices.tolist()
        for place, wanted in enumerate(found):
            replace = None
            while found[place] in corrupt:
                replace = replace or self._rng(_REPLACE, epoch, wanted)
                found[place] = int(replace.integers(len(self.image_set)))
        return torch.tensor(found, dtype=torch.int64)

    def note_corrupt(self, corrupt: dict[str, str]) -> None:
        """Counts {label: reason} as corrupt; UserError where they become too many."""
        self.corrupt |= corrupt
        if len(self.corrupt) > self._tolerated:
            raise self._too_many(self.corrupt)

    def _batches(self, epoch: int, steps: list[torch.Tensor], flips: torch.Tensor) -> Iterator[Batch]:
        in_memory = getattr(self.image_set, "images", None)
        if in_memory is not None:
            corrupt = getattr(self.image_set, "corrupt", {})
            steps = [self.stand_ins(epoch, indices, corrupt) for indices in steps] if corrupt else steps
            batches = ((in_memory[indices], indices) for indices in steps)
        elif self.workers:
            batches = self._threaded(epoch, steps)
        else:
            batches = (self._collect(self._load(epoch, int(index)) for index in indices) for indices in steps)
        for images, indices in batches:
            flipped = flips[indices]
            if self.image_set.flip:
                images = torch.where(flipped[:, None, None, None].to(images.device), images.flip(-1), images)
            yield Batch(images, indices, flipped)

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _load(self, epoch: int, index: int) -> tuple[torch.Tensor, int, dict[str, str]]:
        """(picture, its index, what was found corrupt on the way): the picture asked for, or the one in its place."""
        bad: dict[str, str] = {}
        wanted, replace = index, None
        for _ in range(_ATTEMPTS):
            try:
                image = self.image_set.train_image(index, self._rng(_CROP, epoch, index))
                return image, index, bad
            except CorruptImage as error:
                bad[self.image_set.label(index)] = str(error)
            if len(bad) > self._tolerated:
                break
            replace = replace or self._rng(_REPLACE, epoch, wanted)
            index = int(replace.integers(len(self.image_set)))
        raise self._too_many(bad)

    def _collect(self, loaded: Iterator[tuple[torch.Tensor, int, dict[str, str]]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, indices = [], []
        for image, index, bad in loaded:
            images.append(image)
            indices.append(index)
            self.note_corrupt(bad)
        return torch.stack(images), torch.tensor(indices)

    def _threaded(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        ahead: deque[list[Future]] = deque()
        try:
            waiting = iter(steps)
            while True:
                while len(ahead) <= _AHEAD and (indices := next(waiting, None)) is not None:
                    ahead.append([pool.submit(self._load, epoch, index) for index in indices.tolist()])
                if not ahead:
                    return
                yield self._collect(future.result() for future in ahead.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _too_many(self, corrupt: dict[str, str]) -> UserError:
        first = "; ".join(list(corrupt.values())[:3])
        return UserError(f"{len(corrupt)} of {len(self.image_set)} images of {self.image_set.name} are corrupt or "
                         f"missing, more than {MAX_CORRUPT:.0%}: {first}")
