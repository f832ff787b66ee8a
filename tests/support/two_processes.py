"""`spot_fast.train` in several processes of this machine, as torchrun starts them, but forked from one process that has
imported everything: a second each instead of ten."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
LIMIT = 120  # seconds; on a busy machine everything takes long


@dataclass(frozen=True)
class Ending:
    """codes, standard output and standard error by rank; seconds that the last process took longer than the first."""

    codes: list[int]
    out: list[str]
    err: list[str]
    apart: float


def train(folder: Path, words: list[str], *, size: int = 2, prepare: str = "") -> Ending:
    """Trains with `words` in `size` processes in the current folder `folder`.

    prepare: "module.function", called with the rank in each process before it trains.
    """
    context = multiprocessing.get_context("forkserver")
    # Adam's first step imports torch._dynamo, which takes longer than the run.
    context.set_forkserver_preload(["spot_fast.train", "torch._dynamo", "two_processes"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_child, args=(folder, words, rank, size, port, prepare)) for rank in range(size)
    ]
    with pytest.MonkeyPatch.context() as patch:  # the server's imports know nothing of this process's sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(ROOT), str(ROOT / "kernels")]))
        for process in processes:
            process.start()
    ends: dict[int, float] = {}
    limit = time.monotonic() + LIMIT
    while len(ends) < size and time.monotonic() < limit:
        ends |= {
            rank: time.monotonic()
            for rank, process in enumerate(processes)
            if rank not in ends and not process.is_alive()
        }
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    assert len(ends) == size, f"processes {set(range(size)) - set(ends)} did not end"
    texts = {kind: [(folder / f"rank{rank}.{kind}").read_text() for rank in range(size)] for kind in ("out", "err")}
    return Ending([process.exitcode for process in processes], **texts, apart=max(ends.values()) - min(ends.values()))


def _child(folder: Path, words: list[str], rank: int, size: int, port: int, prepare: str) -> None:
    from spot_fast.train import main

    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SPOT_FAST_CACHE": str(folder / "cache"),
    }
    torch.set_num_threads(1)
    with (
        open(f"rank{rank}.out", "w") as out,
        open(f"rank{rank}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        if prepare:
            module, function = prepare.rsplit(".", 1)
            getattr(importlib.import_module(module), function)(rank)
        try:
            code = main(["--no-tensorboard", "--threads", "1", *words])
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    sys.exit(code)
