"""MOVi-C and MOVi-E as PNG clips: train/<clip>/NNNNNNNN_image.png, validation/<clip>/ with NNNNNNNN_mask_MM.png too.

Frames are stretched to the square, bicubically (SPOT, section 6). Evaluation uses every frame of a clip, training nine
random ones, the same for every seed, so that both stages see the same images. Mask 00 is the background; there are no
classes. `movi_tfrecord` reads the same clips from the release.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spot_fast.data.base import ImageFiles, Masks
from spot_fast.data.masks.labels import open_lossless
from spot_fast.errors import UserError

T = TypeVar("T")
TRAIN_FRAMES = 9
SPLITS = {"train": "train", "val": "validation"}
EXPECTED = (
    "train/ and validation/ with one folder a clip, frames as *_image.png and masks as *_mask_NN.png, or the "
    "release's TFRecord files such as movi_c-train.tfrecord-00000-of-01024"
)


class Movi(ImageFiles):
    """One split ("train" or "val") of the clips under `root`; at most `limit` frames (0 = all). "val" has masks."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        mask_size: int = 128,
        crop: str = "stretch",
        limit: int = 0,
        frames_per_clip: int = TRAIN_FRAMES,
        **geometry: Any,
    ) -> None:
        self.name = f"MOVi {split}"
        self.has_masks = split == "val"
        folder = Path(root) / SPLITS[split]
        if not folder.is_dir():
            raise UserError(f"--data {root} has no {folder.name}/: MOVi needs {EXPECTED}")
        paths: list[Path] = []
        for clip in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            frames = sorted(clip.glob("*_image.png"))
            paths += frames if self.has_masks else draw_frames(clip.name, frames, frames_per_clip)
            if limit and len(paths) >= limit:
                paths = paths[:limit]
                break
        if not paths:
            raise UserError(f"{folder} has no clips with *_image.png frames: MOVi needs {EXPECTED}")
        super().__init__(paths, mask_size=mask_size, crop=crop, **geometry)

    def label(self, index: int) -> str:
        return f"{self.paths[index].parent.name}/{self.paths[index].name}"

    def mask_files(self, index: int) -> list[Path]:
        frame = self.paths[index]
        stem = frame.name.removesuffix("_image.png")
        files = sorted(frame.parent.glob(f"{stem}_mask_*.png")) if self.has_masks else []
        if not files:
            raise UserError(f"{frame} has no masks {stem}_mask_NN.png beside it: evaluation needs them")
        return files

    def val_masks(self, index: int) -> Masks:
        instances = None
        for file in self.mask_files(index):
            mask = np.asarray(open_lossless(file).convert("L")) > 0
            if instances is None:
                instances = np.zeros(mask.shape, np.int32)
            if mask.shape != instances.shape:
                raise UserError(
                    f"{file} is {mask.shape[1]} x {mask.shape[0]}, the frame's other masks are "
                    f"{instances.shape[1]} x {instances.shape[0]}"
                )
            digits = file.stem.rpartition("_")[2]
            if not digits.isdigit():
                raise UserError(f"{file} is not named *_mask_NN.png with a number NN")
            instances[mask] = int(digits)
        self.fitting(index, instances.shape[::-1], file)
        return Masks(self.square_labels(instances))


def draw_frames(clip: str, frames: Sequence[T], count: int) -> list[T]:
    """`count` random frames in order; the draw depends only on the clip's name and its number of frames."""
    rng = np.random.default_rng(zlib.crc32(clip.encode()))
    chosen = rng.choice(len(frames), min(count, len(frames)), replace=False) if frames else []
    return [frames[i] for i in sorted(chosen)]
