"""How the time and the memory of a training step grow with images a batch, tokens and slots.

    python bench/growth.py [--csv FILE] [--plot FILE.png] [--tiny] [--device NAME]

ViT-B/16, COCO's settings, frozen features cached: no ViT is in a step of stage 1, its last four blocks are in one of
stage 2. In bfloat16 where the device multiplies it in hardware, else in float32; the table says which. Memory is the
most that tensors hold at once, weights and Adam's moments included: what PyTorch allocated on a GPU, on a CPU the count
of `live_bytes`.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("bench", "kernels", "")]

from harness.live_bytes import of_step
from harness.step_runs import TrainerSteps, settings, write_teacher
from harness.targets import target_file
from ladder import SPEED, about_machine, write_csv

from spot_fast.files import atomic_write
from spot_fast.precision import resolve

BATCHES = {"cuda": (16, 32, 64, 128, 256), "cpu": (2, 4, 8, 16)}
FIXED_BATCH = {"cuda": 16, "cpu": 2}
SIDES = (224, 448, 672)  # 196, 784, 1764 tokens of 16 × 16 pixels
SLOTS = (7, 11, 16, 24)
AXES = ("images", "tokens", "slots")


@dataclass(frozen=True)
class Point:
    """A line of the table: what grows, its value, and what a step takes."""

    stage: int
    grows: str
    batch: int
    tokens: int
    slots: int
    ms: float = math.nan
    mib: float = math.nan

    @property
    def size(self) -> int:
        return {"images": self.batch, "tokens": self.tokens, "slots": self.slots}[self.grows]


def points(device: str, tiny: bool) -> Iterator[tuple[Point, dict]]:
    """What is measured, and the settings that differ from COCO's."""
    batches, fixed = ((2, 4), 2) if tiny else (BATCHES[device], FIXED_BATCH[device])
    sides, patch = ((32, 64), 8) if tiny else (SIDES, 16)
    for stage in (1, 2):
        base = Point(stage, "", fixed, (sides[0] // patch) ** 2, SLOTS[0])
        for batch in batches:
            yield replace(base, grows="images", batch=batch), {}
        for side in sides:
            sizes = {"image_size": side, "mask_size": side}
            yield replace(base, grows="tokens", tokens=(side // patch) ** 2), sizes
        for slots in SLOTS[:2] if tiny else SLOTS:
            yield replace(base, grows="slots", slots=slots), {}


def measure(point: Point, changes: dict, device: torch.device, steps: int, tiny: bool) -> Point:
    """The point with its time, the median of `steps`, and memory."""
    with tempfile.TemporaryDirectory() as name:
        changes = changes | {"num_slots": point.slots}
        config = settings(point.stage, precision=resolve("auto", device), batch_size=point.batch, tiny=tiny, **changes)
        teacher = write_teacher(Path(name) / "teacher", config) if point.stage == 2 else None
        runner = TrainerSteps(config, device, teacher, cached=True)
        if device.type == "cuda":
            runner.next()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            runner.next()
            held = torch.cuda.max_memory_allocated()
        else:
            held = of_step(runner)
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            runner.next()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return replace(point, ms=1e3 * statistics.median(seconds), mib=held / 2**20)


def last_step(measured: Sequence[Point]) -> str:
    """How much the largest size is above the one before it, such as: tokens × 2.25: time × 3.44, memory × 1.71."""
    *_, before, last = measured
    return (
        f"{last.grows} × {last.size / before.size:.3g}: time × {last.ms / before.ms:.2f}, memory × "
        f"{last.mib / before.mib:.2f}"
    )


def table(measured: Sequence[Point]) -> str:
    lines = ["| stage | images | tokens | slots | ms/step | ms/image | MiB |", "|---" * 7 + "|"]
    for p in measured:
        lines.append(
            f"| {p.stage} | {p.batch} | {p.tokens} | {p.slots} | {p.ms:,.0f} | {p.ms / p.batch:,.1f} | {p.mib:,.0f} |"
        )
    parts = ["\n".join(lines)]
    for stage in (1, 2):
        lines = [[p for p in measured if (p.stage, p.grows) == (stage, grows)] for grows in AXES]
        if found := [last_step(line) for line in lines if len(line) > 1]:
            parts.append(f"stage {stage}, the largest beside the one before: {'; '.join(found)}")
    return "\n\n".join(parts)


def plot(measured: Sequence[Point], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), sharey="row")
    for column, grows in enumerate(AXES):
        for stage, colour in ((1, "tab:blue"), (2, "tab:orange")):
            line = [p for p in measured if (p.stage, p.grows) == (stage, grows)]
            for row, values in enumerate(([p.ms for p in line], [p.mib / 1024 for p in line])):
                axes[row, column].plot([p.size for p in line], values, "o-", color=colour, label=f"stage {stage}")
        axes[1, column].set_xlabel(grows)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("GiB")
    axes[0, 0].legend()
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    atomic_write(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def read_csv(path: Path, about: dict[str, str]) -> list[Point]:
    """The points that `write_csv` put there with the same `about`; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = {"grows": str, "ms": float, "mib": float}
    return [
        Point(**{f.name: kinds.get(f.name, int)(line[f.name]) for f in fields(Point)})
        for line in lines
        if all(line.get(name) == value for name, value in about.items() if name != "commit")
    ]


def _same(one: Point, other: Point) -> bool:
    """Whether both are the same point, whatever was measured there."""
    return replace(one, ms=0, mib=0) == replace(other, ms=0, mib=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--csv",
        type=target_file,
        metavar="FILE",
        help="write the points to this file; those that are in it are not measured again",
    )
    parser.add_argument("--plot", type=target_file, metavar="FILE.png", help="draw them")
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps a point (default: 3 on a CPU, 20 on a GPU)")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that everything works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    steps = args.steps or (20 if device.type == "cuda" else 3)
    measured = []
    about = about_machine(device, math.nan) | {"precision": resolve("auto", device)}
    del about[SPEED]
    kept = read_csv(args.csv, about) if args.csv is not None else []
    for point, changes in points(device.type, args.tiny):
        known = [one for one in kept if _same(one, point)]
        if known:
            measured += known[:1]
            continue
        print(
            f"stage {point.stage}: {point.batch} images, {point.tokens} tokens, {point.slots} slots",
            file=sys.stderr,
            flush=True,
        )
        measured.append(measure(point, changes, device, steps, args.tiny))
        if args.csv is not None:
            # With what is still to come from the file: a run that is cut off loses nothing.
            write_csv(args.csv, measured + [one for one in kept if not any(_same(one, m) for m in measured)], about)
    print(table(measured))
    where = about["device"] if about["device"] != "cpu" else f"{about['cpu']}, {about['cores']} cores"
    where += f", {about['precision']}, torch {about['torch']}, {about['date']}"
    print(f"\nMedians of {steps} steps on {where}.")
    if args.plot is not None:
        plot(measured, args.plot, f"a training step, features cached; {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
