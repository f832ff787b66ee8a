"""Training images decoded and resized once, kept as uint8 in one memory-mapped file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spot_fast.data.base import ImageFiles, ImageSet, Masks
from spot_fast.data.caching.rebuild import full_batches, progress_bar, readable_again, refill, require_unchanged
from spot_fast.data.caching.store import Store, Writer, located
from spot_fast.data.loading.loader import Loader
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.errors import CorruptImage
from spot_fast.system.devices import send

_SAMPLE = 64  # images from which the size of a cache for random crops is estimated


class CachedPixels(ImageSet):
    """`image_set` with training images from a store; all else, validation included, is the set's own.

    images exists if they are squares: indexed with int64 [B] it gives uint8 [B, 3, S, S].
    """

    def __init__(self, image_set: ImageFiles, store: Store, device: torch.device | None = None) -> None:
        self.image_set, self.store = image_set, store
        self.name, self.has_masks, self.has_classes = image_set.name, image_set.has_masks, image_set.has_classes
        self.flip, self.random_crop = image_set.flip, image_set.random_crop
        if not self.random_crop and len(store.corrupt) < len(image_set):
            self.images = _Squares(store, device)

    @property
    def corrupt(self) -> dict[int, tuple[str, str]]:
        """Label and reason of corrupt images, by index."""
        return self.store.corrupt

    def __len__(self) -> int:
        return len(self.image_set)

    def label(self, index: int) -> str:
        return self.image_set.label(index)

    def prepared(self, index: int) -> Tensor:
        if index in self.store.corrupt:
            raise CorruptImage(self.store.corrupt[index][1])
        line = self.store.lines[index]
        return torch.from_numpy(self.store.row(index)).view(3, int(line["height"]), int(line["width"]))

    def finish(self, prepared: Tensor, rng: np.random.Generator) -> Tensor:
        return self.image_set.finish(prepared, rng)

    def content_key(self) -> str:
        return self.image_set.content_key()

    def val_image(self, index: int) -> Tensor:
        return self.image_set.val_image(index)

    def val_masks(self, index: int) -> Masks:
        return self.image_set.val_masks(index)


class _Squares:
    """The images of a store of squares; held on `device` if given."""

    def __init__(self, store: Store, device: torch.device | None) -> None:
        self.store = store
        self.size = int(store.lines["height"].max())
        self._held = None
        if device is not None:
            self._held = torch.empty(store.count, 3, self.size, self.size, dtype=torch.uint8, device=device)
            for rows in np.array_split(np.arange(store.count), max(1, store.count // 1024)):
                self._held[rows[0] : rows[-1] + 1] = self._read(rows).to(device)

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.store.take(rows)).view(-1, 3, self.size, self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self._read(indices.numpy()) if self._held is None else self._held[send(indices, self._held.device)]


def store_of(image_set: ImageFiles, folder: Path, decoder: str = Loader.kind) -> Store:
    """The pixel store of `image_set` below `folder`, complete or not; decoder: as `Loader.decoder`."""
    key = hashlib.sha256(f"{image_set.content_key()} {decoder}".encode()).hexdigest()
    about = {"kind": "pixels", "key": key, "data": image_set.name, "decoder": decoder}
    return located(folder, f"pixels-{key[:20]}", len(image_set), about)


def expected_bytes(image_set: ImageFiles) -> int:
    """Size of the pixel store: exact if images are squares, else estimated from the first readable images."""
    if not image_set.random_crop:
        return 3 * image_set.image_size**2 * len(image_set)
    sizes = []
    for index in range(len(image_set)):
        try:
            sizes.append(image_set.prepared(index).numel())
        except CorruptImage:
            continue
        if len(sizes) == _SAMPLE:
            break
    return int(np.mean(sizes) * len(image_set)) if sizes else 0


def build(loader: Loader, store: Store, *, progress: bool | None = None, say: Callable[[str], None] = print) -> None:
    """Writes the images that `store` lacks, or that an earlier build could not read, as `loader` decodes them.

    UserError if too many are corrupt, NotBuilt if the store cannot be written or images change meanwhile.
    """
    image_set = loader.image_set
    decode = _uncropped if image_set.random_crop else _squares
    if readable := readable_again(image_set, sorted(store.corrupt)):
        with closing(decode(loader, readable)) as images:
            found = [
                (index, image.numpy(), *image.shape[1:])
                for index, image in zip(readable, images, strict=True)
                if image is not None
            ]
        require_unchanged(image_set, readable)
        refill(store, found, say)
    with store.building(say) as writer:
        if writer is None:
            return
        loader.note_corrupt(dict(store.corrupt.values()))
        images = decode(loader, range(writer.written, store.count))
        with progress_bar("pixels", store.count, writer.written, progress) as bar, closing(images):
            for index, image in enumerate(images, writer.written):
                require_unchanged(image_set, [index])
                _append(loader, writer, index, image)
                bar.update()


def _append(loader: Loader, writer: Writer, index: int, image: Tensor | None) -> None:
    if image is not None:
        writer.append(image.numpy(), height=image.shape[1], width=image.shape[2])
        return
    side, label = 0 if loader.image_set.random_crop else loader.image_set.image_size, loader.image_set.label(index)
    writer.append(np.zeros((3, side, side), np.uint8), height=side, width=side, corrupt=(label, loader.corrupt[label]))


def _squares(loader: Loader, indices: Sequence[int]) -> Iterator[Tensor | None]:
    """The images `indices`, None for a corrupt one."""
    with closing(full_batches(loader, torch.tensor(indices, dtype=torch.int64))) as batches:
        for _, good, images in batches:
            yield from (image if right else None for image, right in zip(images.cpu(), good.tolist(), strict=False))


def _uncropped(loader: Loader, indices: Sequence[int]) -> Iterator[Tensor | None]:
    """The same before the crop, decoded by Pillow in threads."""
    image_set = loader.image_set
    ahead = read_ahead(image_set.prepared, indices, depth=4 * loader.workers, workers=loader.workers, name="pixels")
    with closing(ahead):
        for index, future in zip(indices, ahead, strict=True):
            try:
                image = future.result()
            except CorruptImage as error:
                loader.note_corrupt({image_set.label(index): str(error)})
                image = None
            yield image
