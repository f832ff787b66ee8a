"""Worker processes that load whole batches, for more workers than threads can serve (see `loader`).

A fork server starts them, free of CUDA and threads; they stay for all epochs and pass images through shared memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from spot_fast.errors import UserError, one_line

_AHEAD = 2  # batches of each process beyond the one in use


class _Work(Dataset):
    """DataLoader's data set: item (epoch, indices) is the function's result for that step."""

    def __init__(self, function: Callable[[int, list[int]], Any]) -> None:
        self.function = function

    def __getitem__(self, task: tuple[int, list[int]]) -> Any:
        return self.function(*task)


class Processes:
    """`count` processes that call the pickled `function(epoch, indices)`; they end with this object or its process."""

    def __init__(self, function: Callable[[int, list[int]], Any], count: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        context.set_forkserver_preload([__name__])
        self._tasks: list[tuple[int, list[int]]] = []  # of the epoch that begins next: DataLoader's sampler
        # With a generator of its own DataLoader does not draw from torch's global one.
        self._loader = DataLoader(
            _Work(function),
            batch_size=None,
            sampler=self._tasks,
            num_workers=count,
            collate_fn=_unchanged,
            multiprocessing_context=context,
            persistent_workers=True,
            prefetch_factor=_AHEAD,
            generator=torch.Generator(),
        )
        self.count = count

    def run(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[Any]:
        """The results of all steps in order; UserError if a process ends unexpectedly. Leaving early ends them all."""
        self._tasks[:] = [(epoch, indices.tolist()) for indices in steps]
        if not steps:
            return
        started = complete = False
        try:
            for result in self._loader:
                started = True
                yield result
            complete = True
        except (RuntimeError, OSError, EOFError) as error:
            if not _of_dead_process(error):
                raise
            # The processes import the main script, which must not start others.
            guard = "" if started else ", or have a script's own code below if __name__ == '__main__'"
            raise UserError(
                f"a process of --workers {self.count} ended unexpectedly ({one_line(error)}): use fewer, "
                f"or give the machine more memory, shared memory (/dev/shm) included{guard}"
            ) from error
        finally:
            if not complete:
                self.close()

    def close(self) -> None:
        """Ends the processes; the next `run` starts others."""
        # Otherwise the traceback of an exception from here would keep them alive.
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def _unchanged(result: Any) -> Any:
    return result


def _of_dead_process(error: Exception) -> bool:
    """Whether DataLoader reports a dead process or could not fetch its tensor; exceptions of `function` name the worker
    instead."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text
