"""One run in several processes, started by torchrun: each trains on its share of every batch.

    torchrun --nproc-per-node N -m spot_fast.train ...

Gradients, and the losses with them, are averaged over all processes during backward (`shared_gradients`; NCCL on GPUs,
gloo on CPUs), so that every process takes the same step. All else goes through gloo and waits for no GPU. Rank 0 alone
decides (`on_rank_0`), writes and prints.

How a run ends. Processes agree on a stop before each step, so all stop at the same one. A failure in preparation is
raised in all (`on_rank_0`, `on_all_ranks`). In the loop a process that fails leaves its error in torchrun's store and
ends; the others find its connection closed at their next exchange (`Ended`). On GPUs, torchrun ends those that wait for
its gradients after 30 s.
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
from torch import nn

from spot_fast.errors import UserError
from spot_fast.system.devices import named_device
from spot_fast.training.shared_gradients import LocalGradients, SharedGradients

T = TypeVar("T")

_START = timedelta(minutes=10)
# Rank 0 may build caches for days. Of a process that ends, its closed connection shows at once.
_WAIT = timedelta(days=30)
_REPORT = timedelta(seconds=5)  # within which rank 0 prints why a run ends


class Ended(UserError):
    """Another process of the run has ended or failed; the message has its reason."""


class World:
    """Process `rank` of the `size` that train together. local_rank: its number on its machine."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._gradients: dist.ProcessGroup | None = None  # None: the default group, which is gloo's
        self._ending = False
        self._reported_corrupt = 0

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    # ---- preparation

    def on_rank_0(self, make: Callable[[], T]) -> T:
        """Runs `make` on rank 0 alone; its result, or exception (SystemExit too), reaches all ranks."""
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
        """This process's device: --device, on GPUs the one of its local rank; UserError if there are too few."""
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
        """Prepares the averaging of gradients on `device`; all processes call it."""
        if self.size > 1 and device.type == "cuda":
            self._gradients = dist.new_group(backend="nccl")

    def copy_from_rank_0(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives `parameters` the values that they have on rank 0, to the last bit."""
        if self.size > 1:
            with torch.no_grad():
                flat = torch.cat([parameter.flatten() for parameter in parameters])
                with self._exchange():
                    dist.broadcast(flat, src=0, group=self._gradients)
                parts = flat.split([parameter.numel() for parameter in parameters])
                torch._foreach_copy_(
                    list(parameters), [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
                )

    # ---- steps

    def agree(self, stop: bool, corrupt: dict[str, str]) -> bool:
        """Whether any process wants to stop. Also reports `corrupt` images to rank 0."""
        if self.size == 1:
            return stop
        if not self.is_rank_0 and len(corrupt) > self._reported_corrupt:
            self._reported_corrupt = len(corrupt)
            self._store.set(f"corrupt/{self.rank}", json.dumps(dict(corrupt)))
        wanted = torch.tensor(int(stop))
        with self._exchange():
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return bool(wanted)

    def gradients(self, parameters: Sequence[nn.Parameter], leaves: Sequence[nn.Parameter]) -> LocalGradients:
        """Averages the gradients of `parameters` over the processes, in place. leaves: see `SharedGradients`."""
        if self.size == 1:
            return LocalGradients()
        return SharedGradients(parameters, self.size, self._gradients, self._exchange, leaves=leaves)

    def corrupt_elsewhere(self) -> dict[str, str]:
        """{label: reason} of images that other processes could not read."""
        corrupt: dict[str, str] = {}
        for rank in range(1, self.size):
            if self._store.check([f"corrupt/{rank}"]):
                corrupt |= json.loads(self._store.get(f"corrupt/{rank}"))
        return corrupt

    # ---- the end

    def leave(self, error: BaseException) -> None:
        """Reports to the others why this process ends; rank 0 has printed its `error` already.

        Connections stay open: closing a GPU's may wait for a process that is gone.
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
        """Waits until rank 0 has printed its error: torchrun ends all processes when one ends with an error."""
        with contextlib.suppress(RuntimeError):
            self._store.wait(["reported"], _REPORT)
        return code

    def close(self) -> None:
        """Ends the connections of a run without an error."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turns the failure of an exchange into `Ended`, with the reason of the process that is gone."""
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
    """The processes that torchrun has started, or this one alone; UserError if they do not meet."""
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


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip(": ")
