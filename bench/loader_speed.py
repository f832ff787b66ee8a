"""Decoded training images a second: Pillow in threads, Pillow in processes, DALI; with the pixels' difference.

    python bench/loader_speed.py [--images 256] [--threads 1 2] [--rounds 5] [--photos FOLDER] [--crop center|stretch]
    python bench/loader_speed.py --photos FOLDER --encoder NAME --encoder-weights FILE
                                 [--crop center]

Each number of threads is measured in a process of its own that may use as many cores and no others, so "a core" means
what it says. What is compared takes turns; the median round counts. Images are JPEGs of 640 x 480 with a photo's
spectrum, resized to 224, centre-cropped (or stretched, bicubically) and mirrored. DALI on a GPU has all cores that
this process has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.machine import cpu_name, gpu_name

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data import Folder, Loader
from spot_fast.data.loading import loader as loader_module
from spot_fast.data.loading.dali_loader import DaliLoader
from spot_fast.data.loading.dali_pipeline import unavailable
from spot_fast.model.encoder import Encoder, normalise
from spot_fast.model.vits import SCENES_ENCODER

BATCH, SIZE = 32, 224


def make_photos(folder: Path, count: int, width: int = 640, height: int = 480, quality: int = 90) -> None:
    """JPEGs of noise whose amplitude falls with the frequency, as that of photos does; colours fall faster."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency = np.maximum(frequency, 1 / max(width, height))

    def noise(power: float, deviation: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * rng.random((height, width)))
        values = np.fft.ifft2(frequency**-power * phase).real
        return values * (deviation / values.std())

    for number in range(count):
        grey, red, blue = 128 + noise(1.2, 50), noise(1.5, 15), noise(1.5, 15)
        pixels = np.stack([grey + red, grey, grey + blue], -1).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=quality)


def pin(count: int) -> int:
    """Leaves this process, and what it starts, `count` of its cores, or as many as there are."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    return len(cores)


class ProcessLoader(Loader):
    """Workers are processes, however few."""

    def _stacked(self, epoch, steps):
        return self._by_processes(epoch, steps)


def loaders(images: Folder, threads: int) -> dict[str, Loader]:
    """What is compared, by its name in the table; the first is the reference for pixels."""
    found = {
        "Pillow, threads": Loader(images, BATCH, workers=min(threads, loader_module.MAX_THREADS)),
        "Pillow, processes": ProcessLoader(images, BATCH, workers=threads),
    }
    if not unavailable(torch.device("cpu")):
        found["DALI, CPU"] = DaliLoader(images, BATCH, workers=threads, device="cpu")
    return found


def gpu_loaders(images: Folder, threads: int) -> dict[str, Loader]:
    """Pillow for reference, and DALI decoding on the GPU."""
    device = torch.device("cuda")
    return {
        "Pillow, processes": ProcessLoader(images, BATCH, workers=threads),
        "DALI, GPU": DaliLoader(images, BATCH, workers=threads, device=device),
    }


def rate(loader: Loader, epoch: int) -> float:
    """Images/s of a whole epoch, on the device."""
    begin, count = time.perf_counter(), 0
    for batch in loader.epoch(epoch):
        count += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def difference(loader: Loader, reference: Loader) -> tuple[int, float]:
    """(largest, mean) difference of the same epoch's pixels, in levels of 255."""
    largest, means = 0, []
    for one, other in zip(loader.epoch(0), reference.epoch(0), strict=True):
        if not torch.equal(one.indices, other.indices):
            raise AssertionError("the loaders do not agree on the order of images")
        apart = (one.images.cpu().int() - other.images.int()).abs()
        largest, means = max(largest, int(apart.max())), [*means, float(apart.float().mean())]
    return largest, statistics.fmean(means)


def measure(compared: dict[str, Loader], images: Folder, rounds: int, cores: int) -> list[dict]:
    """A row for each loader: name, cores, images_s (median round), max and mean (pixels)."""
    reference = Loader(images, BATCH)
    apart = {name: difference(loader, reference) for name, loader in compared.items()}  # warms everything up as well
    rates = {name: [] for name in compared}
    for epoch in range(1, rounds + 1):
        for name, loader in compared.items():
            rates[name].append(rate(loader, epoch))
    return [
        dict(name=name, cores=cores, images_s=statistics.median(rates[name]), max=apart[name][0], mean=apart[name][1])
        for name in compared
    ]


@torch.no_grad()
def feature_errors(images: Folder, encoder: Encoder) -> list[float]:
    """Relative differences of an image's features, DALI's against Pillow's, as norms, by image."""
    errors = []
    loaded = (DaliLoader(images, BATCH, workers=1, device="cpu"), Loader(images, BATCH))
    for one, other in zip(*(loader.epoch(0) for loader in loaded), strict=True):
        found, expected = (encoder(normalise(batch.images)) for batch in (one, other))
        errors += ((found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).tolist()
    return errors


def table(rows: list[dict]) -> str:
    lines = ["| decoded by | cores | images/s | images/s a core | pixels, max | pixels, mean |", "|---" * 6 + "|"]
    for row in rows:
        per_core = f"{row['images_s'] / row['cores']:.0f}"
        lines.append(
            f"| {row['name']} | {row['cores']} | {row['images_s']:.0f} | {per_core} | {row['max']} | "
            f"{row['mean']:.3f} |"
        )
    return "\n".join(lines)


def run(
    count: int, threads: Sequence[int], rounds: int, photos: Path | None = None, crop: str = "center"
) -> list[dict]:
    """Rows for `count` generated images, or the first of `photos`: a process for each number of threads, and one for
    the GPU where DALI runs on one."""
    with tempfile.TemporaryDirectory() as made:
        if photos is None:
            photos = Path(made)
            make_photos(photos, count)
        jobs = [("cpu", number) for number in threads]
        if torch.cuda.is_available() and not unavailable(torch.device("cuda")):
            jobs.append(("gpu", len(os.sched_getaffinity(0))))
        rows = []
        for kind, number in jobs:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--rows",
                kind,
                "--threads",
                str(number),
                "--photos",
                str(photos),
                "--images",
                str(count),
                "--rounds",
                str(rounds),
                "--crop",
                crop,
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows += json.loads(output.strip().splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="how many JPEGs to make, or to use of --photos")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="cores, and threads or processes")
    parser.add_argument("--rounds", type=int, default=5, help="epochs measured of each")
    parser.add_argument("--photos", type=Path, help="a folder of images to use instead of generated ones")
    parser.add_argument("--crop", choices=("center", "stretch"), default="center", help="stretch is bicubic, as MOVi's")
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="say instead how far its features of DALI's pixels are from "
        "those of Pillow's: a ViT by timm's name, or spot_scenes",
    )
    parser.add_argument("--encoder-weights", metavar="FILE", help="its weights (spot_scenes has its own)")
    parser.add_argument("--rows", choices=("cpu", "gpu"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        cores = pin(arguments.threads[0])
        images = Folder(arguments.photos, image_size=SIZE, crop=arguments.crop, flip=True, limit=arguments.images)
        compared = (gpu_loaders if arguments.rows == "gpu" else loaders)(images, cores)
        print(json.dumps(measure(compared, images, arguments.rounds, cores)))
        return
    if arguments.encoder:
        if arguments.photos is None:
            parser.error("--encoder needs --photos FOLDER")
        config = preset(
            "scenes" if arguments.encoder == SCENES_ENCODER else "coco",
            encoder=arguments.encoder,
            encoder_weights=arguments.encoder_weights,
        )
        images = Folder(arguments.photos, image_size=config.image_size, crop=arguments.crop, limit=arguments.images)
        errors = feature_errors(images, frozen_encoder(config))
        print(
            f"{len(errors)} photos at {config.image_size} px, {arguments.encoder}: features differ by "
            f"{statistics.fmean(errors):.2%} of their norm, {max(errors):.2%} at most"
        )
        return
    rows = run(arguments.images, arguments.threads, arguments.rounds, arguments.photos, arguments.crop)
    print(table(rows))
    sizes = "photos" if arguments.photos else "JPEGs of 640 x 480, quality 90"
    device = f", {gpu_name()}" if torch.cuda.is_available() else ""
    print(f"\n{arguments.images} {sizes}; median of {arguments.rounds} rounds on {cpu_name()}{device}")


if __name__ == "__main__":
    main()
