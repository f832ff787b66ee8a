"""What it costs and brings to see images in their own shape: `python -m spot_fast.segment --fit` in numbers.

    python bench/segment_fits.py [--run RUN] [--images 200] [--scenes 100] [--threads 1]

Speed: generated images of 640 x 480 as JPEG files, read, segmented, drawn and written as the command does, without
the start of Python and the loading of the model; CPU time is that of all threads. Quality: generated scenes of 3 : 2
(the middle 64 rows of 96 x 96 pixels), the label map at their own size against exact masks: mBO_i and FG-ARI of the
first kind of masks in percent, and how many segments an image has. Without --run the masks are k-means clusters of the
packaged encoder's features.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from machine import cores, cpu_name

from spot_fast.data.datasets.scenes import draw_scenes
from spot_fast.evaluation.metrics import image_scores
from spot_fast.evaluation.scoring import WORKERS
from spot_fast.segmentation.batch import Wanted, images_of, segment_all
from spot_fast.segmentation.layouts import Fit, fit_of, windows_of
from spot_fast.segmentation.overlays import labels_at
from spot_fast.segmentation.segmenter import Masker, cluster_masker, run_masker
from spot_fast.segmentation.stitching import stitch

FITS = (("stretch", None), ("interpolate", 64), ("interpolate", 96), ("tiles", 64), ("tiles", 96))  # name, --size
WIDE, HIGH = 96, 64


def scenes(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first validation scenes [n, size, size, 3] and their instances [n, size, size]."""
    images, instances, _ = draw_scenes(0, 2 * np.arange(count) + 1, size)
    return images, instances


def speed(masker: Masker, fit: Fit, paths: list[Path], out: Path, overlay: bool) -> tuple[float, float]:
    """Images a second, and milliseconds of CPU time an image."""
    sources = images_of(paths, 0, masker.size, masker.identity)
    wanted = Wanted(out, masker.kinds, overlay)
    start, cpu = time.perf_counter(), time.process_time()
    segment_all(
        sources, [path.stem for path in paths], masker, fit, wanted, batch_size=16, workers=WORKERS, progress=False
    )
    return len(paths) / (time.perf_counter() - start), 1000 * (time.process_time() - cpu) / len(paths)


def quality(masker: Masker, fit: Fit, images: np.ndarray, instances: np.ndarray) -> tuple[float, float, float]:
    """mBO_i and FG-ARI in percent, segments an image."""
    kind, rows = masker.kinds[0], []
    for pixels, truth in zip(images, instances, strict=True):
        image = Image.fromarray(pixels)
        layout = fit(*image.size)
        found = masker.find(windows_of(image, layout, masker.patch)).masks
        masks = stitch(found, layout).masks[kind] if layout.tiled else found[kind][0]
        labels = torch.from_numpy(labels_at(masks, image.height, image.width, layout.grid))[None]
        scores = image_scores(labels, masks.shape[1], torch.from_numpy(truth.astype(np.int64))[None])
        rows.append([100 * float(scores["mbo_i"]), 100 * float(scores["fg_ari"]), len(labels.unique())])
    return tuple(np.nanmean(rows, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of preset scenes (default: clusters of the packaged encoder)")
    parser.add_argument("--images", type=int, default=200, help="for speed (default: 200)")
    parser.add_argument("--scenes", type=int, default=100, help="for quality (default: 100)")
    parser.add_argument("--threads", type=int, default=cores(), help="of the model (default: one a core)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        masker, _, what = run_masker(args.run, orders="0", device="cpu")
    else:
        masker, _, what = cluster_masker("spot_scenes", None, clusters=6, size=None, device="cpu")
    images, instances = scenes(args.scenes, WIDE)
    rows = slice((WIDE - HIGH) // 2, (WIDE + HIGH) // 2)
    print(
        f"{what}; {args.images} JPEGs of 640 x 480, {args.scenes} scenes of {WIDE} x {HIGH}; {cpu_name()}, "
        f"{cores()} cores, {args.threads} threads and {WORKERS} workers, torch {torch.__version__}\n"
    )
    print("| --fit, --size | images/s | CPU ms/image | labels alone: images/s | CPU ms | mBO_i | FG-ARI | segments |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i:04d}.jpg" for i in range(args.images)]
        for path, pixels in zip(paths, scenes(args.images, 640)[0], strict=True):
            Image.fromarray(pixels[80:560]).save(path, quality=90)
        masker.find(torch.zeros(1, 3, masker.size, masker.size, dtype=torch.uint8))  # the first call takes longer
        for name, size in FITS:
            fit = fit_of(name, masker.size, masker.patch, size)
            times = [speed(masker, fit, paths, Path(folder) / "out", overlay) for overlay in (True, False)]
            cells = [f"{value:.1f}" for pair in times for value in pair]
            cells += [f"{value:.1f}" for value in quality(masker, fit, images[:, rows], instances[:, rows])]
            print(f"| {name}{f', {size}' if size else ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
