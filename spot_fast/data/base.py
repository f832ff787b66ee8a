"""What a data set is to the rest of the package: numbered pictures, with masks where there are any.

An `ImageSet` is one split (training or validation). Pictures come out as uint8 squares [3, S, S], masks as label maps
[M, M]; S is `Config.image_size`, M is `Config.mask_size`. Nothing here knows about encoders, batches or epochs.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import CorruptImage, UserError
from . import transforms
from .names import alike


@dataclass(frozen=True)
class Masks:
    """Ground truth of one picture, int64 label maps [M, M]; 0 is background.

    classes is None where the data set has no classes, ignore (1 = pixel counts nowhere) where nothing is ignored.
    """

    instances: torch.Tensor
    classes: torch.Tensor | None = None
    ignore: torch.Tensor | None = None


@dataclass(frozen=True)
class FullLabels:
    """Ground truth of one picture at its own size, [height, width], for protocols that crop or count differently.

    instances    int32, 0 is background; where instances overlap, the earlier one's
    classes      int32, of the earlier instance
    top_classes  int32, of the instance with the highest class
    covered      bool, more than one instance lies here
    undecided    bool, the annotators left the pixel open (VOC's rim); background in the maps above
    """

    instances: np.ndarray
    classes: np.ndarray
    top_classes: np.ndarray
    covered: np.ndarray
    undecided: np.ndarray


class ImageSet(ABC):
    """One split of a data set.

    name         for messages and tables
    has_masks    `val_masks` works
    has_classes  those masks have class maps
    flip         training pictures are mirrored with probability 1/2; the loader does it, `train_image` does not
    random_crop  `finish` and `train_image` depend on their rng
    images       optional: all training pictures at once, uint8 [n, 3, S, S]; the loader then indexes it directly
    notes        lines for the user about what was found, such as files that are left out
    corrupt      optional, with `images`: the indices of pictures that are none, others stand in for them
    """

    name: str = "images"
    has_masks: bool = False
    has_classes: bool = False
    flip: bool = False
    random_crop: bool = False
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many pictures it has."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call the picture in a message: its file name, where it has one."""

    @abstractmethod
    def prepared(self, index: int) -> torch.Tensor:
        """The training picture as far as no chance is involved: uint8 [3, h, w], decoded and resized, and cropped
        unless the crop is random; CorruptImage names the file and the reason."""

    def finish(self, prepared: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """The rest: uint8 [3, S, S], cropped at random where the set does so, and not mirrored."""
        return prepared

    def train_image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, S, S], cropped for training and not mirrored; CorruptImage names the file and the reason."""
        return self.finish(self.prepared(index), rng)

    def content_key(self) -> str:
        """Names what `prepared` gives for all pictures: another key, other pixels. Empty: not worth storing on disk."""
        return ""

    @abstractmethod
    def val_image(self, index: int) -> torch.Tensor:
        """uint8 [3, S, S], cropped as in evaluation; CorruptImage names the file and the reason."""

    def val_masks(self, index: int) -> Masks:
        """Label maps that cover the same part of the picture as `val_image`; UserError where they cannot be read.

        A set without masks has no more than this.
        """
        raise UserError(f"{self.name} has no masks: evaluate on a set that has them")


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a square: resized to width x height, then the square whose corner is at (left, top)."""

    width: int
    height: int
    left: int
    top: int


class ImageFiles(ImageSet):
    """An ImageSet over image files: SPOT's crops (section 6) of `paths[index]`.

    crop: "center" or "random" after resizing the minor side to S (bilinear; of a picture more than 16 times as long as
    wide crops come from the middle 16 squares), or "stretch" to S x S (bicubic, MOVi).
    Validation pictures are centre-cropped unless they are stretched. upright: obey EXIF orientation. A set whose
    pictures are not files of their own overrides `encoded` and `stamps`.
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
        self._key = ""

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        return self.paths[index].name

    def encoded(self, index: int) -> bytes:
        """The picture's file as it is stored; CorruptImage where there is none."""
        try:
            return self.paths[index].read_bytes()
        except FileNotFoundError:
            other = alike(self.paths[index])
            hint = f", but {other} is there: names have to agree in case and blanks" if other else ""
            raise CorruptImage(f"image {self.paths[index]} does not exist{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise CorruptImage(f"image {self.paths[index]} cannot be read: {reason}") from None

    def rgb(self, index: int) -> Image.Image:
        """The decoded picture, upright if the set is; CorruptImage names the file and the reason."""
        return transforms.open_rgb(self.paths[index], self.encoded(index), upright=self.upright)

    def geometry(self, width: int, height: int, rng: np.random.Generator) -> Geometry:
        """What training does to a picture of that size; draws from `rng` where the crop is random."""
        size = self.image_size
        if self.crop == "stretch":
            return Geometry(size, size, 0, 0)
        width, height = transforms.minor_size(width, height, size)
        place = transforms.random_corner if self.random_crop else transforms.center_corner
        left, top, *kept = transforms.kept_part(width, height, size)
        across, down = place(*kept, size, rng)
        return Geometry(width, height, left + across, top + down)

    def prepared(self, index: int) -> torch.Tensor:
        return transforms.to_tensor(self._resized(index, self.crop))

    def finish(self, prepared: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if not self.random_crop:
            return prepared
        left, top = transforms.random_corner(prepared.shape[2], prepared.shape[1], self.image_size, rng)
        return prepared[:, top : top + self.image_size, left : left + self.image_size].contiguous()

    def val_image(self, index: int) -> torch.Tensor:
        return transforms.to_tensor(self._resized(index, "stretch" if self.crop == "stretch" else "center"))

    def mask_files(self, index: int) -> list[Path]:
        """The files that `val_masks` reads for the picture; none where masks are not files of their own."""
        return []

    def _resized(self, index: int, crop: str) -> Image.Image:
        image = self.rgb(index)
        with transforms.memory_of(self.paths[index]):
            if crop == "stretch":
                return transforms.stretch(image, self.image_size)
            image = transforms.resize_minor(image, self.image_size)
            return image if crop == "random" else transforms.center_crop(image, self.image_size)

    def content_key(self) -> str:
        if self._key:  # to ask a large set's file system once is enough
            return self._key
        digest = hashlib.sha256()
        words = (transforms.VERSION, self.image_size, self.crop, self.upright, len(self))
        digest.update(" ".join(map(str, words)).encode())
        for line in self.stamps():
            digest.update(f"\n{line}".encode(errors="surrogateescape"))
        self._key = digest.hexdigest()
        return self._key

    def stamps(self) -> Iterator[str]:
        """A line for each file that the pictures come from; it changes when the file does: name, size and time."""
        return map(stamp, self.paths)

    def square_labels(self, labels: np.ndarray) -> torch.Tensor:
        """A label map [height, width] as int64 [M, M]: nearest, cropped or stretched as validation pictures are."""
        if self.crop == "stretch":
            return transforms.stretch_labels(labels, self.mask_size)
        return transforms.center_crop_labels(labels, self.mask_size)


def stamp(path: Path) -> str:
    """Name, size and time of a file: another line, another content."""
    try:
        about = path.stat()
        return f"{path.parent.name}/{path.name} {about.st_size} {about.st_mtime_ns}"
    except OSError:
        return f"{path.parent.name}/{path.name} missing"


__all__ = ["CorruptImage", "FullLabels", "Geometry", "ImageFiles", "ImageSet", "Masks"]
