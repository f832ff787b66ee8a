"""Batches of training images in an order that depends on nothing but the seed and the epoch.

Order, mirroring and crop are pure functions of (seed, epoch, index of the image). So a run that resumes at any step
sees the images it would have seen, whatever the number of workers.

Up to `MAX_THREADS` workers are threads: Pillow releases the interpreter lock while it decodes and resizes, and
threads need no start, no pickling and no second copy of the file list. But an eighth of an image's time is spent
under the lock, so threads end at some 2,100 images/s however many there are, and whoever trains waits for the lock too:
of JPEGs of 640 x 480 1, 4, 8, 16 and 32 threads give 238, 928, 1,703, 2,018 and 2,147 images/s, where 16 cores could
decode 4,013 (counted on two cores). So more workers are processes (`processes`).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from spot_fast.data.base import ImageSet
from spot_fast.data.decoding.transforms import memory_of
from spot_fast.data.loading.processes import Processes
from spot_fast.errors import CorruptImage, UserError

# Streams of random numbers: the first word after the seed.
_ORDER, _FLIP, _CROP, _REPLACE = range(4)
MAX_CORRUPT = 0.01  # of the set; a single corrupt image is always tolerated
MAX_THREADS = 4  # more workers are processes
_AHEAD = 2  # batches decoded beyond the one in use
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Loaded:
    """What a worker made of the image `wanted`, or of the one in its place, `index`.

    item is None where no image could be found; corrupt {label: reason} are those that were tried.
    """

    wanted: int
    index: int
    item: Any
    corrupt: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, S, S]; indices int64 [B], the images in it; flipped bool [B], which are mirrored."""

    images: torch.Tensor
    indices: torch.Tensor
    flipped: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)


class Loader:
    """Batches of `image_set`'s training images; an incomplete last batch is dropped.

    Of several processes each gets its share, `rank` of `world`, of the same batches: together they see what one would.

    A corrupt image is replaced by another one, drawn deterministically, and is counted in `corrupt`
    {label: reason}; more than 1 % of the set corrupt is a UserError that names the first of them.

    kind: what decodes, as --loader calls it; decoder: with everything else that decides about pixels, for keys.
    """

    kind = "torch"

    def __init__(
        self, image_set: ImageSet, batch_size: int, seed: int = 0, workers: int = 0, *, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: use 1 or more")
        if workers < 0:
            raise UserError(f"--workers {workers}: use 0 or more")
        if seed < 0:
            raise UserError(f"--seed {seed}: use 0 or more")
        if len(image_set) < batch_size:
            raise UserError(
                f"{image_set.name} has {len(image_set)} training images, fewer than --batch-size "
                f"{batch_size}: use a smaller batch or more images"
            )
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
        self._unused = self._rng(_CROP)
        self._idle: list[Any] = []  # what decodes images and is kept from epoch to epoch

    @property
    def decoder(self) -> str:
        return self.kind

    @property
    def steps_per_epoch(self) -> int:
        return len(self.image_set) // self.batch_size

    @property
    def mine(self) -> slice:
        """This process's share of a batch."""
        share = self.batch_size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    @property
    def _tolerated(self) -> float:
        return max(1.0, MAX_CORRUPT * len(self.image_set))

    def order(self, epoch: int) -> torch.Tensor:
        """int64 [n]: the images in the sequence of this epoch; the last n mod batch_size are not used."""
        return torch.from_numpy(self._rng(_ORDER, epoch).permutation(len(self.image_set)))

    def flips(self, epoch: int) -> torch.Tensor:
        """bool [n]: which images, by index, are mirrored in this epoch."""
        count = len(self.image_set)
        if not self.image_set.flip:
            return torch.zeros(count, dtype=torch.bool)
        return torch.from_numpy(self._rng(_FLIP, epoch).random(count) < 0.5)

    def steps(self, epoch: int, start_step: int = 0) -> list[torch.Tensor]:
        """This process's share of the images of each step from `start_step` on: int64 [batch_size / world]."""
        whole = self.order(epoch).split(self.batch_size)[start_step : self.steps_per_epoch]
        return [indices[self.mine] for indices in whole]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on."""
        return self._batches(epoch, self.steps(epoch, start_step), self.flips(epoch))

    def batches_of(self, steps: list[torch.Tensor]) -> Iterator[Batch]:
        """Batches of images asked for by index, int64 [B] each, not mirrored and not part of any epoch.

        In the place of a corrupt one stands another; `Batch.indices` then differs from what was asked for.
        """
        return self._batches(0, steps, torch.zeros(len(self.image_set), dtype=torch.bool))

    def stand_ins(self, epoch: int, indices: torch.Tensor, corrupt: Container[int]) -> torch.Tensor:
        """`indices` int64 [B] with those in `corrupt` replaced as a batch of that epoch would."""
        found = indices.tolist()
        for place, wanted in enumerate(found):
            substitutes = None
            while found[place] in corrupt:
                substitutes = substitutes or self._rng(_REPLACE, epoch, wanted)
                found[place] = int(substitutes.integers(len(self.image_set)))
        return torch.tensor(found, dtype=torch.int64)

    def note_corrupt(self, corrupt: dict[str, str]) -> None:
        """Counts {label: reason} as corrupt; UserError where they become too many."""
        self.corrupt |= corrupt
        if len(self.corrupt) > self._tolerated:
            raise self._too_many(self.corrupt)

    def fetch(self, index: int, rng: np.random.Generator) -> Any:
        """What a worker makes of one image; CorruptImage where it cannot be read."""
        return self.image_set.train_image(index, rng)

    def load(self, epoch: int, wanted: int) -> Loaded:
        """The image asked for, or another one in its place, always the same."""
        corrupt: dict[str, str] = {}
        index, substitutes = wanted, None
        for _ in range(_ATTEMPTS):
            try:
                with memory_of(self.image_set.label(index)):
                    return Loaded(wanted, index, self.fetch(index, self._crop_rng(epoch, index)), corrupt)
            except CorruptImage as error:
                corrupt[self.image_set.label(index)] = str(error)
            if len(corrupt) > self._tolerated:
                break
            substitutes = substitutes or self._rng(_REPLACE, epoch, wanted)
            index = int(substitutes.integers(len(self.image_set)))
        return Loaded(wanted, index, None, corrupt)

    def _batches(self, epoch: int, steps: list[torch.Tensor], flips: torch.Tensor) -> Iterator[Batch]:
        with closing(self._stacked(epoch, steps)) as batches:
            for images, indices in batches:
                flipped = flips[indices]
                if self.image_set.flip:
                    images = torch.where(flipped[:, None, None, None].to(images.device), images.flip(-1), images)
                yield Batch(images, indices, flipped)

    def _stacked(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, indices) of each step, not mirrored."""
        in_memory = getattr(self.image_set, "images", None)
        if in_memory is not None:
            corrupt = getattr(self.image_set, "corrupt", {})
            for indices in steps:
                if corrupt:
                    indices = self.stand_ins(epoch, indices, corrupt)
                yield in_memory[indices], indices
        elif self.workers > MAX_THREADS:
            yield from self._by_processes(epoch, steps)
        else:
            with closing(self._ahead(epoch, steps)) as ahead:
                for loaded in ahead:
                    yield _stack(loaded)

    def _by_processes(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        processes = self._idle.pop() if self._idle else self._processes()
        with closing(processes.run(epoch, steps)) as results:
            for stacked, loaded in results:
                self._counted(loaded)
                yield stacked
        self._idle.append(processes)

    def _processes(self) -> Processes:
        alone = copy.copy(self)
        alone.workers, alone.corrupt, alone._idle = 0, {}, []
        return Processes(alone.load_all, self.workers)

    def load_all(self, epoch: int, wanted: list[int]) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Loaded]]:
        """A batch as processes make it: (images, indices), and what `load` says of each, without the images."""
        loaded = [self.load(epoch, index) for index in wanted]
        complete = all(each.item is not None for each in loaded)
        stacked = _stack(loaded) if complete else (torch.empty(0), torch.empty(0))
        return stacked, [replace(each, item=None if each.item is None else True) for each in loaded]

    def _ahead(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[list[Loaded]]:
        """The loaded images of each step, in threads and ahead of time where there are workers."""
        if not self.workers:
            for indices in steps:
                yield self._counted([self.load(epoch, index) for index in indices.tolist()])
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        ahead: deque[list[Future]] = deque()
        # Small batches: enough of them that no thread waits for the one in use.
        depth = max(_AHEAD, 2 * self.workers * self.world // self.batch_size)
        try:
            waiting = iter(steps)
            while True:
                while len(ahead) <= depth and (indices := next(waiting, None)) is not None:
                    ahead.append([pool.submit(self.load, epoch, index) for index in indices.tolist()])
                if not ahead:
                    return
                yield self._counted([future.result() for future in ahead.popleft()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _counted(self, loaded: list[Loaded]) -> list[Loaded]:
        """The same, with its corrupt images counted; UserError where there are too many or none could be read."""
        for each in loaded:
            self.note_corrupt(each.corrupt)
            if each.item is None:
                raise self._too_many(self.corrupt)
        return loaded

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _crop_rng(self, epoch: int, index: int) -> np.random.Generator:
        # A generator is made under the interpreter lock: not where nothing is drawn from it.
        return self._rng(_CROP, epoch, index) if self.image_set.random_crop else self._unused

    def _too_many(self, corrupt: dict[str, str]) -> UserError:
        first = "; ".join(list(corrupt.values())[:3])
        return UserError(
            f"{len(corrupt)} of {len(self.image_set)} images of {self.image_set.name} are corrupt or "
            f"missing, more than {MAX_CORRUPT:.0%}: {first}"
        )


def _stack(loaded: list[Loaded]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([each.item for each in loaded]), torch.tensor([each.index for each in loaded])
