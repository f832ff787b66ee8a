"""PASCAL VOC 2012: trainaug (10,582 images) to train, val (1,449) to evaluate.

trainaug is VOC's train and the train and val of SBD (Semantic Boundaries Dataset), without VOC's val. Where VOC has no
such list it is made from SBD's folder, sorted by name. Label 255, the rim around objects, counts as background: the
published numbers are computed so (SPOT, section 7).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FullLabels, ImageFiles, Masks
from .names import located, read_lines
from .transforms import RIM, open_labels

EXPECTED = "JPEGImages/, ImageSets/Segmentation/trainaug.txt (or --sbd PATH) to train, " \
           "ImageSets/Segmentation/val.txt, SegmentationObject/ and SegmentationClass/ to evaluate"
TRAINAUG = 10_582
_GET_TRAINAUG = (
    f"VOC trains on trainaug, the {TRAINAUG:,} names that are VOC's train plus SBD's train and val without VOC's val: "
    "save them there, one name a line, or download SBD (benchmark_RELEASE, with train.txt and val.txt in its dataset/) "
    "and add --sbd PATH"
)


class Voc(ImageFiles):
    """One split ("train" or "val") of VOC 2012; `root` is VOC2012, VOCdevkit or the folder that holds it.

    Pictures are in the order of the list, at most `limit` (0 = all). Only "val" has masks. sbd: benchmark_RELEASE, its
    dataset/ or another folder with SBD's train.txt and val.txt; pictures that JPEGImages/ lacks come from its img/.
    """

    has_classes = True

    def __init__(self, root: str | Path, split: str, *, sbd: str | Path | None = None, image_size: int = 224,
                 mask_size: int = 320, crop: str = "random", flip: bool = False, limit: int = 0) -> None:
        self.name = f"VOC 2012 {'trainaug' if split == 'train' else 'val'}"
        self.has_masks = split == "val"
        self.root = _find(Path(root))
        self.sbd = None if sbd is None or self.has_masks else _find_sbd(Path(sbd))
        names = self._list("val") if self.has_masks else self._trainaug()
        paths = self._pictures(names[:limit] if limit else names)
        super().__init__(paths, image_size=image_size, mask_size=mask_size, crop=crop, flip=flip)

    def _list(self, name: str) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"{file} is missing: VOC needs {EXPECTED}")
        return read_names(file)

    def _trainaug(self) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / "trainaug.txt"
        if file.is_file():
            return read_names(file)
        if self.sbd is None:
            raise UserError(f"{file} is missing: {_GET_TRAINAUG}")
        of_sbd = {*read_names(self.sbd / "train.txt"), *read_names(self.sbd / "val.txt")}
        return sorted(of_sbd.union(self._list("train")).difference(self._list("val")))

    def _pictures(self, names: list[str]) -> list[Path]:
        own, of_sbd = self.root / "JPEGImages", self.sbd / "img" if self.sbd else None
        if of_sbd is None or not of_sbd.is_dir():
            return [located(own / f"{name}.jpg") for name in names]
        lacking = {path.name for path in of_sbd.iterdir()} - {path.name for path in own.iterdir()}
        return [located((of_sbd if f"{name}.jpg" in lacking else own) / f"{name}.jpg") for name in names]

    def mask_files(self, index: int) -> list[Path]:
        folders = ("SegmentationObject", "SegmentationClass") if self.has_masks else ()
        return [located(self.root / folder / f"{self.paths[index].stem}.png") for folder in folders]

    def full_masks(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(instances, classes), each int32 [height, width] at the size of the image."""
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on VOC val")
        instances, classes = (open_labels(file, rim=("P", "L")) for file in self.mask_files(index))
        return instances, classes

    def val_masks(self, index: int) -> Masks:
        instances, classes = self.full_masks(index)
        return Masks(self.square_labels(instances), self.square_labels(classes))

    def full_labels(self, index: int, *, crowd: bool) -> FullLabels:
        """As `full_masks`, with the rim, for other protocols than SPOT's; VOC has no crowd regions."""
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on VOC val")
        instances, classes = map(open_labels, self.mask_files(index))
        undecided = (instances == RIM) | (classes == RIM)
        instances[instances == RIM] = 0
        classes[classes == RIM] = 0
        return FullLabels(instances, classes, classes, np.zeros(instances.shape, bool), undecided)


def read_names(file: Path) -> list[str]:
    """Names in a list, one a line: the first word, without folder and ending; UserError where there are none."""
    lines = read_lines(file)
    names = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not names:
        raise UserError(f"{file} names no images")
    return names


def _find(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(f"--data {root} has no JPEGImages/, nor VOC2012/ or VOCdevkit/VOC2012/ with one: "
                    f"VOC needs {EXPECTED}")


def _find_sbd(sbd: Path) -> Path:
    for folder in (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset"):
        if (folder / "train.txt").is_file() and (folder / "val.txt").is_file():
            return folder
    raise UserError(f"--sbd {sbd} has no train.txt and val.txt, nor dataset/ or benchmark_RELEASE/dataset/ with them: "
                    "name the folder that SBD's benchmark.tgz was unpacked to")
