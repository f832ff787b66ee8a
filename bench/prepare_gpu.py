"""Packs what the photo benchmark needs into a small folder for a GPU machine without a network.

    python bench/prepare_gpu.py --photos ROOT --encoder-weights FILE [--out .gpu]
    python bench/prepare_gpu.py --dali [--out .gpu]

Parts, because a transfer to such a machine has a size limit; each is meant for one transfer:

    .gpu/base    encoder.safetensors in float16, wheels of what that machine lacks (pycocotools)
    .gpu/photos  COCO layout: images as the encoder sees them, 224 x 224 after resizing and centre crop, WebP; the
                 masks of the validation images unchanged
    .gpu/dali-*  the wheels of DALI and what it needs, one archive cut into pieces

Masks stay at the size of the original photos: they are compared on their own square, so label maps are bit for bit
those of ROOT (checked), while images differ by their compression alone. The folder ignores itself in git. For
measuring only: do not publish it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness.tables import BenchError
from PIL import Image
from safetensors.torch import load_file, save_file

from spot_fast.data.datasets.coco import Coco
from spot_fast.errors import UserError

_SIZE = 224
_MIB = 2**20
_DALI = "nvidia-dali-cuda130"
# pip's names for the GPU machine: CPython 3.12 on x86-64 Linux.
_PLATFORM = (
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    "--platform",
    "manylinux_2_28_x86_64",
    "--platform",
    "manylinux_2_17_x86_64",
    "--platform",
    "manylinux2014_x86_64",
)


def pack_weights(source: Path, target: Path) -> float:
    """Float16 copy of a safetensors file; returns the largest change relative to each tensor's largest value."""
    worst, packed = 0.0, {}
    for name, value in load_file(source).items():
        packed[name] = value.to(torch.float16) if value.is_floating_point() else value
        if not packed[name].isfinite().all():
            raise BenchError(f"{source}: {name} does not fit float16")
        worst = max(worst, ((packed[name].float() - value.float()).abs().max() / value.abs().max().float()).item())
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed, target)
    return worst


def pack_photos(root: Path, target: Path, *, train: int, val: int, quality: int, limit: int) -> dict[str, int]:
    """Images of both splits below `target`, validation first, then as much training as `limit` bytes hold (at most
    `train`; 0 = all). Returns how many of each; BenchError where not even the validation images fit."""
    taken, used = {}, 0
    (target / "annotations").mkdir(parents=True)
    for split, wanted in (("val", val), ("train", train)):
        photos = Coco(root, split, image_size=_SIZE, limit=wanted)
        content = json.loads(photos.annotation_file.read_text(encoding="utf-8"))
        folder = target / f"{split}2017"
        folder.mkdir()
        images = []
        for index, entry in zip(range(len(photos)), content["images"], strict=False):
            file = folder / f"{Path(entry['file_name']).stem}.webp"
            photo = Image.fromarray(photos.val_image(index).permute(1, 2, 0).numpy())
            photo.save(file, quality=quality, method=6)
            used += file.stat().st_size
            if used > limit:
                file.unlink()
                break
            images.append({**entry, "file_name": file.name})
        if not images or (split == "val" and len(images) < len(photos)):
            raise BenchError(f"the {split} images need more than --limit {limit / _MIB:g}: lower --val or --quality")
        ids = {image["id"] for image in images}
        # Training needs no masks.
        masks = [a for a in content["annotations"] if a["image_id"] in ids] if split == "val" else []
        text = json.dumps(
            {"images": images, "annotations": masks, "categories": content.get("categories", [])}, separators=(",", ":")
        )
        (target / "annotations" / f"instances_{split}2017.json").write_text(text, encoding="utf-8")
        used, taken[split] = used + len(text), len(images)
    return taken


def check_photos(root: Path, target: Path) -> float:
    """Compares the packed validation set with the original: maps have to be equal; returns the images' mean
    absolute difference in grey levels."""
    packed = Coco(target, "val", image_size=_SIZE)
    photos = Coco(root, "val", image_size=_SIZE, limit=len(packed))
    total = 0.0
    for index in range(len(packed)):
        ours, theirs = packed.val_masks(index), photos.val_masks(index)
        for name in ("instances", "classes", "ignore"):
            if not torch.equal(getattr(ours, name), getattr(theirs, name)):
                raise BenchError(f"{packed.label(index)}: the packed {name} map differs from the original's")
        total += (packed.val_image(index).float() - photos.val_image(index).float()).abs().mean().item()
    return total / len(packed)


def fetch_wheels(target: Path) -> None:
    """What the tests and the COCO reader need and the GPU machine has not."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        *_PLATFORM,
        "-d",
        str(target),
        "pycocotools",
    ]
    if subprocess.run(command).returncode:
        raise BenchError("pip could not fetch pycocotools: use --no-wheels if the GPU machine has it")


def pack_dali(out: Path, piece: int) -> list[Path]:
    """Wheels of DALI and its requirements as one tar archive in pieces of at most `piece` bytes; returns the folders,
    dali-1-of-N to dali-N-of-N."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--only-binary=:all:",
            *_PLATFORM,
            "-d",
            folder,
            _DALI,
        ]
        if subprocess.run(command).returncode:
            raise BenchError(f"pip could not fetch {_DALI}")
        archive = Path(folder) / "dali.tar"
        with tarfile.open(archive, "w") as tar:
            for wheel in sorted(Path(folder).glob("*.whl")):
                # That machine has NumPy and all of CUDA that PyTorch needs.
                if not wheel.name.startswith(("numpy-", "typing_extensions-")):
                    tar.add(wheel, wheel.name)
        pieces = math.ceil(archive.stat().st_size / piece)
        folders = [out / f"dali-{number}-of-{pieces}" for number in range(1, pieces + 1)]
        with open(archive, "rb") as source:
            for target in folders:
                target.mkdir(parents=True)
                (target / "piece").write_bytes(source.read(piece))
    return folders


def _base_and_photos(args: argparse.Namespace) -> list[Path]:
    base, photos = args.out / "base", args.out / "photos"
    for folder in (base, photos):
        shutil.rmtree(folder, ignore_errors=True)
    worst = pack_weights(args.encoder_weights, base / "encoder.safetensors")
    print(f"{base}: weights in float16, changed by at most {worst:.1e} of a tensor's largest value")
    if not args.no_wheels:
        fetch_wheels(base / "wheels")
    partial = args.out / "photos.partial"
    shutil.rmtree(partial, ignore_errors=True)
    taken = pack_photos(
        args.photos, partial, train=args.train, val=args.val, quality=args.quality, limit=int(args.limit * _MIB)
    )
    difference = check_photos(args.photos, partial)
    partial.rename(photos)
    print(f"{photos}: {taken['train']} + {taken['val']} images, {difference:.2f} grey levels off; maps are equal")
    print(
        f"on the GPU machine, each in a call of its own that carries the folder named:\n"
        f"  {base}:  bash bench/gpu_check.sh scenes\n  {photos}:  bash bench/gpu_check.sh photos\n"
        f"  (none):  bash bench/gpu_check.sh photos      until it says that all runs are done"
    )
    return [base, photos]


def _dali(args: argparse.Namespace) -> list[Path]:
    for folder in args.out.glob("dali-*-of-*"):
        shutil.rmtree(folder)
    folders = pack_dali(args.out, int(args.limit * _MIB))
    print(
        "on the GPU machine, one call for each of these folders, which carries it, shortly after one another:\n"
        "  bash bench/gpu_check.sh decoding  measures when the last piece has come"
    )
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photos", type=Path, metavar="ROOT", help="folder in COCO layout")
    parser.add_argument("--encoder-weights", type=Path, metavar="FILE")
    parser.add_argument("--dali", action="store_true", help="pack DALI's wheels")
    parser.add_argument("--out", type=Path, default=Path(".gpu"), metavar="DIR", help="default: .gpu")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="at most so many (default: all that fit)")
    parser.add_argument("--val", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of WebP (default: 90)")
    parser.add_argument(
        "--limit",
        type=float,
        default=44,
        metavar="MIB",
        help="size of the photos, and of a piece of DALI (default: 44 MiB)",
    )
    parser.add_argument("--no-wheels", action="store_true", help="do not fetch pycocotools")
    args = parser.parse_args(argv)
    photos = args.photos is not None and args.encoder_weights is not None
    if not photos and (not args.dali or args.photos or args.encoder_weights):
        parser.error("nothing to pack: give --photos ROOT and --encoder-weights FILE, or --dali, or all of them")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ".gitignore").write_text("*\n", encoding="utf-8")
    folders = (_base_and_photos(args) if photos else []) + (_dali(args) if args.dali else [])
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{size / _MIB:6.1f} MiB  {folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
