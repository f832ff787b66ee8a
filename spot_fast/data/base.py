"""What a data set is to the rest of the package: numbered images, with masks where there are any.

An `ImageSet` is one split (training or validation). Images come out as uint8 squares [3, S, S], masks as label maps
[M, M]; S is `Config.image_size`, M is `Config.mask_size`. Nothing here knows about encoders, batches or epochs.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spot_fast.data.decoding import opening, transforms
from spot_fast.data.listing.identity import Files, sample
from spot_fast.data.listing.names import alike
from spot_fast.data.masks import fit
from spot_fast.data.masks.ground_truth import FullLabels, Masks
from spot_fast.errors import CorruptImage, UserError


class ImageSet(ABC):
    """One split of a data set.

    name         for messages and tables
    has_masks    `val_masks` works
    has_classes  those masks have class maps
    flip         training images are mirrored with probability 1/2; the loader does it, `train_image` does not
    random_crop  `finish` and `train_image` depend on their rng
    notes        lines for the user about what was found, such as files or annotations that are left out
    images       optional: all training images at once, uint8 [n, 3, S, S]; the loader then indexes it directly
    corrupt      optional, with `images`: the indices of images that are none, others stand in for them
    """

    name: str = "images"
    has_masks: bool = False
    has_classes: bool = False
    flip: bool = False
    random_crop: bool = False
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many images it has."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call the image in a message: its file name, where it has one."""

    @abstractmethod
    def prepared(self, index: int) -> torch.Tensor:
        """The training image as far as no chance is involved: uint8 [3, h, w], decoded and resized, and cropped
        unless the crop is random; CorruptImage names the file and the reason."""

    def finish(self, prepared: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """The rest: uint8 [3, S, S], cropped at random where the set does so, and not mirrored."""
        return prepared

    def train_image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, S, S], cropped for training and not mirrored; CorruptImage names the file and the reason."""
        return self.finish(self.prepared(index), rng)

    def content_key(self) -> str:
        """Names what `prepared` gives for all images: another key, other pixels. Empty: not worth storing on disk."""
        return ""

    def sample(self) -> list[str]:
        """Digests of what a few of the set's files hold, wherever they lie; "" for one that cannot be read."""
        return []

    def changed(self, indices: Iterable[int]) -> list[int]:
        """Those of the images that are no longer what `content_key` names."""
        return []

    @abstractmethod
    def val_image(self, index: int) -> torch.Tensor:
        """uint8 [3, S, S], cropped as in evaluation; CorruptImage names the file and the reason."""

    def val_masks(self, index: int) -> Masks:
        """Label maps that cover the same part of the image as `val_image`; UserError where they cannot be read.

        A set without masks has no more than this.
        """
        raise UserError(f"{self.name} has no masks: evaluate on a set that has them")


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a square: resized to width x height, then the square whose corner is at (left, top)."""

    width: int
    height: int
    left: int
    top: int


class ImageFiles(ImageSet):
    """An ImageSet over image files: SPOT's crops (section 6) of `paths[index]`.

    crop: "center" or "random" after resizing the minor side to S (bilinear; of an image more than 16 times as long as
    wide crops come from the middle 16 squares), or "stretch" to S x S (bicubic, MOVi). Validation images are
    centre-cropped unless they are stretched. upright: obey EXIF orientation; in validation the image that the masks
    were drawn on counts, whichever of the two has their size (`fitting`). A set whose images are not files of their
    own overrides `encoded`, `sources` and `source`, and says in `drawn` what it takes of those files.
    """

    drawn = ""

    def __init__(
        self,
        paths: list[Path],
        *,
        image_size: int,
        mask_size: int,
        crop: str = "center",
        flip: bool = False,
        upright: bool = False,
    ) -> None:
        self.paths = paths
        self.image_size = image_size
        self.mask_size = mask_size
        self.crop = crop
        self.flip = flip
        self.upright = upright
        self.random_crop = crop == "random"
        self._key = ""
        self._files: Files | None = None  # as they were when the key was made
        self._sample: list[str] | None = None
        self._turned: dict[tuple[int, fit.Size], bool] = {}  # answers of `fitting`

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        return self.paths[index].name

    def encoded(self, index: int) -> bytes:
        """The image's file as it is stored; CorruptImage where there is none."""
        try:
            return self.paths[index].read_bytes()
        except FileNotFoundError:
            other = alike(self.paths[index])
            hint = f", but {other} is there: names have to agree in case and blanks" if other else ""
            raise CorruptImage(f"image {self.paths[index]} does not exist{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise CorruptImage(f"image {self.paths[index]} cannot be read: {reason}") from None

    def rgb(self, index: int, upright: bool | None = None) -> Image.Image:
        """The decoded image, upright if asked for, or if the set is; CorruptImage names the file and the reason."""
        upright = self.upright if upright is None else upright
        return opening.open_rgb(self.paths[index], self.encoded(index), upright=upright)

    def geometry(self, width: int, height: int, rng: np.random.Generator) -> Geometry:
        """What training does to an image of that size; draws from `rng` where the crop is random."""
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
        try:
            size = self.drawn_size(index)
            upright = None if size is None else self.fitting(index, size, "")
        except UserError:
            upright = None  # what is wrong with the masks is theirs to say
        return transforms.to_tensor(self._resized(index, "stretch" if self.crop == "stretch" else "center", upright))

    def drawn_size(self, index: int) -> fit.Size | None:
        """(width, height) of the masks of a validation image; None where the set has none, or they decide nothing."""
        return None

    def fitting(self, index: int, size: fit.Size, source: Path | str) -> bool:
        """Whether masks of `size` (width, height) lie on the image that EXIF turns upright, not on the stored one.

        They have the size of one of the two, or are a scaled copy; UserError names the file `source`, the image and
        both sizes where they fit neither. Where they fit both, as with squares, `upright_alike` decides.
        """
        if (index, size) not in self._turned:
            encoded, otherwise = self.encoded(index), self.upright_alike(index)
            stored = upright = fit.stored_size(self.paths[index], encoded)
            if otherwise or size != stored:  # EXIF costs more than the size
                stored, upright = fit.both_sizes(self.paths[index], encoded)
            answer = fit.turned(size, stored, upright, otherwise)
            if answer is None:
                also = f" ({upright[0]} x {upright[1]} upright)" if upright != stored else ""
                raise UserError(
                    f"{source} gives {self.paths[index].name} masks of {size[0]} x {size[1]}, but it is "
                    f"{stored[0]} x {stored[1]}{also}: masks need the image's size or shape"
                )
            self._turned[index, size] = answer
        return self._turned[index, size]

    def upright_alike(self, index: int) -> bool:
        """Whether masks are of the upright image where their size does not tell."""
        return self.upright

    def mask_files(self, index: int) -> list[Path]:
        """The files that `val_masks` reads for the image; none where masks are not files of their own."""
        return []

    def _resized(self, index: int, crop: str, upright: bool | None = None) -> Image.Image:
        image = self.rgb(index, upright)
        with opening.memory_of(self.paths[index]):
            if crop == "stretch":
                return transforms.stretch(image, self.image_size)
            image = transforms.resize_minor(image, self.image_size)
            return image if crop == "random" else transforms.center_crop(image, self.image_size)

    def content_key(self) -> str:
        if not self._key:  # to ask a large set's file system once is enough
            self._files = Files(self.sources())
            words = (
                transforms.VERSION,
                self.image_size,
                self.crop,
                self.upright,
                len(self),
                self.drawn,
                self._files.key,
            )
            self._key = hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()
        return self._key

    def sample(self) -> list[str]:
        if self._sample is None:
            self._sample = sample(self.sources())
        return self._sample

    def take_key(self, key: str) -> None:
        """The `content_key` from now on: of several processes one asks the file system for all."""
        self._key = key

    def changed(self, indices: Iterable[int]) -> list[int]:
        if self._files is None:
            return []
        indices = list(indices)
        places = [self.source(index) for index in indices]
        found = set(self._files.changed(dict.fromkeys(places)))
        return [index for index, place in zip(indices, places, strict=True) if place in found]

    def sources(self) -> Sequence[Path]:
        """The files that the images come from."""
        return self.paths

    def source(self, index: int) -> int:
        """The place in `sources` of the file that the image comes from."""
        return index

    def square_labels(self, labels: np.ndarray) -> torch.Tensor:
        """A label map [height, width] as int64 [M, M]: nearest, cropped or stretched as validation images are."""
        if self.crop == "stretch":
            return transforms.stretch_labels(labels, self.mask_size)
        return transforms.center_crop_labels(labels, self.mask_size)


__all__ = ["CorruptImage", "FullLabels", "Geometry", "ImageFiles", "ImageSet", "Masks"]
