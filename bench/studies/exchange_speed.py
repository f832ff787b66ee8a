"""What the exchange of gradients costs a training step of several processes: three ways beside none, in turns.

    python bench/studies/exchange_speed.py [--stage 1] [--batch-size B] [--rounds N] [--csv FILE] [--tiny]

Each process trains on `--batch-size` images of its own (ViT-B/16, COCO's settings, frozen features cached, float32),
four trainers of it taking turns step by step, all processes together:

    none        every process for itself: the step without communication
    at the end  all gradients copied into one vector, one exchange after backward, copied back
    in pieces   `spot_fast.training.shared_gradients`: views of a flat buffer, which goes out in pieces during backward
    one piece   the same with a single piece, so that nothing overlaps: what the overlap alone brings

Times are medians of a step, with what it takes longer than none as the median of the ratios of the turns. Before they
are timed the three ways' first gradients are compared. Two processes on one machine with gloo: the exchange is a copy
through memory, and the cores that it needs are those that compute, so a GPU with NCCL gains more from overlapping.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.machine import commit, cores, cpu_name
from harness.step_runs import TrainerSteps, settings, write_teacher
from harness.targets import target_file
from ladder import write_csv

from spot_fast.training.shared_gradients import LocalGradients, SharedGradients

NONE, AT_THE_END, IN_PIECES, ONE_PIECE = "none", "at the end", "in pieces", "one piece"


@dataclass(frozen=True)
class Row:
    """A line of the table; error: the largest relative difference of a gradient from that of `at the end`."""

    stage: int
    processes: int
    batch_size: int
    way: str
    gradient_mib: float
    pieces: int
    ms: float
    times_none: float
    error: float


class GatheredGradients(LocalGradients):
    """One exchange of all gradients after backward, through a vector of its own."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], size: int) -> None:
        self.parameters, self.size = parameters, size

    def finish(self, losses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(list(losses)).detach()])
        dist.all_reduce(flat)
        flat /= self.size
        sizes = [gradient.numel() for gradient in gradients]
        parts = [
            part.view_as(gradient) for part, gradient in zip(flat.split([*sizes, len(losses)]), gradients, strict=False)
        ]
        torch._foreach_copy_(gradients, parts)
        return tuple(flat[-len(losses) :].unbind())


def ways(parameters: Sequence[torch.nn.Parameter], size: int, way: str) -> LocalGradients:
    if way == NONE:
        return LocalGradients()
    if way == AT_THE_END:
        return GatheredGradients(parameters, size)
    options = {"piece_bytes": 2**40} if way == ONE_PIECE else {}
    return SharedGradients(parameters, size, None, contextlib.nullcontext, **options)


def measure(rank: int, size: int, port: int, args: argparse.Namespace, teacher: Path | None, results) -> None:
    """What each process does; rank 0 puts the rows into `results`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    config = settings(args.stage, precision="float32", batch_size=args.batch_size, tiny=args.tiny, seed=rank)
    running, gradients = {}, {}
    for way in (NONE, AT_THE_END, IN_PIECES, ONE_PIECE):
        steps = TrainerSteps(config, torch.device("cpu"), teacher, cached=True)
        trainer = steps.trainer
        # seeds differ, so that processes have other images; the weights have to be the same
        for parameter in trainer.parameters:
            dist.broadcast(parameter.data, src=0)
        trainer.update.gradients = ways(trainer.parameters, size, way)
        steps.next()
        gradients[way] = [None if p.grad is None else p.grad.clone() for p in trainer.parameters]
        running[way] = steps
    expected = gradients[AT_THE_END]
    size_mib = sum(p.numel() * p.element_size() for p in running[NONE].trainer.parameters) / 2**20
    times: dict[str, list[float]] = {way: [] for way in running}
    for number in range(args.rounds + 1):
        for way, steps in running.items():
            dist.barrier()
            begin = time.perf_counter()
            steps.next()
            dist.barrier()  # the slower process's time
            if number:
                times[way].append(time.perf_counter() - begin)
    if rank == 0:
        for way, seconds in times.items():
            ratio = median(a / b for a, b in zip(seconds, times[NONE], strict=True))
            shared = running[way].trainer.update.gradients
            pieces = shared.pieces if isinstance(shared, SharedGradients) else int(way == AT_THE_END)
            error = 0.0 if way == NONE else max(_apart(a, b) for a, b in zip(gradients[way], expected, strict=True))
            results.put(
                Row(args.stage, size, args.batch_size, way, size_mib, pieces, 1e3 * median(seconds), ratio, error)
            )
    dist.destroy_process_group()


def _apart(computed: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if computed is None or expected is None:
        return 0.0 if computed is expected else float("inf")
    return ((computed - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def table(rows: Sequence[Row]) -> str:
    titles = ("stage", "exchange of gradients", "pieces", "ms/step", "× the step without", "error")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        times, error = ("–", "–") if row.way == NONE else (f"{row.times_none:.3f}", f"{row.error:.1e}")
        lines.append(f"| {row.stage} | {row.way} | {row.pieces} | {row.ms:,.0f} | {times} | {error} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes of one thread (default: 2)")
    parser.add_argument("--batch-size", type=int, default=2, metavar="B", help="images of a process (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="steps of each way (default: 15)")
    parser.add_argument("--csv", type=target_file, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything works")
    args = parser.parse_args(argv)
    for name, value, least in (
        ("--processes", args.processes, 2),
        ("--batch-size", args.batch_size, 1),
        ("--rounds", args.rounds, 1),
    ):
        if value < least:
            print(f"error: {name} {value} is too few: use {least} or more", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        teacher = None
        if args.stage == 2:
            config = settings(2, precision="float32", batch_size=args.batch_size, tiny=args.tiny)
            teacher = write_teacher(Path(folder) / "teacher", config)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=measure, args=(rank, args.processes, port, args, teacher, results))
            for rank in range(args.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        print("error: a process failed, see above", file=sys.stderr)
        return 1
    rows = [results.get() for _ in range(4)]
    about = {
        "date": f"{date.today()}",
        "cpu": cpu_name(),
        "cores": str(cores()),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if args.csv is not None:
        write_csv(args.csv, rows, about)
    print(table(rows))
    print(
        f"\n{args.processes} processes of one thread, gloo, {rows[0].gradient_mib:.0f} MiB of gradients, batch "
        f"{args.batch_size} each, medians of {args.rounds} steps in turns; {about['cpu']}, torch {about['torch']}, "
        f"{about['date']}. Error: of the first gradients, relative to the exchange at the end."
    )
    wrong = [row.way for row in rows if not row.error <= 1e-5]
    if wrong:
        print(f"FAILED: gradients differ: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
