"""The input of a training step: a batch of images, or of their cached features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Batch:
    """B training images, or their cached frozen features; a pytree.

    images: uint8 [B, 3, S, S], None in a batch of features.
    indices: int64 [B], the images' indices in their set; flipped: bool [B], which of them are mirrored.
    features: one tensor [B, …] a field of the cache, () in a batch of images.
    """

    images: Tensor | None
    indices: Tensor
    flipped: Tensor
    features: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Batch:
        images = None if self.images is None else self.images[rows]
        features = tuple(field[rows] for field in self.features)
        return Batch(images, self.indices[rows], self.flipped[rows], features)


pytree.register_dataclass(Batch)
