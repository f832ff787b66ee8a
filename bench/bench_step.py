"""A training step of the reference and of the trainer, small enough for seconds.

    pytest bench/bench_step.py --benchmark-only
    python bench/bench_step.py [--rounds 31] [--write]

Under pytest both stages are timed once their losses are known to be equal. The command prints how many times faster the
trainer is in float32 on one thread, in CPU seconds; --write keeps that in results/step_ratio.json, which
`tests/bench/test_bench_step.py` holds the trainer to. The model is the scenes preset's, 64 tokens of 128 channels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.machine import commit, cpu_name
from harness.step_runs import ReferenceSteps, TrainerSteps, settings, write_teacher

RATIOS = ROOT / "bench" / "results" / "step_ratio.json"
# What losses may differ by in float32, relatively.
LOSS = 1e-5
_SMALL = dict(image_size=64, mask_size=64, num_slots=6, slot_dim=128, slot_mlp=256, dec_blocks=4)
_BATCH = 8


def pair(stage: int, folder: Path) -> tuple[ReferenceSteps, TrainerSteps]:
    """Both kinds of step in float32, from images, their first one taken; AssertionError where its losses differ.

    folder: an empty one, for the teacher of stage 2.
    """
    config = settings(stage, precision="float32", batch_size=_BATCH, tiny=True, **_SMALL)
    teacher = write_teacher(folder / "teacher", config) if stage == 2 else None
    steps = [kind(config, torch.device("cpu"), teacher) for kind in (ReferenceSteps, TrainerSteps)]
    expected, found = (one.first().loss for one in steps)
    assert abs(found / expected - 1) <= LOSS, f"stage {stage}: loss {found}, the reference's is {expected}"
    return steps[0], steps[1]


def ratio(reference: ReferenceSteps, ours: TrainerSteps, rounds: int) -> float:
    """How many times longer a step of the reference takes: the median over `rounds` of one step each, in turns.

    In CPU seconds of this process, which on one thread are those of an idle machine whatever else is running.
    """
    found = []
    for number in range(rounds + 2):
        seconds = []
        for steps in (reference, ours):
            begin = time.process_time()
            steps.next()
            seconds.append(time.process_time() - begin)
        if number >= 2:  # the first ones warm up
            found.append(seconds[0] / seconds[1])
    return median(found)


@contextlib.contextmanager
def as_in_training() -> Iterator[None]:
    """One thread, and none of the checks that tests switch on: filling new memory takes the trainer's time."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def ratios(rounds: int, stages: tuple[int, ...] = (1, 2)) -> dict[str, float]:
    """`ratio` of each stage, as in training."""
    found = {}
    with as_in_training():
        for stage in stages:
            with tempfile.TemporaryDirectory() as folder:
                found[f"stage {stage}"] = ratio(*pair(stage, Path(folder)), rounds)
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["reference", "trainer"])
def test_step(benchmark, stage, kind, tmp_path):
    """Equal losses first, then time."""
    with as_in_training():
        reference, ours = pair(stage, tmp_path)
        benchmark.group = f"step of stage {stage}, float32, one thread"
        benchmark.pedantic((reference if kind == "reference" else ours).next, rounds=9, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="steps of each (default: 31)")
    parser.add_argument("--write", action="store_true", help=f"keep the ratios in {RATIOS.relative_to(ROOT)}")
    args = parser.parse_args()
    found = {stage: round(value, 3) for stage, value in ratios(args.rounds).items()}
    about = {"cpu": cpu_name(), "torch": torch.__version__, "date": f"{date.today()}", "commit": commit()}
    text = json.dumps({"times_faster_than_reference": found, **about}, indent=2)
    print(text)
    if args.write:
        RATIOS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
