"""Training batches a second from files, from the pixel cache and from the feature cache; with their difference.

    python bench/cache_speed.py [--images 256] [--rounds 5] [--encoder NAME] [--device cpu]

JPEGs of 640 x 480 as in loader_speed.py, to squares of 224, mirrored or not; features are those of a ViT with random
weights, in bfloat16 where the device multiplies it in hardware, else in float32. What is compared takes turns; the
median round counts. Caches are read as a second run of `spot_fast.train` reads them: from the disk's cache in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.machine import cpu_name
from loader_speed import make_photos

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data import Folder, Loader
from spot_fast.data.caching import (
    feature_cache,
    pixel_cache,
)
from spot_fast.model.encoder import normalise
from spot_fast.precision import autocast, resolve

BATCH = 32
ENCODER = "vit_small_patch16_224"
# An epoch of it: the tensors of each batch.
Epoch = Callable[[int], Iterator[tuple[Tensor, ...]]]


def sources(images: Folder, folder: Path, *, workers: int, encoder: str, device: torch.device) -> dict[str, Epoch]:
    """What is compared, by name; caches are built below `folder`."""
    files = Loader(images, BATCH, workers=workers)
    store = pixel_cache.store_of(images, folder)
    pixel_cache.build(files, store, progress=False)
    pixels = Loader(pixel_cache.CachedPixels(images, store), BATCH)
    vit = frozen_encoder(preset("coco", encoder=encoder, encoder_weights="none")).to(device)

    precision = resolve("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @torch.no_grad()
    def function(squares: Tensor) -> tuple[Tensor]:
        with autocast(precision, device):
            return (vit(normalise(squares.to(device))).to(dtype),)

    fields = [feature_cache.Field("target", (vit.num_tokens, vit.dim), dtype, vit.weights_hash())]
    stores = feature_cache.stores_of(images, fields, folder)
    feature_cache.build(pixels, function, stores, progress=False)
    on_disk, held = (feature_cache.opened(pixels, fields, stores) for _ in range(2))
    held.hold(device)
    return {
        "files": lambda epoch: ((batch.images,) for batch in files.epoch(epoch)),
        "pixel cache": lambda epoch: ((batch.images,) for batch in pixels.epoch(epoch)),
        "features computed": lambda epoch: (function(batch.images) for batch in pixels.epoch(epoch)),
        "feature cache, disk": lambda epoch: (batch.features for batch in on_disk.epoch(pixels, epoch, 0, device)),
        "feature cache, memory": lambda epoch: (batch.features for batch in held.epoch(pixels, epoch, 0, device)),
    }


# What each is the same as, and may not differ from by a bit.
REFERENCES = {
    "pixel cache": "files",
    "feature cache, disk": "features computed",
    "feature cache, memory": "features computed",
}


def difference(one: Iterator[tuple[Tensor, ...]], other: Iterator[tuple[Tensor, ...]]) -> float:
    """The largest difference of two epochs."""
    return max(
        (a.double() - b.double()).abs().max().item()
        for batch, expected in zip(one, other, strict=True)
        for a, b in zip(batch, expected, strict=True)
    )


def rate(epoch: Iterator[tuple[Tensor, ...]]) -> float:
    """Images/s of an epoch."""
    begin, count = time.perf_counter(), 0
    for (tensor,) in epoch:
        count += len(tensor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def measure(epochs: dict[str, Epoch], rounds: int) -> list[dict]:
    """A row for each source: name, images_s (median round), reference, times (faster than that), difference."""
    apart = {name: difference(epochs[name](0), epochs[of](0)) for name, of in REFERENCES.items()}
    rates = {name: [] for name in epochs}
    for epoch in range(1, rounds + 1):
        for name, source in epochs.items():
            rates[name].append(rate(source(epoch)))
    rows = []
    for name, values in rates.items():
        of = REFERENCES.get(name, "")
        times = statistics.median(a / b for a, b in zip(values, rates[of], strict=True)) if of else None
        rows.append(
            dict(name=name, images_s=statistics.median(values), reference=of, times=times, difference=apart.get(name))
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| training batches from | images/s | times | than | largest difference |", "|---" * 5 + "|"]
    for row in rows:
        compared = ("", "", "")
        if row["reference"]:
            compared = f"{row['times']:.1f}", row["reference"], f"{row['difference']:g}"
        lines.append(f"| {row['name']} | {row['images_s']:,.0f} | " + " | ".join(compared) + " |")
    return "\n".join(lines)


def run(count: int, rounds: int, encoder: str, device: torch.device) -> list[dict]:
    """Rows for `count` generated images in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        make_photos(photos, count)
        images = Folder(photos, image_size=224, flip=True)
        epochs = sources(
            images, Path(folder) / "cache", workers=torch.get_num_threads(), encoder=encoder, device=device
        )
        return measure(epochs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, metavar="N", help="JPEGs to make (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="epochs of each (default: 5)")
    parser.add_argument("--encoder", default=ENCODER, metavar="NAME", help=f"timm's name (default: {ENCODER})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = run(args.images, args.rounds, args.encoder, torch.device(args.device))
    print(table(rows))
    print(
        f"\n{args.images} JPEGs of 640 x 480, quality 90; {args.encoder}; median of {args.rounds} rounds on "
        f"{cpu_name()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
