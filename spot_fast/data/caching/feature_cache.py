"""Frozen features of every training image, computed once: in memory, on the device or on disk.

An image has one outcome without augmentation, two with mirroring; row `index * outcomes + mirrored` holds one. A run
that reads the rows gets what it would have computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spot_fast.data.base import ImageSet
from spot_fast.data.batch import Batch
from spot_fast.data.caching.rebuild import (
    full_batches,
    progress_bar,
    readable_again,
    refill,
    require_complete,
    require_unchanged,
)
from spot_fast.data.caching.store import Store, located
from spot_fast.data.loading.loader import Loader
from spot_fast.data.loading.prefetch import to_device
from spot_fast.system.devices import send

# uint8 images [B, 3, S, S] → one tensor [B, …] for each field.
Function = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Field:
    """One result of the function, with its shape for an image; `key` names all that its values depend on besides the
    images (weights, precision)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def outcomes(image_set: ImageSet) -> int:
    """Number of different training squares of an image: 1, or 2 with mirroring; 0 = unlimited (random crops)."""
    return 0 if image_set.random_crop else 1 + image_set.flip


def stores_of(image_set: ImageSet, fields: Sequence[Field], folder: Path) -> list[Store]:
    """The store of each field below `folder`, complete or not."""
    stores = []
    for field in fields:
        words = (image_set.content_key(), outcomes(image_set), field.name, field.shape, field.dtype, field.key)
        key = hashlib.sha256("\n".join(map(str, words)).encode()).hexdigest()
        about = {
            "kind": "features",
            "key": key,
            "data": image_set.name,
            "field": field.name,
            "shape": list(field.shape),
            "dtype": str(field.dtype).removeprefix("torch."),
            "rows_per_image": outcomes(image_set),
        }
        stores.append(located(folder, f"features-{field.name}-{key[:20]}", len(image_set) * outcomes(image_set), about))
    return stores


class FeatureCache:
    """The function's results for every outcome.

    tensors: of each field, [rows, *shape], if held in memory; else rows are read from `stores`.
    corrupt: label and reason of images without rows, by index.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        per_image: int,
        *,
        tensors: Sequence[Tensor] | None = None,
        stores: Sequence[Store] | None = None,
        corrupt: dict[int, tuple[str, str]] | None = None,
    ) -> None:
        self.fields, self.outcomes, self.tensors, self.stores = fields, per_image, tensors, stores
        self.corrupt = corrupt or {}

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows int64 [B] of each field, on the device that holds them (the CPU if read from disk)."""
        if self.tensors is not None:
            rows = send(rows, self.tensors[0].device)
            return tuple(tensor.index_select(0, rows) for tensor in self.tensors)
        return tuple(
            torch.from_numpy(store.take(rows.numpy())).view(field.dtype).view(-1, *field.shape)
            for store, field in zip(self.stores, self.fields, strict=True)
        )

    def hold(self, device: torch.device) -> None:
        """Reads everything from disk into the memory of `device`."""
        count = self.stores[0].count
        held = [torch.empty(count, *field.shape, dtype=field.dtype, device=device) for field in self.fields]
        for rows in np.array_split(np.arange(count), max(1, count // 256)):
            for tensor, part in zip(held, self.take(torch.from_numpy(rows)), strict=True):
                tensor[rows[0] : rows[-1] + 1] = part.to(device)
        self.tensors, self.stores = held, None

    def epoch(self, loader: Loader, epoch: int, start_step: int, device: torch.device) -> Iterator[Batch]:
        """What `loader.epoch` would give, as batches of features on `device`."""
        steps = self._steps(loader, epoch, start_step)
        if self.tensors is None or self.tensors[0].device.type != device.type:
            return to_device((self._batch(*step) for step in steps), device)
        return self._held_epoch(list(steps), device)

    def _held_epoch(self, steps: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> Iterator[Batch]:
        """Batches of rows that `device` holds; the row numbers of all steps are copied there at once."""
        if steps:
            all_rows = send(torch.cat([rows for _, _, rows in steps]), device).split(len(steps[0][-1]))
            for (indices, flipped, _), rows in zip(steps, all_rows, strict=True):
                yield self._batch(indices, flipped, rows)

    def _batch(self, indices: Tensor, flipped: Tensor, rows: Tensor) -> Batch:
        return Batch(None, indices, flipped, self.take(rows))

    def _steps(self, loader: Loader, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Image indices, which are mirrored, and row numbers of each step."""
        flips = loader.flips(epoch)
        for indices in loader.steps(epoch, start_step):
            if self.corrupt:
                indices = loader.stand_ins(epoch, indices, self.corrupt)
            flipped = flips[indices]
            yield indices, flipped, indices * self.outcomes + (flipped if self.outcomes > 1 else 0)


def in_memory(
    loader: Loader, function: Function, fields: Sequence[Field], device: torch.device, progress: bool | None = None
) -> FeatureCache:
    """Runs `function` on every outcome and keeps the results on `device`."""
    image_set = loader.image_set
    per_image, count = outcomes(image_set), len(image_set)
    held = [torch.zeros(count * per_image, *field.shape, dtype=field.dtype, device=device) for field in fields]
    corrupt: dict[int, tuple[str, str]] = {}
    with progress_bar("features", count, 0, progress) as bar:
        for indices, good, results in _compute(loader, function, torch.arange(count)):
            for mirrored, fields_of in enumerate(results):
                rows = (indices * per_image + mirrored)[good].to(device)
                for tensor, result in zip(held, fields_of, strict=True):
                    tensor[rows] = result[good.to(result.device)].to(device)
            corrupt |= _reasons(loader, indices[~good].tolist())
            bar.update(len(indices))
    return FeatureCache(fields, per_image, tensors=held, corrupt=corrupt)


def build(
    loader: Loader,
    function: Function,
    stores: Sequence[Store],
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Completes `stores`, one for each field; images that an earlier build could not read are tried again.

    UserError if more are corrupt than the loader tolerates, NotBuilt if a store cannot be written or images change
    meanwhile.
    """
    per_image, count = outcomes(loader.image_set), len(loader.image_set)
    if readable := readable_again(loader.image_set, sorted(_corrupt(stores, per_image))):
        _refill(loader, function, stores, readable, say)
    with ExitStack() as stack:
        writers = [stack.enter_context(store.building(say)) for store in stores]
        missing = [writer for writer in writers if writer is not None]
        if missing:
            # Stores advance together, but a kill may have left one ahead, or one outcome of an image unwritten.
            start = min(writer.written for writer in missing) // per_image
            with progress_bar("features", count, start, progress) as bar:
                for indices, good, results in _compute(loader, function, torch.arange(start, count)):
                    require_unchanged(loader.image_set, indices.tolist())
                    _append(loader, writers, indices, good, results)
                    bar.update(len(indices))


def opened(loader: Loader, fields: Sequence[Field], stores: Sequence[Store]) -> FeatureCache:
    """The cache of complete `stores`; UserError if one is incomplete, or too many images were corrupt."""
    require_complete(stores)
    corrupt = _corrupt(stores, outcomes(loader.image_set))
    # Labels of today: the store's may be of another folder with the same images.
    corrupt = {index: (loader.image_set.label(index), reason) for index, (_, reason) in corrupt.items()}
    loader.note_corrupt(dict(corrupt.values()))
    return FeatureCache(fields, outcomes(loader.image_set), stores=stores, corrupt=corrupt)


def _corrupt(stores: Sequence[Store], per_image: int) -> dict[int, tuple[str, str]]:
    """Label and reason, by index, of the images that lack a row in any store."""
    return {row // per_image: why for store in stores for row, why in store.corrupt.items()}


def _refill(
    loader: Loader, function: Function, stores: Sequence[Store], indices: Sequence[int], say: Callable[[str], None]
) -> None:
    per_image = outcomes(loader.image_set)
    for some, good, results in _compute(loader, function, torch.tensor(indices)):
        require_unchanged(loader.image_set, some.tolist())
        for field, store in enumerate(stores):
            batches = [_bytes(result[field]) for result in results]
            rows = [
                (index * per_image + mirrored, rows[position], 0, 0)
                for mirrored, rows in enumerate(batches)
                for position, index in enumerate(some.tolist())
                if good[position]
            ]
            refill(store, rows, say)


def _bytes(rows: Tensor) -> np.ndarray:
    return rows.cpu().contiguous().view(torch.uint8).flatten(1).numpy()


def _append(loader: Loader, writers, indices: Tensor, good: Tensor, results: list[tuple[Tensor, ...]]) -> None:
    reasons = _reasons(loader, indices[~good].tolist())
    per_image = len(results)
    for field, writer in enumerate(writers):
        if writer is None:
            continue
        batches = [_bytes(result[field]) for result in results]
        for position, index in enumerate(indices.tolist()):
            for mirrored, rows in enumerate(batches):
                if index * per_image + mirrored >= writer.written:
                    writer.append(rows[position], corrupt=reasons.get(index))


def _reasons(loader: Loader, corrupt: list[int]) -> dict[int, tuple[str, str]]:
    """Label and reason of corrupt images, by index."""
    labels = {index: loader.image_set.label(index) for index in corrupt}
    return {index: (label, loader.corrupt[label]) for index, label in labels.items()}


def _compute(
    loader: Loader, function: Function, indices: Tensor
) -> Iterator[tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]]:
    """(indices int64 [b], which of them could be read bool [b], results of each outcome) of the images `indices`."""
    with closing(full_batches(loader, indices)) as batches:
        for part, good, images in batches:
            squares = [images, images.flip(-1)][: outcomes(loader.image_set)]
            yield part, good, [tuple(field[: len(part)] for field in function(square)) for square in squares]
