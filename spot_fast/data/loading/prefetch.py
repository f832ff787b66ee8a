"""Makes the next batches in a thread while the current one is in use, and copies them to the device meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.system.devices import send

T = TypeVar("T")

_AHEAD = 4  # batches made beyond the one in use
_END = object()


def ahead(batches: Iterator[T], depth: int = _AHEAD) -> Iterator[T]:
    """The items of `batches` in order, up to `depth` made ahead by one thread; an exception is raised in its turn."""
    # One thread alone calls `next`: a generator cannot run in two.
    futures = read_ahead(lambda _: next(batches, _END), repeat(None), depth=depth, workers=1, name="prefetch")
    with closing(futures):
        for future in futures:
            if (batch := future.result()) is _END:
                return
            yield batch


def to_device(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Batches (pytrees of tensors) made ahead in a thread, which also copies them to a GPU.

    Copies go through pinned memory on their own stream; the current stream waits for each batch's copy only.
    """
    return ahead(batches) if device.type != "cuda" else _through_pinned(batches, device)


def _through_pinned(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    stream = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[T, torch.cuda.Event]]:
        for batch in batches:
            with torch.cuda.stream(stream):
                moved = pytree.tree_map_only(torch.Tensor, lambda tensor: send(tensor, device), batch)
                yield moved, stream.record_event()

    for batch, done in ahead(copied()):
        now = torch.cuda.current_stream(device)
        now.wait_event(done)
        # The allocator must not hand this memory to the copy stream again before the current stream is done with it.
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(now)
        yield batch
