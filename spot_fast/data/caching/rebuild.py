"""What the builds of pixel and feature caches share: full batches, a progress bar, images that change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spot_fast.data.base import ImageSet
from spot_fast.data.caching.store import NotBuilt, Store
from spot_fast.data.loading.loader import Loader
from spot_fast.errors import CorruptImage, UserError


def full_batches(loader: Loader, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of the image indices int64 [b], which of them could be read bool [b], and a batch that begins with them.

    The batch is always full (of several processes: a shard of one): DALI's pipeline is built for one size, and the
    last bits of features may depend on it.
    """
    size = loader.batch_size // loader.world
    wanted = [part for part in indices.split(size) if len(part)]
    full = [torch.cat([part, part[:1].expand(size - len(part))]) for part in wanted]
    with closing(loader.batches_of(full)) as batches:
        for part, batch in zip(wanted, batches, strict=True):
            yield part, batch.indices[: len(part)] == part, batch.images  # another index replaces a corrupt image's


def progress_bar(name: str, total: int, done: int, progress: bool | None) -> tqdm:
    """progress: None shows it on a terminal only."""
    hidden = None if progress is None else not progress
    return tqdm(total=total, initial=done, desc=name, unit="image", leave=False, disable=hidden)


def readable_again(image_set: ImageSet, corrupt: Iterable[int]) -> list[int]:
    """Those of `corrupt` that can be read now: a server, permissions or Pillow may have been the reason."""

    def is_read(index: int) -> bool:
        try:
            image_set.prepared(index)
        except CorruptImage:
            return False
        return True

    return [index for index in corrupt if is_read(index)]


def refill(store: Store, rows: Sequence[tuple[int, np.ndarray, int, int]], say: Callable[[str], None]) -> None:
    """`Store.refill`, or a note if the store may only be read."""
    rows = [row for row in rows if row[0] in store.corrupt]
    if not rows:
        return
    try:
        store.refill(rows, say)
    except NotBuilt as error:
        say(f"{len(rows)} rows of images that can be read again stay left out: {error}")


def require_unchanged(image_set: ImageSet, indices: Iterable[int]) -> None:
    """NotBuilt if an image has changed since the set's key was made, under which its row would be stored."""
    if changed := image_set.changed(indices):
        raise NotBuilt(
            f"image {image_set.label(changed[0])} has changed since the run began: {image_set.name} cannot "
            "be cached while it changes, start again when it is final or use --cache none"
        )


def require_complete(stores: Iterable[Store]) -> None:
    """UserError if this process does not see a store that another has just built."""
    for store in stores:
        if not store.complete:
            raise UserError(
                f"the cache {store.folder} is not complete here although it was built: use a --cache-dir "
                "that all processes see"
            )
