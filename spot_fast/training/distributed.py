"""One run in several processes, started by torchrun: each trains on its share of every batch.

    torchrun --nproc-per-node N -m spot_fast.train ...

`World` is what a process knows of the others. Gradients are averaged over all of them during backward, in pieces
(`shared_gradients`; NCCL on GPUs, gloo on CPUs), so that every process takes the same step; the losses travel with
them. All else goes through gloo and waits for no GPU. Rank 0 alone decides (`on_rank_0`), writes and prints.

How a run ends. A stop is agreed on before each step, so all stop at the same one. A failure in preparation is raised
in all processes (`on_rank_0`, `on_all_ranks`). In the loop a process that fails leaves its sentence in the store that
torchrun keeps, and ends; the others find its connection closed at their next exchange (`Ended`). On GPUs, those that
wait for its gradients are ended by torchrun after 30 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spot_fast.errors import UserError
from spot_fast.system.devices import named_device
from spot_fast.training.shared_gradients import LocalGradients, SharedGradients

T = TypeVar("T")

_START = timedelta(minutes=10)
# Rank 0 may build caches for days. A process that ends is noticed by its connection, however long this is.
_WAIT = timedelta(days=30)
_REPORT = timedelta(seconds=5)  # within which rank 0 prints why a run ends


class Ended(UserError):
    """Another process of the run has ended, or has failed at what all have to do; the message has its reason."""


class World:
    """Process `rank` of the `size` that train together; in a single process every method does the local thing.

    local_rank: the process's number on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._gradients: dist.ProcessGroup | None = None  # None: the default group, which is gloo's
        self._ending = False
        self._reported_corrupt = 0

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # ---- preparation

    def on_rank_0(self, make: Callable[[], T]) -> T:
        """The result of `make`, run on rank 0 alone, on all ranks; its exception, SystemExit too, is raised on all."""
        if self.size == 1:
            return make()
        message, failed = [None], None
        if self.is_rank_0:
            try:
                message = [("value", make())]
            except SystemExit as error:
                message, failed = [("exit", error.code)], error
            except Exception as error:
                message, failed = [("error", _sentence(error))], error
        with self._exchange():
            dist.broadcast_object_list(message, src=0)
        kind, value = message[0]
        if kind == "value":
            return value
        self._ending = True
        if failed is not None:
            raise failed
        raise SystemExit(self._after_rank_0(value)) if kind == "exit" else Ended(value)

    def on_all_ranks(self, make: Callable[[], T]) -> T:
        """Runs `make` on all ranks; a failure on one is raised on all. `make` must not exchange anything itself."""
        if self.size == 1:
            return make()
        made, failed = None, None
        try:
            made = make()
        except Exception as error:
            failed = error
        sentences = self.gather(None if failed is None else _sentence(failed))
        reasons = [(rank, sentence) for rank, sentence in enumerate(sentences) if sentence is not None]
        if not reasons:
            return made
        self._ending = True
        if failed is not None and (self.is_rank_0 or not isinstance(failed, UserError)):
            raise failed
        rank, sentence = reasons[0]
        raise Ended(sentence if len(reasons) == self.size else f"process {rank}: {sentence}")

    def gather(self, value: T) -> list[T]:
        """`value` of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._exchange():
                dist.all_gather_object(values, value)
        return values

    def device(self, name: str | None) -> torch.device:
        """This process's device: --device, on GPUs the one of its local rank; UserError where there are too few."""
        kind = named_device(name)
        if self.size == 1:
            return kind
        if kind.index is not None:
            raise UserError(
                f"--device {name} is one device and there are {self.size} processes: use --device "
                f"{kind.type}, each process takes its own"
            )
        if kind.type == "cuda":
            here, count = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)), torch.cuda.device_count()
            if here > count:
                raise UserError(
                    f"torchrun started {here} processes here but there {'is' if count == 1 else 'are'} "
                    f"{count} GPU{'s' * (count != 1)}: use --nproc-per-node {max(count, 1)}, or "
                    "--device cpu"
                )
            kind = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(kind)
        return kind

    def connect(self, device: torch.device) -> None:
        """Gradients on `device` can be averaged after this; all processes call it."""
        if self.size > 1 and device.type == "cuda":
            self._gradients = dist.new_group(backend="nccl")

    def copy_from_rank_0(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives `parameters` the values that they have on rank 0, to the last bit."""
        if self.size > 1:
            with torch.no_grad():
                flat = torch.cat([parameter.flatten() for parameter in parameters])
                with self._exchange():
                    dist.broadcast(flat, src=0, group=self._gradients)
                _copy_back(flat, parameters)

    # ---- steps

    def agree(self, stop: bool, corrupt: dict[str, str]) -> bool:
        """Whether any process wants to stop: the same answer in all. Also reports `corrupt` images to rank 0."""
        if self.size == 1:
            return stop
        if not self.is_rank_0 and len(corrupt) > self._reported_corrupt:
            self._reported_corrupt = len(corrupt)
            self._store.set(f"corrupt/{self.rank}", json.dumps(dict(corrupt)))
        wanted = torch.tensor(int(stop))
        with self._exchange():
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return bool(wanted)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> LocalGradients:
        """Averages the gradients of `parameters` over the processes, in place."""
        if self.size == 1:
            return LocalGradients()
        return SharedGradients(parameters, self.size, self._gradients, self._exchange)

    def corrupt_elsewhere(self) -> dict[str, str]:
        """{label: reason} of the images that the other processes could not read."""
        corrupt: dict[str, str] = {}
        for rank in range(1, self.size):
            if self._store.check([f"corrupt/{rank}"]):
                corrupt |= json.loads(self._store.get(f"corrupt/{rank}"))
        return corrupt

    # ---- the end

    def leave(self, error: BaseException) -> None:
        """Lets the others know why this process ends, before it does; rank 0 has printed its `error` already.

        Connections stay open until then: closing a GPU's may wait for a process that is gone.
        """
        self._ending = True
        if self.size == 1:
            return
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            if self.is_rank_0:
                self._store.set("reported", "")
            elif isinstance(error, Ended):
                self._after_rank_0()
            else:
                self._store.set("error", f"process {self.rank}: {_sentence(error)}")

    def _after_rank_0(self, code: object = None) -> object:
        """Waits until rank 0 has printed its error: torchrun ends all processes when one of them ends with an error."""
        with contextlib.suppress(RuntimeError):
            self._store.wait(["reported"], _REPORT)
        return code

    def close(self) -> None:
        """Ends the connections, after all has gone well."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turns the failure of an exchange into `Ended`, with the last sentence of the process that is gone."""
        try:
            yield
        except RuntimeError as error:
            self._ending = True
            reason = "it left no reason"
            with contextlib.suppress(RuntimeError):
                if self._store.check(["error"]):
                    reason = self._store.get("error").decode()
            raise Ended(f"another process of the run has ended ({reason})") from error

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM outside the loop: as Ctrl-C, but ignored while this process reports why it ends."""
        if not self._ending:
            raise KeyboardInterrupt


def join() -> World:
    """The world of the processes that torchrun has started, or this process alone; UserError where they do not meet."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        return World()
    rank = int(os.environ["RANK"])
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=size, timeout=_WAIT
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} of {size} does not reach the others ({str(error).splitlines()[0]}): start all "
            "with torchrun, on one machine with --standalone"
        ) from error
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), dist.PrefixStore("spot_fast", store))
    signal.signal(signal.SIGTERM, world._interrupt)
    return world


def _copy_back(flat: Tensor, into: Sequence[Tensor]) -> None:
    """Copies consecutive values of `flat` into the tensors that were concatenated."""
    sizes = [tensor.numel() for tensor in into]
    parts = flat[: sum(sizes)].split(sizes)
    torch._foreach_copy_(list(into), [part.view_as(tensor) for part, tensor in zip(parts, into, strict=True)])


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip(": ")
