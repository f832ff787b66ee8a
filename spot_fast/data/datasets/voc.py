"""PASCAL VOC 2012: trainaug (10,582 images) to train, val (1,449) to evaluate.

trainaug is VOC's train plus the train and val of SBD (Semantic Boundaries Dataset), without VOC's val. If VOC's folder
has no such list, it is made from SBD's, sorted by name. Label 255, the rim around objects, counts as background, as in
the published numbers (SPOT, section 7).
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from spot_fast.data.base import FullLabels, ImageFiles, Masks
from spot_fast.data.listing.names import by_stem, composed, masks_in, read_lines
from spot_fast.data.listing.search import counted
from spot_fast.data.masks import fit
from spot_fast.data.masks.labels import RIM, open_labels
from spot_fast.errors import UserError

EXPECTED = (
    "JPEGImages/, ImageSets/Segmentation/trainaug.txt (or --sbd PATH) to train, "
    "ImageSets/Segmentation/val.txt, SegmentationObject/ and SegmentationClass/ to evaluate"
)
TRAINAUG = 10_582
_GET_TRAINAUG = (
    f"VOC trains on trainaug, the {TRAINAUG:,} names that are VOC's train plus SBD's train and val without VOC's val: "
    "save them there, one name a line, or download SBD (benchmark_RELEASE, with train.txt and val.txt in its dataset/) "
    "and add --sbd PATH"
)
# In order of preference.
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_FLAGS = ("1", "0", "-1")  # after the names in ImageSets/Main
_OWN_NAME = re.compile(r"\d{4}_\d{6}")


class Voc(ImageFiles):
    """One split ("train" or "val") of VOC 2012; `root` is VOC2012, VOCdevkit or the folder that holds it.

    Images are in the order of the list, at most `limit` (0 = all). Only "val" has masks. sbd: folder of SBD, whose img/
    gives the images that JPEGImages/ lacks. geometry: options of ImageFiles.
    """

    has_classes = True

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        sbd: str | Path | None = None,
        crop: str = "random",
        limit: int = 0,
        **geometry: Any,
    ) -> None:
        self.name = f"VOC 2012 {'trainaug' if split == 'train' else 'val'}"
        self.has_masks = split == "val"
        self.root = _find(Path(root))
        self.sbd = None if sbd is None or self.has_masks else _find_sbd(Path(sbd))
        own = _images_in(self.root / "JPEGImages")
        self._images = own if self.sbd is None else _images_in(self.sbd / "img") | own
        names = self._list("val") if self.has_masks else self._trainaug()
        paths = [
            self._images.get(name, self.root / "JPEGImages" / f"{name}.jpg")
            for name in (names[:limit] if limit else names)
        ]
        folders = ("SegmentationObject", "SegmentationClass") if self.has_masks else ()
        self._masks = [(self.root / folder, masks_in(self.root / folder)) for folder in folders]
        super().__init__(paths, crop=crop, **geometry)

    def _list(self, name: str) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"{file} is missing: VOC needs {EXPECTED}")
        return read_names(file, self._images)

    def _trainaug(self) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / "trainaug.txt"
        if file.is_file():
            return read_names(file, self._images)
        if self.sbd is None:
            raise UserError(f"{file} is missing: {_GET_TRAINAUG}")
        of_sbd = {name for split in ("train", "val") for name in read_names(self.sbd / f"{split}.txt", self._images)}
        return sorted(of_sbd.union(self._list("train")).difference(self._list("val")))

    def mask_files(self, index: int) -> list[Path]:
        stem = composed(self.paths[index].stem)
        return [found.get(stem, folder / f"{stem}.png") for folder, found in self._masks]

    def drawn_size(self, index: int) -> fit.Size | None:
        return fit.stored_size(self.mask_files(index)[0]) if self.has_masks else None

    def upright_alike(self, index: int) -> bool:
        # VOC's own masks were drawn on the stored pixels; annotators of other photos see them upright.
        return not _OWN_NAME.fullmatch(self.paths[index].stem)

    def _maps(self, index: int, *rim: str) -> tuple[np.ndarray, np.ndarray]:
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on VOC val")
        files = self.mask_files(index)
        instances, classes = (open_labels(file, rim=rim) for file in files)
        for file, labels in zip(files, (instances, classes), strict=True):
            self.fitting(index, labels.shape[::-1], file)
        if classes.shape != instances.shape:
            raise UserError(
                f"{files[1]} is {classes.shape[1]} x {classes.shape[0]}, {files[0]} is "
                f"{instances.shape[1]} x {instances.shape[0]}: both need the same size"
            )
        return instances, classes

    def full_masks(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(instances, classes), each int32 [height, width] at the size of the masks."""
        return self._maps(index, "P", "L")

    def val_masks(self, index: int) -> Masks:
        instances, classes = self.full_masks(index)
        return Masks(self.square_labels(instances), self.square_labels(classes))

    def full_labels(self, index: int, *, crowd: bool) -> FullLabels:
        """With the rim, for protocols other than SPOT's; VOC has no crowd regions."""
        instances, classes = self._maps(index)
        undecided = (instances == RIM) | (classes == RIM)
        instances[instances == RIM] = 0
        classes[classes == RIM] = 0
        return FullLabels(instances, classes, classes, np.zeros(instances.shape, bool), undecided)


def recognises(path: Path) -> bool:
    """Whether `path` has VOC's images; those of DAVIS and YouTube-VOS lie in folders of their own."""
    folders = [root / "JPEGImages" for root in _roots(path) if (root / "JPEGImages").is_dir()]
    return any((images.parent / "ImageSets" / "Segmentation").is_dir() or any(images.glob("*.*")) for images in folders)


def remarks(images: Voc) -> list[str]:
    if images.has_masks or len(images) == TRAINAUG:
        return []
    return [f"trainaug has {counted(len(images), 'name')} here and {TRAINAUG:,} in published results"]


def read_names(file: Path, known: Container[str] = ()) -> list[str]:
    """Names in a list, one a line, without folder and image extension; UserError if there are none.

    known: existing images. They distinguish a name with spaces from one that something follows, such as a mask's name,
    or 1, 0 or -1 in ImageSets/Main.
    """
    names = [_name(line, known) for line in map(str.strip, read_lines(file)) if line]
    if not names:
        raise UserError(f"{file} names no images")
    return names


def _name(line: str, known: Container[str]) -> str:
    line = composed(line)
    words = line.split()
    flagged = len(words) > 1 and words[-1] in _FLAGS
    without_flag = line[: -len(words[-1])].rstrip() if flagged else line
    for text in (line, without_flag, words[0]):
        text = text.replace("\\", "/").rpartition("/")[2]
        for name in (text, _without_ending(text)):
            if name in known:
                return name
    # No such image exists: the likeliest name, to be reported as missing.
    first = flagged and len(words) == 2 or _without_ending(words[0]) != words[0]
    return _without_ending((words[0] if first else line).replace("\\", "/").rpartition("/")[2])


def _without_ending(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if stem and f"{dot}{ending}".lower() in _ENDINGS else name


def _images_in(folder: Path) -> dict[str, Path]:
    return by_stem(folder, _ENDINGS, lambda name: composed(_without_ending(name)))


def _roots(path: Path) -> tuple[Path, ...]:
    return path, path / "VOC2012", path / "VOCdevkit" / "VOC2012"


def _find(root: Path) -> Path:
    for folder in _roots(root):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(
        f"--data {root} has no JPEGImages/, nor VOC2012/ or VOCdevkit/VOC2012/ with one: VOC needs {EXPECTED}"
    )


def _find_sbd(sbd: Path) -> Path:
    for folder in (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset"):
        if (folder / "train.txt").is_file() and (folder / "val.txt").is_file():
            return folder
    raise UserError(
        f"--sbd {sbd} has no train.txt and val.txt, nor dataset/ or benchmark_RELEASE/dataset/ with them: "
        "name the folder that SBD's benchmark.tgz was unpacked to"
    )
