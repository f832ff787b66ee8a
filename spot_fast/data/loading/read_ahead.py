"""Computes items ahead of their use, in order; loaders, caches, evaluation and segmentation read with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    depth: int,
    workers: int = 0,
    pool: ThreadPoolExecutor | None = None,
    name: str = "read-ahead",
) -> Iterator[Future[R]]:
    """Futures of `function(item)` in the order of `items`, up to `depth` begun beyond the one in use.

    `workers` threads run them, or those of `pool`, which stays open; without either each runs in its turn. An exception
    waits in its future. Leaving early cancels what has not begun; own threads finish what has, so that nothing reads on
    behind an error or Ctrl-C.
    """
    if pool is None and not workers:
        for item in items:
            yield _computed(function, item)
        return
    threads = pool or ThreadPoolExecutor(workers, name)
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            ahead.append(threads.submit(function, item))
            if len(ahead) > depth:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        if pool is None:
            threads.shutdown(wait=True, cancel_futures=True)
        else:
            for future in ahead:
                future.cancel()


def _computed(function: Callable[[T], R], item: T) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(function(item))
    except Exception as error:
        future.set_exception(error)
    return future
