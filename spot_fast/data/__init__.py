"""Data sets: `READERS` describes each of them, `open_sets` opens those of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spot_fast.config import Config
from spot_fast.data.base import ImageFiles, ImageSet, Masks
from spot_fast.data.batch import Batch
from spot_fast.data.datasets import clevrtex, coco, folder, movi, movi_check, scenes, voc
from spot_fast.data.datasets.folder import Folder
from spot_fast.data.datasets.movi_tfrecord import open_clips
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.data.inspection import CheckResult
from spot_fast.data.loading.loader import Loader
from spot_fast.errors import UserError


@dataclass(frozen=True)
class Reader:
    """Opens, recognises and checks a data set. Its settings are in `recipes.DATA_SETS`.

    open        open(data, split, *, image_size, mask_size, crop, flip, limit, **options) → ImageSet
    needs       what --data has to be, for messages; "" if the set needs no --data
    options     other fields of Config that `open` takes
    takes_list  --data may be a text file too
    title       name in `data check`; "" for the recipe's
    recognises  whether a path holds this data set; `data check` asks the readers in their order
    remarks     further lines of `data check` about an opened split
    inspect     inspect(path, decode) → CheckResult, if `data check` cannot simply open both splits
    """

    open: Callable[..., ImageSet]
    needs: str = ""
    options: tuple[str, ...] = ()
    takes_list: bool = False
    title: str = ""
    recognises: Callable[[Path], bool] = lambda path: False
    remarks: Callable[[ImageSet], list[str]] = lambda image_set: []
    inspect: Callable[[Path, bool], CheckResult] | None = None


def _movi(name: str, side: int = 0) -> Reader:
    return Reader(
        partial(open_clips, release=name.removesuffix(f"_{side}"), side=side),
        f"a folder with {movi.EXPECTED}",
        recognises=lambda path: movi_check.recognised(path) == name,
        inspect=partial(movi_check.inspect, name=name),
    )


# By the name of the preset. Register your own here (docs/extending.md).
READERS: dict[str, Reader] = {
    "scenes": Reader(scenes.open_scenes),
    "coco": Reader(
        coco.Coco, f"a folder with {coco.EXPECTED}", title="COCO 2017", recognises=coco.recognises, remarks=coco.remarks
    ),
    "voc": Reader(
        voc.Voc,
        f"a folder with {voc.EXPECTED}",
        options=("sbd",),
        title="PASCAL VOC 2012",
        recognises=voc.recognises,
        remarks=voc.remarks,
    ),
    "movi_c": _movi("movi_c"),
    "movi_e": _movi("movi_e"),
    "movi_c_256": _movi("movi_c_256", 256),
    "movi_e_256": _movi("movi_e_256", 256),
    "clevrtex": Reader(
        clevrtex.ClevrTex,
        f"a folder with {clevrtex.EXPECTED}",
        recognises=clevrtex.recognises,
        remarks=clevrtex.remarks,
    ),
    "folder": Reader(Folder, f"a folder of {folder.EXPECTED}", takes_list=True, title="image folder"),
}


def open_set(config: Config, split: str) -> ImageSet:
    """Opens the "train" or the "val" images of `config.preset` at `config.data`, the first `train_images` or
    `val_images` of them (0 = all). UserError says what is missing and where it is expected."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}: use 'train' or 'val'")
    if config.preset not in READERS:
        raise UserError(f"--preset {config.preset} has no data set: use {', '.join(READERS)}")
    reader = READERS[config.preset]
    if reader.needs:
        needs = f"--preset {config.preset} needs --data PATH, {reader.needs}"
        if not config.data:
            raise UserError(needs)
        if not Path(config.data).is_dir() and not (reader.takes_list and Path(config.data).is_file()):
            raise UserError(f"--data {config.data} is not a folder: {needs}")
    return reader.open(
        config.data,
        split,
        image_size=config.image_size,
        mask_size=config.mask_size,
        crop=config.crop,
        flip=config.flip and split == "train",
        limit=config.train_images if split == "train" else config.val_images,
        **{name: getattr(config, name) for name in reader.options},
    )


def open_sets(config: Config) -> tuple[ImageSet, ImageSet]:
    """(training set, validation set)."""
    return open_set(config, "train"), open_set(config, "val")


__all__ = [
    "READERS",
    "Batch",
    "Folder",
    "ImageFiles",
    "ImageSet",
    "Loader",
    "Masks",
    "Reader",
    "Scenes",
    "open_set",
    "open_sets",
]
