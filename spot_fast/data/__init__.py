"""Data sets (one file each), transforms and the loader. `open_sets` finds the data that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from spot_fast.config import Config
from spot_fast.data.base import ImageFiles, ImageSet, Masks
from spot_fast.data.batch import Batch
from spot_fast.data.datasets import coco, folder, movi, voc
from spot_fast.data.datasets.folder import Folder
from spot_fast.data.datasets.movi_tfrecord import open_clips
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.data.loading.loader import Loader
from spot_fast.errors import UserError

# preset → what opens a split of it, and what its --data has to be; one of your own goes in here (docs/extending.md)
READERS: dict[str, tuple[Callable[..., ImageFiles], str]] = {
    "coco": (coco.Coco, f"a folder with {coco.EXPECTED}"),
    "voc": (voc.Voc, f"a folder with {voc.EXPECTED}"),
    "movi_c": (partial(open_clips, release="movi_c"), f"a folder with {movi.EXPECTED}"),
    "movi_e": (partial(open_clips, release="movi_e"), f"a folder with {movi.EXPECTED}"),
    "folder": (Folder, f"a folder of {folder.EXPECTED}"),
}


def open_set(config: Config, split: str) -> ImageSet:
    """The "train" or the "val" images of `config.preset`, read from `config.data`.

    `train_images` and `val_images` limit them to the first so many, 0 takes all. UserError says what is missing and
    where it is expected.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}: use 'train' or 'val'")
    if config.preset == "scenes":
        image_set = Scenes.from_config(config, split)
        image_set.flip = config.flip and split == "train"
        return image_set
    if config.preset not in READERS:
        raise UserError(f"--preset {config.preset} has no data set: use scenes, {', '.join(READERS)}")
    reader, expected = READERS[config.preset]
    needs = f"--preset {config.preset} needs --data PATH, {expected}"
    if not config.data:
        raise UserError(needs)
    if not Path(config.data).is_dir() and (config.preset != "folder" or not Path(config.data).is_file()):
        raise UserError(f"--data {config.data} is not a folder: {needs}")
    if config.preset == "voc":
        reader = partial(reader, sbd=config.sbd)
    limit = config.train_images if split == "train" else config.val_images
    return reader(
        config.data,
        split,
        image_size=config.image_size,
        mask_size=config.mask_size,
        crop=config.crop,
        flip=config.flip and split == "train",
        limit=limit,
    )


def open_sets(config: Config) -> tuple[ImageSet, ImageSet]:
    """(training set, validation set) as `open_set` opens them."""
    return open_set(config, "train"), open_set(config, "val")


__all__ = ["Batch", "Folder", "ImageFiles", "ImageSet", "Loader", "Masks", "READERS", "Scenes", "open_set", "open_sets"]
