"""What a data set is to the rest of the package: numbered pictures, with masks where there are any.

An `ImageSet` is one split (training or validation). Pictures come out as uint8 squares [3, S, S], masks as label maps
[M, M]; S is `Config.image_size`, M is `Config.mask_size`. Nothing here knows about encoders, batches or epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import CorruptImage
from . import transforms


@dataclass(frozen=True)
class Masks:
    """Ground truth of one picture, int64 label maps [M, M]; 0 is background.

    classes is None where the data set has no classes, ignore (1 = pixel counts nowhere) where nothing is ignored.
    """

    instances: torch.Tensor
    classes: torch.Tensor | None = None
    ignore: torch.Tensor | None = None


class ImageSet:
    """One split of a data set.

    name         for messages and tables
    has_masks    `val_masks` works
    has_classes  those masks have class maps
    flip         training pictures are mirrored with probability 1/2; the loader does it, `train_image` does not
    random_crop  `train_image` depends on its rng
    images       optional: all training pictures at once, uint8 [n, 3, S, S]; the loader then indexes it directly
    """

    name: str = "images"
    has_masks: bool = False
    has_classes: bool = False
    flip: bool = False
    random_crop: bool = False

    @property
    def augments(self) -> bool:
        """Whether training pictures change from epoch to epoch."""
        return self.flip or self.random_crop

    def __len__(self) -> int:
        raise NotImplementedError

    def label(self, index: int) -> str:
        """What to call the picture in a message: its file name, where it has one."""
        raise NotImplementedError

    def train_image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, S, S], cropped for training and not mirrored; CorruptImage names the file and the reason."""
        raise NotImplementedError

    def val_image(self, index: int) -> torch.Tensor:
        """uint8 [3, S, S], cropped as in evaluation; CorruptImage names the file and the reason."""
        raise NotImplementedError

    def val_masks(self, index: int) -> Masks:
        """Label maps that cover the same part of the picture as `val_image`; UserError where they cannot be read."""
        raise NotImplementedError


class ImageFiles(ImageSet):
    """An ImageSet over image files: SPOT's crops (section 6) of `paths[index]`.

    crop: "center" or "random" after resizing the minor side to S (bilinear), or "stretch" to S x S (bicubic, MOVi).
    Validation pictures are centre-cropped unless they are stretched. upright: obey EXIF orientation.
    """

    def __init__(self, paths: list[Path], *, image_size: int, mask_size: int, crop: str = "center",
                 flip: bool = False, upright: bool = False) -> None:
        self.paths = paths
        self.image_size = image_size
        self.mask_size = mask_size
        self.crop = crop
        self.flip = flip
        self.upright = upright
        self.random_crop = crop == "random"

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        return self.paths[index].name

    def train_image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        return self._square(index, self.crop, rng)

    def val_image(self, index: int) -> torch.Tensor:
        return self._square(index, "stretch" if self.crop == "stretch" else "center", None)

    def _square(self, index: int, crop: str, rng: np.random.Generator | None) -> torch.Tensor:
        image = transforms.open_rgb(self.paths[index], upright=self.upright)
        if crop == "stretch":
            square = transforms.stretch(image, self.image_size)
        elif crop == "random":
            square = transforms.random_crop(transforms.resize_minor(image, self.image_size), self.image_size, rng)
        else:
            square = transforms.center_crop(transforms.resize_minor(image, self.image_size), self.image_size)
        return transforms.to_tensor(square)

    def square_labels(self, labels: np.ndarray) -> torch.Tensor:
        """A label map [height, width] as int64 [M, M]: nearest, cropped or stretched as validation pictures are."""
        if self.crop == "stretch":
            return transforms.stretch_labels(labels, self.mask_size)
        return transforms.center_crop_labels(labels, self.mask_size)


__all__ = ["CorruptImage", "ImageFiles", "ImageSet", "Masks"]
