"""PASCAL VOC 2012: trainaug (10,582 images) to train, val (1,449) to evaluate.

Label 255, the rim around objects, counts as background: the published numbers are computed so (SPOT, section 7).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FullLabels, ImageFiles, Masks
from .transforms import open_image

EXPECTED = "JPEGImages/, ImageSets/Segmentation/trainaug.txt to train, ImageSets/Segmentation/val.txt, " \
           "SegmentationObject/ and SegmentationClass/ to evaluate"
_RIM = 255


class Voc(ImageFiles):
    """One split ("train" or "val") of VOC 2012; `root` is VOC2012, VOCdevkit or the folder that holds it.

    Pictures are in the order of the list, at most `limit` (0 = all). Only "val" has masks.
    """

    has_classes = True

    def __init__(self, root: str | Path, split: str, *, image_size: int = 224, mask_size: int = 320,
                 crop: str = "random", flip: bool = False, limit: int = 0) -> None:
        self.name = f"VOC 2012 {'trainaug' if split == 'train' else 'val'}"
        self.has_masks = split == "val"
        self.root = _find(Path(root))
        names = self._names("trainaug" if split == "train" else "val")
        names = names[:limit] if limit else names
        paths = [self.root / "JPEGImages" / f"{name}.jpg" for name in names]
        super().__init__(paths, image_size=image_size, mask_size=mask_size, crop=crop, flip=flip)

    def _names(self, split: str) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not file.is_file() and split == "trainaug":
            raise UserError(f"{file} is missing: VOC trains on trainaug, the 10,582 names that are VOC's train plus "
                            "SBD's train and val without VOC's val; save them there, one name a line")
        if not file.is_file():
            raise UserError(f"{file} is missing: VOC needs {EXPECTED}")
        names = [Path(line.split()[0]).stem for line in file.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{file} names no images")
        return names

    def full_masks(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(instances, classes), each int32 [height, width] at the size of the image."""
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on VOC val")
        name = self.paths[index].stem
        maps = []
        for folder in ("SegmentationObject", "SegmentationClass"):
            # The PNGs are indexed: the palette's index is the label, its colour is for looking at.
            image = open_image(self.root / folder / f"{name}.png")
            if image.mode not in ("P", "L"):
                raise UserError(f"{self.root / folder / name}.png has colours ({image.mode}) instead of indexed "
                                "labels: use the PNGs as VOC distributes them")
            labels = np.array(image, dtype=np.int32)
            labels[labels == _RIM] = 0
            maps.append(labels)
        return maps[0], maps[1]

    def val_masks(self, index: int) -> Masks:
        instances, classes = self.full_masks(index)
        return Masks(self.square_labels(instances), self.square_labels(classes))

    def full_labels(self, index: int, *, crowd: bool) -> FullLabels:
        """As `full_masks`, with the rim, for other protocols than SPOT's; VOC has no crowd regions."""
        instances, classes = self.full_masks(index)
        undecided = np.zeros(instances.shape, bool)
        for folder in ("SegmentationObject", "SegmentationClass"):
            undecided |= np.array(open_image(self.root / folder / f"{self.paths[index].stem}.png")) == _RIM
        return FullLabels(instances, classes, classes, np.zeros(instances.shape, bool), undecided)


def _find(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(f"--data {root} has no JPEGImages/, nor VOC2012/ or VOCdevkit/VOC2012/ with one: "
                    f"VOC needs {EXPECTED}")
