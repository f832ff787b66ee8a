"""The interface of a data set: numbered images, some with masks.

Images are uint8 squares [3, S, S], masks label maps [M, M]; S is `Config.image_size`, M is `Config.mask_size`. Nothing
here knows about encoders, batches or epochs.
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
    """One split, training or validation, of a data set.

    name         for messages and tables
    has_masks    `val_masks` works
    has_classes  those masks have class maps
    has_panoptic `panoptic_segments` works
    flip         training images are mirrored with probability 1/2; the loader does it, `train_image` does not
    random_crop  `finish` and `train_image` depend on their rng
    notes        lines for the user, such as how many files or annotations are left out
    images       optional: all training images, uint8 [n, 3, S, S], which the loader indexes
    corrupt      optional, with `images`: indices of corrupt images, which the loader replaces
    """

    name: str = "images"
    has_masks: bool = False
    has_classes: bool = False
    has_panoptic: bool = False
    flip: bool = False
    random_crop: bool = False
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many images it has."""

    @abstractmethod
    def label(self, index: int) -> str:
        """Name of the image in messages, such as its file name."""

    @abstractmethod
    def prepared(self, index: int) -> torch.Tensor:
        """The deterministic part of `train_image`: uint8 [3, h, w], decoded, resized, and cropped unless the crop is
        random; CorruptImage names the file and the reason."""

    def finish(self, prepared: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """The random part of `train_image`: the crop, if `random_crop`."""
        return prepared

    def train_image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, S, S], cropped for training, not mirrored; errors as in `prepared`."""
        return self.finish(self.prepared(index), rng)

    def content_key(self) -> str:
        """Key of all `prepared` images, which changes when they do; empty if they are not worth caching on disk."""
        return ""

    def sample(self) -> list[str]:
        """Digests of the contents of a few of the set's files; "" for one that cannot be read."""
        return []

    def changed(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` whose image has changed since `content_key` was made."""
        return []

    @abstractmethod
    def val_image(self, index: int) -> torch.Tensor:
        """uint8 [3, S, S], cropped as in evaluation; errors as in `prepared`."""

    def val_masks(self, index: int) -> Masks:
        """Label maps of the same part of the image as `val_image`; UserError if missing or unreadable."""
        raise UserError(f"{self.name} has no masks: evaluate on a set that has them")

    def panoptic_segments(self, index: int) -> np.ndarray:
        """int32 [height, width] at the size of the image: things and stuff from 1, 0 where nothing is labelled."""
        raise UserError(f"{self.name} has no panoptic annotations: ask for none")

    def mask_files(self, index: int) -> list[Path]:
        """The files that `val_masks` reads; none if masks are not files of their own."""
        return []


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a square: resized to width x height, then cropped with the corner at (left, top).

    Fractions of a pixel stand for a square that is cut out of the stored image before it is resized.
    """

    width: float
    height: float
    left: float
    top: float


class ImageFiles(ImageSet):
    """An ImageSet over image files: SPOT's crops (section 6) of `paths[index]`.

    crop: "center" or "random" after resizing the minor side to S (bilinear; crops of a longer strip come from its
    middle 16 squares), or "stretch" to S x S (bicubic, MOVi). Validation images are centre-cropped unless stretched.
    upright: obey EXIF orientation; in validation the masks decide (`fitting`). A set whose images are not files of
    their own overrides `encoded`, `sources`, `source` and `drawn`.
    """

    drawn = ""  # what the set takes of its files, a part of the content key

    def __init__(
        self,
        paths: list[Path],
        *,
        image_size: int = 224,
        mask_size: int = 320,
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
        self._files: Files | None = None  # their state when the key was made
        self._sample: list[str] | None = None
        self._upright_masks: dict[tuple[int, fit.Size], bool] = {}  # results of `fitting`

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        return self.paths[index].name

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file; CorruptImage if it cannot be read."""
        try:
            return self.paths[index].read_bytes()
        except FileNotFoundError:
            other = alike(self.paths[index])
            hint = f", but {other} does: names have to agree in case and spaces" if other else ""
            raise CorruptImage(f"image {self.paths[index]} does not exist{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise CorruptImage(f"image {self.paths[index]} cannot be read: {reason}") from None

    def rgb(self, index: int, upright: bool | None = None) -> Image.Image:
        """The decoded image; errors as in `prepared`. upright: None for the set's own."""
        upright = self.upright if upright is None else upright
        return opening.open_rgb(self.paths[index], self.encoded(index), upright=upright)

    def geometry(self, width: int, height: int, rng: np.random.Generator) -> Geometry:
        """The training square of an image of that size; draws from `rng` if the crop is random."""
        size = self.image_size
        if self.crop == "stretch":
            return Geometry(size, size, 0, 0)
        width, height = transforms.minor_size(width, height, size)
        corner = transforms.random_corner if self.random_crop else transforms.center_corner
        left, top, *kept = transforms.kept_part(width, height, size)
        across, down = corner(*kept, size, rng)
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
            upright = None  # `val_masks` reports what is wrong with the masks
        return transforms.to_tensor(self._resized(index, "stretch" if self.crop == "stretch" else "center", upright))

    def drawn_size(self, index: int) -> fit.Size | None:
        """(width, height) of a validation image's masks; None if they do not decide its orientation."""
        return None

    def fitting(self, index: int, size: fit.Size, source: Path | str) -> bool:
        """Whether masks of `size` (width, height) fit the image that EXIF turns upright, not the stored one.

        They fit an image of their size or shape. If they fit both, as with squares, `upright_alike` decides; if
        neither, UserError names their file `source`, the image and both sizes.
        """
        if (index, size) not in self._upright_masks:
            encoded, otherwise = self.encoded(index), self.upright_alike(index)
            stored = upright = fit.stored_size(self.paths[index], encoded)
            if otherwise or size != stored:  # reading EXIF costs more than reading the size
                stored, upright = fit.both_sizes(self.paths[index], encoded)
            answer = fit.turned(size, stored, upright, otherwise)
            if answer is None:
                also = f" ({upright[0]} x {upright[1]} upright)" if upright != stored else ""
                raise UserError(
                    f"{source} gives {self.paths[index].name} masks of {size[0]} x {size[1]}, but it is "
                    f"{stored[0]} x {stored[1]}{also}: masks need the image's size or shape"
                )
            self._upright_masks[index, size] = answer
        return self._upright_masks[index, size]

    def upright_alike(self, index: int) -> bool:
        """Whether masks whose size fits both images were drawn on the upright one."""
        return self.upright

    def _resized(self, index: int, crop: str, upright: bool | None = None) -> Image.Image:
        image = self.rgb(index, upright)
        with opening.memory_of(self.paths[index]):
            if crop == "stretch":
                return transforms.stretch(image, self.image_size)
            image = transforms.resize_minor(image, self.image_size)
            return image if crop == "random" else transforms.center_crop(image, self.image_size)

    def content_key(self) -> str:
        if not self._key:  # stat of all files takes seconds in a large set
            self._files = Files(self.sources())
            about = (self.image_size, self.crop, self.upright, len(self), self.drawn)
            words = (transforms.VERSION, *about, self._files.key)
            self._key = hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()
        return self._key

    def sample(self) -> list[str]:
        if self._sample is None:
            self._sample = sample(self.sources())
        return self._sample

    def take_key(self, key: str) -> None:
        """Sets the `content_key`, which one of several processes computes for all."""
        self._key = key

    def changed(self, indices: Iterable[int]) -> list[int]:
        if self._files is None:
            return []
        indices = list(indices)
        sources = [self.source(index) for index in indices]
        changed = set(self._files.changed(dict.fromkeys(sources)))
        return [index for index, source in zip(indices, sources, strict=True) if source in changed]

    def sources(self) -> Sequence[Path]:
        """The files that the images come from."""
        return self.paths

    def source(self, index: int) -> int:
        """Index in `sources` of the file that the image comes from."""
        return index

    def square_labels(self, labels: np.ndarray) -> torch.Tensor:
        """A label map [height, width] as int64 [M, M], cropped or stretched as validation images are."""
        if self.crop == "stretch":
            return transforms.stretch_labels(labels, self.mask_size)
        return transforms.center_crop_labels(labels, self.mask_size)


__all__ = ["CorruptImage", "FullLabels", "Geometry", "ImageFiles", "ImageSet", "Masks"]
