"""Seconds that it takes to know whether a large set's files are those that were cached (`data/listing/identity.py`).

    python bench/studies/cache_key.py [--files 118287] [--folder DIR]

Without a folder, files of 200 random bytes are made in a temporary one: COCO train2017 has 118,287. Compared are name,
size and modification time, which identify no file; what is in the key; and the first 4 kB of every file. The median of
five rounds counts, and the first says what a set costs that the system has not looked at yet, where that is so.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.machine import cpu_name

from spot_fast.data.listing.identity import Files

ROUNDS = 5


def names_and_times(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def first_bytes(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            digest.update(file.read(4096))
    return digest.hexdigest()


METHODS: dict[str, Callable[[Sequence[Path]], str]] = {
    "what is in the key": lambda paths: Files(paths).key,
    "name, size, modification time": names_and_times,
    "first 4 kB of every file": first_bytes,
}


def measure(paths: Sequence[Path]) -> dict[str, list[float]]:
    """Seconds of each method, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(ROUNDS):
        for name, method in METHODS.items():
            begin = time.perf_counter()
            method(paths)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=118_287, metavar="N", help="files to make (default: 118287)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="take the files of this folder instead")
    args = parser.parse_args(argv)
    if args.files < 1:
        parser.error(f"--files {args.files}: use 1 or more")
    if args.folder is not None and not (args.folder.is_dir() and any(path.is_file() for path in args.folder.iterdir())):
        parser.error(f"--folder {args.folder} is no folder with files in it: name that of a set's images")
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            for number in range(args.files):
                (Path(made) / f"{number:012d}.jpg").write_bytes(os.urandom(200))
            time.sleep(2)  # the key waits for files that were just written
        paths = sorted(path for path in Path(args.folder or made).iterdir() if path.is_file())
        seconds = measure(paths)
    print(f"| {len(paths):,} files | first round, s | median, s |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {values[0]:.2f} | {statistics.median(values):.2f} |")
    print(f"\n{ROUNDS} rounds on {cpu_name()}")


if __name__ == "__main__":
    main()
