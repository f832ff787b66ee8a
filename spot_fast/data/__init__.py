"""Data sets (one file each), transforms and the loader. `open_sets` finds the data that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..errors import UserError
from . import coco, movi, voc
from .base import ImageFiles, ImageSet, Masks
from .folder import Folder
from .loader import Batch, Loader
from .scenes import Scenes

_READERS = {"coco": coco.Coco, "voc": voc.Voc, "movi_c": movi.Movi, "movi_e": movi.Movi}
_EXPECTED = {"coco": coco.EXPECTED, "voc": voc.EXPECTED, "movi_c": movi.EXPECTED, "movi_e": movi.EXPECTED}


def open_set(config: Config, split: str) -> ImageSet:
    """The "train" or the "val" pictures of `config.preset`, read from `config.data`.

    `train_images` and `val_images` limit them to the first so many, 0 takes all. UserError says what is missing and
    where it is expected.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}: use 'train' or 'val'")
    if config.preset == "scenes":
        image_set = Scenes.from_config(config, split)
        image_set.flip = config.flip and split == "train"
        return image_set
    if config.preset not in _READERS:
        raise UserError(f"--preset {config.preset} has no data set: use scenes, {', '.join(_READERS)}")
    needs = f"--preset {config.preset} needs --data PATH, a folder with {_EXPECTED[config.preset]}"
    if not config.data:
        raise UserError(needs)
    if not Path(config.data).is_dir():
        raise UserError(f"--data {config.data} is not a folder: {needs}")
    limit = config.train_images if split == "train" else config.val_images
    return _READERS[config.preset](config.data, split, image_size=config.image_size, mask_size=config.mask_size,
                                   crop=config.crop, flip=config.flip and split == "train", limit=limit)


def open_sets(config: Config) -> tuple[ImageSet, ImageSet]:
    """(training set, validation set) as `open_set` opens them."""
    return open_set(config, "train"), open_set(config, "val")


__all__ = ["Batch", "Folder", "ImageFiles", "ImageSet", "Loader", "Masks", "Scenes", "open_set", "open_sets"]
