"""The next batches made in a thread while the present one is used, and copied to the device beside its computations."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from spot_fast.system.devices import send

T = TypeVar("T")

_AHEAD = 3  # batches made beyond the one in use


def ahead(make: Iterator[T], depth: int = _AHEAD) -> Iterator[T]:
    """What `make` yields, in order, made up to `depth` items ahead; its exception is raised where it would have been.

    Closing the iterator early ends the thread.
    """
    results: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, object]) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in make:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = results.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def to_device(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Batches (pytrees of tensors) made ahead in a thread, on a GPU also copied there by it.

    The copies go through pinned memory on a stream of their own; the present stream waits for a batch's copy and for
    nothing else.
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
        # The allocator may not reuse the batch's memory before the present stream is done with it.
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(now)
        yield batch
