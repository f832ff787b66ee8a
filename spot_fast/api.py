"""The library in a few lines: load a model, segment images, get masks and slots.

model = spot_fast.load("runs/coco-stage2-001")      # a folder, the authors' .pt.tar, or owner/name on the hub
result = model.segment_images([Image.open("photo.jpg"), array])
result.labels[0], result.masks[0], result.slots[0]  # [H, W], [K, H, W], [K, U]
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spot_fast.checkpoints.runs import find_folder, find_run, load_run
from spot_fast.checkpoints.shared_folder import save_pretrained
from spot_fast.data.decoding.opening import to_rgb
from spot_fast.data.decoding.transforms import to_tensor
from spot_fast.model import spot
from spot_fast.segmentation import coco
from spot_fast.segmentation.files import key_of
from spot_fast.segmentation.overlays import labels_at
from spot_fast.segmentation.segmenter import Segments, model_segmenter

MASKS = ("decoder", "slots")


@dataclass(frozen=True)
class Segmentation:
    """Slots and masks of B images, on the CPU; `len` is B.

    slots [B, K, U]; decoder_masks and slot_masks [B, N, K]: soft masks of the N = G·G patches in raster layout, summing
    to 1 over slots; sizes: (H, W) of each image; kind: which of the two masks the others are made from; model: a key
    that tells the model from others.
    """

    slots: Tensor
    decoder_masks: Tensor
    slot_masks: Tensor
    sizes: list[tuple[int, int]]
    kind: str = "decoder"
    model: str = ""

    @property
    def token_masks(self) -> Tensor:
        """The soft masks [B, N, K] of `kind`."""
        return self.decoder_masks if self.kind == "decoder" else self.slot_masks

    @property
    def masks(self) -> list[Tensor]:
        """Soft masks [K, H, W] of each image at its own size, float32, bilinear; computed at each access."""
        return [
            _mask_at(masks, height, width) for masks, (height, width) in zip(self.token_masks, self.sizes, strict=True)
        ]

    @property
    def labels(self) -> list[Tensor]:
        """Label maps [H, W] of each image at its own size, uint8: the slot with the largest mask."""
        return [
            torch.from_numpy(labels_at(masks, height, width))
            for masks, (height, width) in zip(self.token_masks, self.sizes, strict=True)
        ]

    def to_coco(self, image_ids: Sequence[Any] | None = None, file_names: Sequence[str] | None = None) -> dict:
        """The segments as a data set in COCO's format, for `json.dump` or `pycocotools.coco.COCO`.

        Each is an annotation of the one category "segment": compressed run lengths, area, bbox, `slot` and `score`, the
        mean of its soft mask over the patches where that is the largest. `COCO.loadRes` takes the "annotations".

        Args:
            image_ids: of the images in an annotation file to compare with (default: 1, 2, …).
            file_names: of the images (default: their ids).

        Raises:
            ValueError: if there are not as many ids or names as images.
        """
        ids = list(image_ids) if image_ids is not None else list(range(1, len(self) + 1))
        names = list(file_names) if file_names is not None else list(map(str, ids))
        for name, values in (("image_ids", ids), ("file_names", names)):
            if len(values) != len(self):
                raise ValueError(f"{name} has {len(values)} entries: give one for each of the {len(self)} images")
        images = (
            coco.ImageEntry(id, name, width, height, coco.regions(labels.numpy(), masks))
            for id, name, (height, width), labels, masks in zip(
                ids, names, self.sizes, self.labels, self.token_masks, strict=True
            )
        )
        return coco.data_set(coco.info(self.model, self.kind), images)

    def __len__(self) -> int:
        return len(self.sizes)


class Spot(spot.Spot):
    """`spot_fast.model.spot.Spot` with methods for images of any size and for folders of models."""

    origin: Path | None = None  # what it was loaded from: a run, a saved folder or a file

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike | None, device: str | torch.device | None = None) -> Spot:
        """A trained model: see `load`."""
        device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        run = load_run(find_folder(path) if path is not None else find_run(), device, model_class=cls)
        run.model.origin = run.path
        return run.model

    def save_pretrained(self, folder: str | os.PathLike, *, scores: Mapping[str, float] | None = None) -> Path:
        """Writes the model to a new folder that can be moved and shared.

        scores: fractions by name, for the model card; by default the last validation of the run it was loaded from.
        UserError if `folder` exists or cannot be written.
        """
        return save_pretrained(self, folder, origin=self.origin, scores=scores)

    def segment_images(self, images: Any, **options: Any) -> Segmentation:
        """Segments PIL images, arrays or tensors of any sizes: see `segment_images` for the options."""
        return segment_images(self, images, **options)


def load(path: str | os.PathLike | None = None, device: str | torch.device | None = None) -> Spot:
    """A trained model in eval mode.

    Args:
        path: run or saved folder, checkpoint file of the authors, or `owner/name` on the hub; None: the newest finished
            run in `runs`.
        device: None: the GPU if there is one.

    Raises:
        UserError: if something is missing or does not fit.
    """
    return Spot.from_pretrained(path, device)


@torch.no_grad()
def segment_images(
    model: spot.Spot, images: Any, *, orders: str = "0", masks: str = "decoder", batch_size: int = 32, seed: int = 0
) -> Segmentation:
    """Segments images of any sizes, each resized as a whole to the model's square, as `spot_fast.segment` does.

    Args:
        images: an image or a sequence of images. An image is a PIL image (its EXIF orientation is ignored), a uint8
            array [H, W, 3] or [H, W], or a uint8 tensor [3, H, W]; a uint8 tensor [B, 3, H, W] or array [B, H, W, 3]
            is B images.
        orders: patch order "0", or "all" averaged.
        masks: the masks that `masks` and `labels` of the result use, "decoder" or "slots".
        batch_size: images at a time.
        seed: of the noise of gaussian initial slots, which is the same for every image.

    Raises:
        ValueError: naming the image and its error.
    """
    if masks not in MASKS:
        raise ValueError(f"masks={masks!r} is unknown: use {' or '.join(map(repr, MASKS))}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use 1 or more")
    rgb = [_rgb(image, number) for number, image in enumerate(_each(images))]
    if not rgb:
        raise ValueError("images is empty: pass at least one image")
    segmenter = model_segmenter(model, orders=orders, seed=seed)
    parts: list[Segments] = []
    # Resized batch by batch: all images at the model's size may not fit into memory at once.
    for start in range(0, len(rgb), batch_size):
        batch = rgb[start : start + batch_size]
        parts.append(segmenter.segment(torch.stack([square(image, segmenter.size) for image in batch])))
    slots = torch.cat([part.slots for part in parts])
    decoder_masks, slot_masks = (torch.cat([part.masks[kind] for part in parts]) for kind in MASKS)
    sizes = [(image.height, image.width) for image in rgb]
    # What tells the segment command's files of this model from others'.
    origin = getattr(model, "origin", None)
    made_by = key_of(f"run {origin.resolve()}") if origin else ""
    return Segmentation(slots, decoder_masks, slot_masks, sizes, masks, made_by)


def square(image: Image.Image, size: int) -> Tensor:
    """An RGB image as a uint8 square [3, S, S], all of it: nothing is cut off."""
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def _each(images: Any) -> Iterable[Any]:
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return images if images.ndim >= 4 else [images]
    return images


def _rgb(image: Any, number: int) -> Image.Image:
    """One image as an RGB image."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str | Path):
        raise ValueError(f"images[{number}] is a path: pass PIL.Image.open({str(image)!r})")
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"images[{number}] is a {type(image).__name__}: pass a PIL image, an array or a tensor")
    if image.dtype not in (np.dtype(np.uint8), torch.uint8):
        raise ValueError(f"images[{number}] has dtype {image.dtype}: pass uint8 values from 0 to 255, not normalised")
    expected = "[3, H, W]" if isinstance(image, Tensor) else "[H, W, 3] or [H, W]"
    array = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    grey = isinstance(array, np.ndarray) and array.ndim == 2
    if not isinstance(array, np.ndarray) or not (grey or array.ndim == 3 and array.shape[2] == 3) or not array.size:
        raise ValueError(f"images[{number}] has shape {list(image.shape)}: expected {expected}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _mask_at(masks: Tensor, height: int, width: int) -> Tensor:
    """Soft masks [N, K] on a square grid → [K, height, width], bilinear without align-corners."""
    grid = round(masks.shape[0] ** 0.5)
    maps = masks.float().T.reshape(1, -1, grid, grid)
    return F.interpolate(maps, (height, width), mode="bilinear")[0]
