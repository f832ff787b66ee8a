"""What segments images: a trained run, or k-means on an encoder's features, in batches and at any grid of patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_fast.checkpoints import runs as checkpoint
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.evaluation.baselines import kmeans_labels
from spot_fast.model.encoder import SCENES_ENCODER, Encoder, normalise
from spot_fast.model.regrid import at_grid, sharing_copy
from spot_fast.model.spot import Spot
from spot_fast.precision import autocast, float32_products, resolve
from spot_fast.random_streams import Stream, seed_of
from spot_fast.segmentation.colours import MAX_LABELS
from spot_fast.system.devices import send

CLUSTER_SIZE = 448  # twice what most ViTs were trained at: finer clusters
CAPTIONS = {"decoder": "decoder masks", "slots": "slot masks", "clusters": "feature clusters"}
_SHARPNESS = 10.0  # of clusters' soft masks: exp(-10 · squared distance) of unit vectors, normalised
_MOST_GRIDS = 16  # other grids whose models are kept


@dataclass(frozen=True)
class Found:
    """Of B images of one size: soft masks [B, N, K] float32 by kind, and the slots [B, K, U] of a run."""

    masks: dict[str, Tensor]
    slots: Tensor | None = None


class Masker:
    """Segments batches of images.

    size, patch: the side of the square that the model was made for and of its patches, in pixels. kinds: which masks
    it finds, in CAPTIONS; the first makes the label map. identity: names the model, for files made by it.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        size: int,
        patch: int,
        device: str,
        identity: str,
        see: Callable[[Tensor], Found],
        see_at: Callable[[int, int], Callable[[Tensor], Found]],
    ) -> None:
        self.kinds, self.size, self.patch, self.identity = kinds, size, patch, identity
        self._device, self._see_at = device, see_at
        self._grids = {(size // patch, size // patch): see}

    @torch.no_grad()
    def find(self, images: Tensor) -> Found:
        """uint8 [B, 3, H, W] of sides that are multiples of the patch → what is in them, on the CPU."""
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        if grid not in self._grids:
            if len(self._grids) > _MOST_GRIDS:
                del self._grids[next(islice(self._grids, 1, None))]  # the oldest but the model's own
            self._grids[grid] = self._see_at(*grid)
        found = self._grids[grid](normalise(send(images, torch.device(self._device))))
        masks = {kind: soft.float().cpu() for kind, soft in found.masks.items()}
        return Found(masks, None if found.slots is None else found.slots.float().cpu())

    def __call__(self, image: Tensor) -> list[tuple[str, Tensor]]:
        """A single image [1, 3, H, W] → (caption, soft masks [N, K]) of each kind."""
        return [(CAPTIONS[kind], soft[0]) for kind, soft in self.find(image).masks.items()]


def model_masker(model: Spot, identity: str, *, orders: str = "0", seed: int = 0, precision: str = "float32") -> Masker:
    """Masks and slots of a trained model, on its device. Gaussian slots start from the same noise for every image."""
    config, device = model.config, next(model.parameters()).device
    precision = resolve(precision, device)
    noise = None
    if config.slot_init == "gaussian":
        generator = torch.Generator().manual_seed(seed_of(Stream.SEGMENTATION_SLOTS, seed))
        noise = send(torch.randn(1, config.num_slots, config.slot_dim, generator=generator), device)

    def see(model: Spot, images: Tensor) -> Found:
        draws = None if noise is None else noise.expand(len(images), -1, -1)
        with float32_products(precision), autocast(precision, device):
            output = model.segment(images, orders=orders, noise=draws)
        return Found({"decoder": output.masks, "slots": output.slot_attn}, output.slots)

    def see_at(height: int, width: int) -> Callable[[Tensor], Found]:
        other = at_grid(model, height, width)
        return lambda images: see(other, images)

    return Masker(
        ("decoder", "slots"),
        config.image_size,
        model.encoder.patch_size,
        str(device),
        identity,
        lambda images: see(model, images),
        see_at,
    )


def run_masker(
    run: str | Path | None, *, orders: str, device: str, seed: int = 0, precision: str = "float32"
) -> tuple[Masker, int, str]:
    """(masker, S, what it is) of a trained run, the newest finished one by default."""
    found = checkpoint.load_run(checkpoint.find_folder(run) if run else checkpoint.find_run(), device)
    masker = model_masker(found.model, f"run {found.path.resolve()}", orders=orders, seed=seed, precision=precision)
    return masker, found.config.image_size, f"run {found.path}"


def cluster_masker(
    encoder_name: str, weights: str | None, *, clusters: int, size: int | None, device: str, precision: str = "float32"
) -> tuple[Masker, int, str]:
    """(masker, S, what it is) of k-means on an encoder's features, the ones that SPOT reconstructs."""
    config = preset("scenes") if encoder_name == SCENES_ENCODER else preset("coco", image_size=CLUSTER_SIZE)
    config = replace(config, encoder=encoder_name, encoder_weights=weights, image_size=size or config.image_size)
    encoder = checkpoint.frozen_encoder(config).to(device)
    precision = resolve(precision, torch.device(device))
    if not 1 <= clusters <= min(encoder.num_tokens, MAX_LABELS):
        raise UserError(f"--clusters {clusters}: use 1 to {min(encoder.num_tokens, MAX_LABELS)}")

    def see(encoder: Encoder, images: Tensor) -> Found:
        with float32_products(precision), autocast(precision, torch.device(device)):
            features = encoder(images)
        # Every image is the first of its batch to k-means: the same draws, whatever else is in the batch.
        first = torch.zeros(len(images), dtype=torch.int64)
        members = F.one_hot(kmeans_labels(features, clusters, 0, indices=first), clusters).float()
        # Soft masks by how near each token is to each centre, rather than the labels: their outlines are smooth.
        tokens = F.normalize(features.float(), dim=-1)
        centres = members.mT @ tokens / members.sum(1).clamp(min=1)[..., None]
        nearness = 2 * tokens @ centres.mT - centres.square().sum(-1)[:, None]
        return Found({"clusters": (_SHARPNESS * nearness).softmax(-1)})

    def see_at(height: int, width: int) -> Callable[[Tensor], Found]:
        other = sharing_copy(encoder)
        other.set_grid(height, width, config.pos_resize)
        return lambda images: see(other, images)

    masker = Masker(
        ("clusters",),
        config.image_size,
        encoder.patch_size,
        device,
        f"{clusters} clusters of {encoder_name} {weights or ''}",
        lambda images: see(encoder, images),
        see_at,
    )
    return masker, config.image_size, f"{clusters} clusters of {encoder_name}'s features"
