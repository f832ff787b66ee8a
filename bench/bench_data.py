"""Data, from files to scores: loaders, caches and metrics, each with its speed and what it differs by.

    python bench/bench_data.py [--images 256] [--rounds 5] [--csv PATH] [--tiny] [--device cpu]
    pytest bench/bench_data.py --benchmark-only

The command prints the tables of loader_speed.py, cache_speed.py and evaluation_speed.py and writes their rows to a CSV;
exit code 1 where results differ by more than they may. Under pytest the same is timed in small.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import cache_speed
import evaluation_speed
import loader_speed
from harness.machine import commit, cores, cpu_name, gpu_name
from harness.tables import slug
from harness.targets import target_csv

from spot_fast.data import Folder
from spot_fast.files import atomic_write
from spot_fast.precision import resolve

# What pixels of DALI and Pillow may differ by, in levels of 255 (largest, mean; measured: dali_loader.py), what scores
# may by rounding, and what the published protocol's metrics may take.
PIXELS = (12, 0.5)
SCORES = 1e-9
METRICS_MS = 10.0
# On a GPU: a pixel in ten thousand may fall to another of two equal masks, and COCO val's 5,000 may take 20 s.
GPU_SCORES, COCO_VAL, COCO_SECONDS = 1e-3, 5000, 20.0
# Images/s that training without caches asks for: 64 images a step of 11 ms in stage 1, of 18 ms in stage 2.
APPETITE = {"stage 1": 64 / 0.011, "stage 2": 64 / 0.018}
_COLUMNS = (
    "part",
    "name",
    "cores",
    "value",
    "unit",
    "reference",
    "times",
    "difference",
    "date",
    "cpu",
    "accelerator",
    "torch",
    "commit",
)


def rows(images: int, rounds: int, device: torch.device, encoder: str) -> tuple[list[dict], str, list[str]]:
    """(rows of the CSV, tables as text, sentences about what is not as it should be)."""
    wrong = []
    threads = sorted({1, cores()})
    loaded = loader_speed.run(images, threads, rounds)
    found = [
        dict(
            part="loader",
            name=row["name"],
            cores=row["cores"],
            value=row["images_s"],
            unit="images/s",
            reference="Pillow, threads",
            difference=f"{row['max']} levels, mean {row['mean']:.3f}",
        )
        for row in loaded
    ]
    wrong += [
        f"{row['name']}: pixels differ by {row['max']} levels, {row['mean']:.3f} on average"
        for row in loaded
        if row["max"] > PIXELS[0] or row["mean"] > PIXELS[1]
    ]
    cached = cache_speed.run(images, rounds, encoder, device)
    found += [
        dict(
            part="cache",
            name=row["name"],
            cores=torch.get_num_threads(),
            value=row["images_s"],
            unit="images/s",
            reference=row["reference"],
            times=row["times"],
            difference=row["difference"],
        )
        for row in cached
    ]
    wrong += [
        f"{row['name']}: differs from {row['reference']} by {row['difference']:g}"
        for row in cached
        if row["difference"]
    ]
    torch.set_num_threads(1)
    scored = evaluation_speed.measure(evaluation_speed.generated(64, size=320, masks=7, grid=14), rounds)
    found.append(
        dict(
            part="metrics",
            name="decoder and slot masks",
            cores=1,
            value=scored.ours_ms,
            unit="ms an image",
            reference="one-hot maps",
            times=scored.ratio,
            difference=scored.difference,
        )
    )
    wrong += [f"metrics: scores differ by {scored.difference:.1e}"] * (scored.difference > SCORES)
    wrong += [f"metrics take {scored.ours_ms:.1f} ms an image, more than {METRICS_MS:g}"] * (
        scored.ours_ms > METRICS_MS
    )
    text = [
        loader_speed.table(loaded),
        "",
        *_appetite(loaded),
        cache_speed.table(cached),
        "",
        f"metrics of 64 images, 320 x 320, 7 masks, both kinds, one core: {scored.ours_ms:.2f} ms an image; "
        f"one-hot maps {scored.per_mask_ms:.1f} ms, {scored.ratio:.0f} times as long; scores differ by "
        f"{scored.difference:.1e}",
    ]
    if device.type == "cuda":
        there = evaluation_speed.on_device(evaluation_speed.generated(256, size=320, masks=7, grid=14), device, rounds)
        seconds = COCO_VAL * there.ours_ms / 1000
        found.append(
            dict(
                part="metrics",
                name="the same on the GPU",
                cores=1,
                value=there.ours_ms,
                unit="ms an image",
                reference="a CPU core",
                difference=there.difference,
            )
        )
        text.append(
            f"on the GPU {there.ours_ms:.2f} ms an image, {seconds:.1f} s for COCO's {COCO_VAL:,}; scores "
            f"differ by {there.difference:.1e}"
        )
        wrong += [f"metrics on the GPU: scores differ by {there.difference:.1e}"] * (there.difference > GPU_SCORES)
        wrong += [f"COCO's {COCO_VAL:,} images take {seconds:.0f} s, more than {COCO_SECONDS:g}"] * (
            seconds > COCO_SECONDS
        )
    return found, "\n".join(text), wrong


def _appetite(loaded: Sequence[dict]) -> list[str]:
    """DALI on a GPU beside what training asks for."""
    rates = [row["images_s"] for row in loaded if row["name"] == "DALI, GPU"]
    return (
        [
            f"DALI on the GPU gives {rates[0] / wanted:.2f} times what {stage} without caches asks for at its aim "
            f"({wanted:,.0f} images/s)"
            for stage, wanted in APPETITE.items()
        ]
        + [""]
        if rates
        else []
    )


def write(path: Path, found: Sequence[dict]) -> Path:
    """The rows as CSV; `path` is the file, or a folder for one that is named after processor or GPU and day."""
    gpu = gpu_name() if torch.cuda.is_available() else ""
    about = dict(date=f"{date.today()}", cpu=cpu_name(), accelerator=gpu, torch=torch.__version__, commit=commit())
    if path.suffix != ".csv":
        path = path / f"data_{slug(gpu or 'cpu')}_{about['date']}.csv"

    def rows_to(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS, restval="")
            writer.writeheader()
            for row in found:
                numbers = {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
                writer.writerow(row | numbers | about)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, rows_to)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=256, metavar="N", help="JPEGs to make (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each, medians count (default: 5)")
    parser.add_argument(
        "--encoder",
        default=cache_speed.ENCODER,
        metavar="NAME",
        help=f"whose features are cached, timm's name (default: {cache_speed.ENCODER})",
    )
    parser.add_argument("--csv", type=target_csv, metavar="PATH", help="write the rows to this file or folder")
    parser.add_argument("--tiny", action="store_true", help="64 images, one round: to see that everything works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the features")
    args = parser.parse_args(argv)
    if args.tiny:
        args.images, args.rounds, args.encoder = 64, 1, "vit_tiny_patch16_224"
    found, text, wrong = rows(args.images, args.rounds, torch.device(args.device), args.encoder)
    precision = resolve("auto", torch.device(args.device))
    where = f", {gpu_name()}" if torch.cuda.is_available() else ""
    print(
        f"{cpu_name()}, {cores()} cores{where}, torch {torch.__version__}, commit {commit()}; {args.images} JPEGs of "
        f"640 x 480, features of {args.encoder} in {precision}, medians of {args.rounds}\n\n{text}"
    )
    if args.csv:
        print(f"written to {write(args.csv, found)}")
    print("\n".join(f"WRONG  {sentence}" for sentence in wrong) or "nothing differs by more than it may")
    return 1 if wrong else 0


# ---- the same under pytest, in small


@pytest.fixture(scope="module")
def photos(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("photos")
    loader_speed.make_photos(folder, *((32, 96, 72) if request.config.getoption("--tiny") else (64,)))
    return Folder(folder, image_size=224, flip=True)


@pytest.mark.parametrize("name", ["Pillow, threads", "DALI, CPU"])
def test_decoding(benchmark, photos, name):
    found = loader_speed.loaders(photos, 2)
    if name not in found:
        pytest.skip("DALI is not installed")
    largest, mean = loader_speed.difference(found[name], found["Pillow, threads"])
    assert largest <= PIXELS[0] and mean <= PIXELS[1]
    benchmark.group = f"an epoch of {len(photos)} JPEGs"
    benchmark.pedantic(lambda: loader_speed.rate(found[name], 1), rounds=3)


@pytest.fixture(scope="module")
def sources(photos, tmp_path_factory):
    return cache_speed.sources(
        photos, tmp_path_factory.mktemp("cache"), workers=2, encoder="vit_tiny_patch16_224", device=torch.device("cpu")
    )


@pytest.mark.parametrize("name", list(cache_speed.REFERENCES))
def test_caches(benchmark, sources, name):
    assert cache_speed.difference(sources[name](0), sources[cache_speed.REFERENCES[name]](0)) == 0
    benchmark.group = "an epoch from a cache"
    benchmark.pedantic(lambda: cache_speed.rate(sources[name](1)), rounds=5)


@pytest.mark.parametrize("name", ["ours", "per_mask"])
def test_metrics(benchmark, name):
    given = evaluation_speed.generated(8, size=320, masks=7, grid=14)
    difference = (evaluation_speed.ours(given) - evaluation_speed.per_mask(given)).nan_to_num().abs().max()
    assert difference <= SCORES
    benchmark.group = "metrics of 8 images, both kinds of masks"
    benchmark.pedantic(lambda: getattr(evaluation_speed, name)(given), rounds=3)


if __name__ == "__main__":
    sys.exit(main())
