"""What may happen to images between two builds: unreadable ones become readable, files change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from spot_fast.data.base import ImageSet
from spot_fast.data.caching.store import NotBuilt, Store
from spot_fast.errors import CorruptImage, UserError


def readable_again(image_set: ImageSet, corrupt: Iterable[int]) -> list[int]:
    """Those of `corrupt` that can be read now: the disk, a server, permissions or Pillow may have been the reason."""

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
    """NotBuilt if an image has changed since the set's key was made: its row would be stored under the old key."""
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
