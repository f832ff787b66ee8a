"""Segments folders of growing size in a process each: images/s and where the time goes, and that memory does not grow.

python bench/segment_folder.py RUN [--images 1000 10000 100000] [--size 640 480] [--kill]

The images are 64 generated scenes as JPEGs of that size, linked under as many names. Label maps, COCO's format and all
slots are written. With --kill the largest call is killed (SIGKILL) when half of its images are recorded, and resumed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from harness.machine import cores, cpu_name
from PIL import Image

from spot_fast.data import Scenes
from spot_fast.segmentation import record

_DIFFERENT = 64
_SPEED = re.compile(r"([\d.]+) images/s \(an image: ([\d.]+) ms reading, ([\d.]+) ms model, ([\d.]+) ms masks")


def folder_of(root: Path, count: int, size: tuple[int, int]) -> Path:
    """A folder of so many JPEGs of (width, height) `size`, in folders of a thousand."""
    folder = root / "images"
    originals = root / "originals"
    if not originals.is_dir():
        originals.mkdir()
        for index, pixels in enumerate(Scenes(_DIFFERENT, "val", size=96).images):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
            image.save(originals / f"{index}.jpg", quality=90)
    for index in range(count):
        path = folder / f"{index // 1000:03}" / f"{index:06}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(originals / f"{index % _DIFFERENT}.jpg", path)
    return folder


def segment(run: Path, folder: Path, out: Path, kill_at: int = 0) -> tuple[float, str, int]:
    """Seconds, output and largest resident memory in MB of a call; kill_at: images after which it is killed."""
    command = [sys.executable, "-m", "spot_fast.segment", folder, "--run", run, "--out", out, "--resume"]
    command += ["--masks", "decoder", "--no-overlay"]
    command += ["--coco", out / "all.json", "--slots-file", out / "slots.safetensors"]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if kill_at:
        lines = out / record.NAME
        while _runs(process) and not (lines.exists() and _lines(lines) >= kill_at):
            time.sleep(1)
        process.send_signal(signal.SIGKILL)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status and not kill_at:
        raise SystemExit(f"segment ended with {os.waitstatus_to_exitcode(status)}: {output}")
    return time.perf_counter() - start, output, usage.ru_maxrss // 1024


def _runs(process: subprocess.Popen) -> bool:
    """Whether it has not ended; unlike `poll` this leaves its memory to `wait4`."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=lambda name: Path(name).resolve(), metavar="RUN")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000, 100000], metavar="N")
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], metavar=("W", "H"))
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    print(f"{cpu_name()}, {cores()} cores; {args.size[0]} x {args.size[1]} JPEGs")
    print("  images   images/s   ms reading   ms model   ms masks and files   peak memory, MB")
    with tempfile.TemporaryDirectory() as root:
        for count in sorted(args.images):
            folder, out = folder_of(Path(root), count, tuple(args.size)), Path(root) / f"out_{count}"
            if args.kill and count == max(args.images):
                seconds, _, memory = segment(args.run, folder, out, kill_at=count // 2)
                lines = _lines(out / record.NAME)
                print(f"{count:>8}   killed after {seconds:.0f} s with {lines} recorded, {memory} MB", flush=True)
            seconds, output, memory = segment(args.run, folder, out)
            cells = _SPEED.search(output).groups()
            print(f"{count:>8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (11, 13, 11, 21), strict=True)), end="")
            print(f"{memory:>19}   {seconds:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
