"""Where threads that decode images end: images/s by their number, with as many cores as there are threads.

    python bench/loader_lock.py [--threads 1 4 8 16 32] [--images 256] [--rounds 3]

Pillow releases the interpreter lock while it decodes and resizes; everything else of an image happens under it, one
thread at a time. Here what releases the lock is replaced by a pause of the length that it has alone on one core, so
that a machine of few cores shows what one of many would give. "cores could" is what that many decode without a lock.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from loader_speed import make_photos, pin, rate
from machine import cpu_name

from spot_fast.data import Folder, Loader
from spot_fast.data.decoding import opening, transforms
from spot_fast.data.loading import loader as loader_module

SIZE, BATCH = 224, 32


def alone(images: Folder) -> tuple[float, float, float]:
    """Seconds of an image on one core: all of it, decoding, resizing."""
    begin = time.perf_counter()
    for index in range(len(images)):
        images.prepared(index)
    whole = (time.perf_counter() - begin) / len(images)
    decoding = resizing = 0.0
    for index in range(len(images)):
        image = Image.open(io.BytesIO(images.encoded(index)))  # the header, under the lock
        start = time.perf_counter()
        image.load()
        middle = time.perf_counter()
        transforms.resize_minor(image, SIZE)
        decoding, resizing = decoding + middle - start, resizing + time.perf_counter() - middle
    return whole, decoding / len(images), resizing / len(images)


class Paused:
    """Inside, decoding and resizing are pauses of the given seconds; one image's pixels stand for all."""

    def __init__(self, images: Folder, decoding: float, resizing: float) -> None:
        self.decoding, self.resizing = decoding, resizing
        self.decoded = images.rgb(0)
        self.resized = transforms.resize_minor(self.decoded, SIZE)
        self.kept = opening.open_rgb, transforms.resize_minor

    def _open(self, path: Path, encoded: bytes, *, upright: bool = False) -> Image.Image:
        Image.open(io.BytesIO(encoded))
        time.sleep(self.decoding)
        return self.decoded

    def _resize(self, image: Image.Image, size: int) -> Image.Image:
        time.sleep(self.resizing)
        return self.resized

    def __enter__(self) -> None:
        opening.open_rgb, transforms.resize_minor = self._open, self._resize

    def __exit__(self, *exception: object) -> None:
        opening.open_rgb, transforms.resize_minor = self.kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--images", type=int, default=256, metavar="N", help="JPEGs of 640 x 480 (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="epochs of each (default: 3)")
    args = parser.parse_args()
    loader_module.MAX_THREADS = max(args.threads)  # no processes
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), args.images)
        images = Folder(folder, image_size=SIZE)
        cores = pin(10**6)
        whole, decoding, resizing = alone(images)
        print(
            f"{cpu_name()}, {cores} cores: an image takes {1e3 * whole:.2f} ms alone, "
            f"{1e3 * (whole - decoding - resizing):.2f} of them under the lock\n"
        )
        print("| threads | images/s | cores could |\n|---|---|---|")
        with Paused(images, decoding, resizing):
            for threads in args.threads:
                loader = Loader(images, BATCH, workers=threads)
                found = statistics.median(rate(loader, epoch) for epoch in range(args.rounds))
                print(f"| {threads} | {found:,.0f} | {threads / whole:,.0f} |")


if __name__ == "__main__":
    main()
