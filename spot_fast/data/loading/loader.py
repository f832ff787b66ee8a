"""Batches of training images in an order that depends on nothing but the seed and the epoch.

Order, mirroring and crop are pure functions of (seed, epoch, index of the image). So a run that resumes at any step
sees the images it would have seen, whatever the number of workers.

Up to `MAX_THREADS` workers are threads: Pillow decodes without the interpreter lock, and threads need no start-up, no
pickling and no second copy of the file list. But an eighth of an image's time is spent under the lock, which limits
threads to some 2,100 images/s and makes the training thread wait: of JPEGs of 640 x 480 1, 4, 8, 16 and 32 threads
give 238, 928, 1,703, 2,018 and 2,147 images/s, where 16 cores could decode 4,013 (computed from measurements on two
cores). So more workers are processes (`processes`).
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from spot_fast.data.base import ImageSet
from spot_fast.data.batch import Batch
from spot_fast.data.decoding.opening import memory_of
from spot_fast.data.loading.processes import Processes
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.errors import CorruptImage, UserError
from spot_fast.random_streams import Stream, generator

MAX_CORRUPT = 0.01  # of the set; a single corrupt image is always tolerated
MAX_THREADS = 4  # more workers are processes
_AHEAD = 2  # batches decoded beyond the one in use
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Loaded:
    """The image `wanted`, or its replacement `index` if that is corrupt, as a worker made it.

    item is None if no replacement could be read either; corrupt {label: reason} are the images that failed.
    """

    wanted: int
    index: int
    item: Any
    corrupt: dict[str, str]


class Loader:
    """Batches of `image_set`'s training images; an incomplete last batch is dropped.

    Each of several processes gets its shard, `rank` of `world`, of the same batches: together they see what one would.

    A corrupt image is replaced by another one, drawn deterministically, and is counted in `corrupt` {label: reason}.
    If they are more than 1 % of the set, UserError names the first of them.

    kind: what decodes, as --loader calls it; decoder: with all else that decides about pixels, for cache keys.
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
        self._unused = generator(Stream.CROP, seed)
        self._idle: list[Any] = []  # what decodes images and is kept from epoch to epoch

    @property
    def decoder(self) -> str:
        return self.kind

    @property
    def steps_per_epoch(self) -> int:
        return len(self.image_set) // self.batch_size

    @property
    def shard(self) -> slice:
        """This process's rows of a batch."""
        share = self.batch_size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    @property
    def _tolerated(self) -> float:
        return max(1.0, MAX_CORRUPT * len(self.image_set))

    def order(self, epoch: int) -> torch.Tensor:
        """int64 [n]: the images in this epoch's order; the last n mod batch_size are not used."""
        return torch.from_numpy(generator(Stream.IMAGE_ORDER, self.seed, epoch).permutation(len(self.image_set)))

    def flips(self, epoch: int) -> torch.Tensor:
        """bool [n]: which images are mirrored in this epoch, by index."""
        count = len(self.image_set)
        if not self.image_set.flip:
            return torch.zeros(count, dtype=torch.bool)
        return torch.from_numpy(generator(Stream.FLIP, self.seed, epoch).random(count) < 0.5)

    def steps(self, epoch: int, start_step: int = 0) -> list[torch.Tensor]:
        """This process's shard of each step from `start_step` on: image indices int64 [batch_size / world]."""
        whole = self.order(epoch).split(self.batch_size)[start_step : self.steps_per_epoch]
        return [indices[self.shard] for indices in whole]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on."""
        return self._batches(epoch, self.steps(epoch, start_step), self.flips(epoch))

    def batches_of(self, steps: list[torch.Tensor]) -> Iterator[Batch]:
        """Batches of the images with the given indices, int64 [B] each, not mirrored and not part of any epoch.

        A corrupt image is replaced: `Batch.indices` then differs from `steps`.
        """
        return self._batches(0, steps, torch.zeros(len(self.image_set), dtype=torch.bool))

    def stand_ins(self, epoch: int, indices: torch.Tensor, corrupt: Container[int]) -> torch.Tensor:
        """`indices` int64 [B] with those in `corrupt` replaced as `load` replaces them in that epoch."""
        kept = (
            next(index for index in self._candidates(epoch, wanted) if index not in corrupt)
            for wanted in indices.tolist()
        )
        return torch.tensor(list(kept), dtype=torch.int64)

    def _candidates(self, epoch: int, wanted: int) -> Iterator[int]:
        """`wanted` and its replacements, always the same in an epoch."""
        yield wanted
        rng = generator(Stream.REPLACEMENT, self.seed, epoch, wanted)
        while True:
            yield int(rng.integers(len(self.image_set)))

    def note_corrupt(self, corrupt: dict[str, str]) -> None:
        """Counts {label: reason} as corrupt; UserError if they become too many."""
        self.corrupt |= corrupt
        if len(self.corrupt) > self._tolerated:
            raise self._too_many()

    def fetch(self, index: int, rng: np.random.Generator) -> Any:
        """Reads one image in a worker; CorruptImage if that fails."""
        return self.image_set.train_image(index, rng)

    def load(self, epoch: int, wanted: int) -> Loaded:
        """Loads the image `wanted`, or its replacement."""
        corrupt: dict[str, str] = {}
        for index in islice(self._candidates(epoch, wanted), _ATTEMPTS):
            try:
                with memory_of(self.image_set.label(index)):
                    return Loaded(wanted, index, self.fetch(index, self._crop_rng(epoch, index)), corrupt)
            except CorruptImage as error:
                corrupt[self.image_set.label(index)] = str(error)
            if len(corrupt) > self._tolerated:
                break
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
        if self._idle:
            processes = self._idle.pop()
        else:
            alone = copy.copy(self)  # pickled for the workers, without what belongs to this process
            alone.workers, alone.corrupt, alone._idle = 0, {}, []
            processes = Processes(alone.load_all, self.workers)
        with closing(processes.run(epoch, steps)) as results:
            for stacked, loaded in results:
                self._counted(loaded)
                yield stacked
        self._idle.append(processes)

    def load_all(self, epoch: int, wanted: list[int]) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Loaded]]:
        """Makes a batch in a worker process: (images, indices), and each `Loaded` without its image."""
        loaded = [self.load(epoch, index) for index in wanted]
        complete = all(each.item is not None for each in loaded)
        stacked = _stack(loaded) if complete else (torch.empty(0), torch.empty(0))
        return stacked, [replace(each, item=None if each.item is None else True) for each in loaded]

    def _ahead(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[list[Loaded]]:
        """The loaded images of each step, read ahead by threads if there are workers."""
        # More than _AHEAD of small batches, so that no thread waits for the consumer.
        depth = max(_AHEAD * (self.batch_size // self.world), 2 * self.workers)
        indices = (index for step in steps for index in step.tolist())
        load = partial(self.load, epoch)
        with closing(read_ahead(load, indices, depth=depth, workers=self.workers, name="loader")) as ahead:
            for step in steps:
                yield self._counted([future.result() for future in islice(ahead, len(step))])

    def _counted(self, loaded: list[Loaded]) -> list[Loaded]:
        """`loaded`, its corrupt images counted; UserError if there are too many, or no replacement is readable."""
        for each in loaded:
            self.note_corrupt(each.corrupt)
            if each.item is None:
                raise self._too_many()
        return loaded

    def _crop_rng(self, epoch: int, index: int) -> np.random.Generator:
        # Making a generator takes the interpreter lock: share one that nothing draws from.
        return generator(Stream.CROP, self.seed, epoch, index) if self.image_set.random_crop else self._unused

    def _too_many(self) -> UserError:
        first = "; ".join(list(self.corrupt.values())[:3])
        return UserError(
            f"{len(self.corrupt)} of {len(self.image_set)} images of {self.image_set.name} are corrupt or "
            f"missing, more than {MAX_CORRUPT:.0%}: {first}"
        )


def _stack(loaded: list[Loaded]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([each.item for each in loaded]), torch.tensor([each.index for each in loaded])
