"""Worker processes that load whole batches, for more workers than threads are good for (see `loader`).

They are started by a fork server, which has neither CUDA nor threads in it, stay for the epochs to come, and hand
images over in shared memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from spot_fast.errors import UserError

_AHEAD = 2  # batches of each process beyond the one in use


class _Work(Dataset):
    """What a process does: the function's result for one step's (epoch, indices)."""

    def __init__(self, function: Callable[[int, list[int]], Any]) -> None:
        self.function = function

    def __getitem__(self, task: tuple[int, list[int]]) -> Any:
        return self.function(*task)


class _Tasks:
    """The tasks of the epoch that begins next; what DataLoader calls a sampler."""

    def __init__(self) -> None:
        self.tasks: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class Processes:
    """`count` processes that call `function(epoch, indices)`, which travels to them by pickling.

    They end with this object, or with the process that has it.
    """

    def __init__(self, function: Callable[[int, list[int]], Any], count: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        context.set_forkserver_preload([__name__])
        self._tasks = _Tasks()
        # A generator of its own: DataLoader would draw from torch's, which belongs to others.
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
        """The results for all steps in their order; UserError where a process ends unexpectedly.

        The processes end where this is left early or fails.
        """
        self._tasks.tasks = [(epoch, indices.tolist()) for indices in steps]
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
            # The processes import the script that starts them.
            guard = "" if started else ", or have a script's own code below if __name__ == '__main__'"
            raise UserError(
                f"a process of --workers {self.count} ended unexpectedly ({_reason(error)}): use fewer, "
                f"or give the machine more memory, shared memory (/dev/shm) included{guard}"
            ) from error
        finally:
            if not complete:
                self.close()

    def close(self) -> None:
        """Ends the processes; another `run` starts others."""
        # Without this they would live as long as the traceback of an exception that came from here.
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def _unchanged(result: Any) -> Any:
    return result


def _of_dead_process(error: Exception) -> bool:
    """Whether DataLoader says so, or could not fetch a tensor's handle; exceptions of `function` say where they are
    from."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
