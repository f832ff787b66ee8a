"""Models that segment batches of images on any grid of patches: a trained run, or k-means on an encoder's features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.checkpoints.runs import MODEL, find_folder, find_run, load_run
from spot_fast.config import Config, preset
from spot_fast.errors import UserError
from spot_fast.evaluation.baselines import kmeans_labels
from spot_fast.model.encoder import Encoder, normalise
from spot_fast.model.regrid import at_grid, sharing_copy
from spot_fast.model.spot import Spot
from spot_fast.model.vits import SCENES_ENCODER
from spot_fast.precision import autocast, float32_products, resolve
from spot_fast.random_streams import Stream, seed_of
from spot_fast.segmentation.colours import MAX_LABELS
from spot_fast.segmentation.files import stamp_of
from spot_fast.system.devices import send

CLUSTER_SIZE = 448  # twice what most ViTs were trained at: finer clusters
CAPTIONS = {"decoder": "decoder masks", "slots": "slot masks", "clusters": "feature clusters"}
_SHARPNESS = 10.0  # of clusters' soft masks: exp(-10 · squared distance) of unit vectors, normalised
_MOST_GRIDS = 16  # models kept for other grids than the model's own


@dataclass(frozen=True)
class Segments:
    """B images of one size: soft masks [B, N, K] float32 by kind, and slots [B, K, U] where the model has them."""

    masks: dict[str, Tensor]
    slots: Tensor | None = None


Segment = Callable[[Tensor], Segments]  # uint8 images [B, 3, H, W] on the device → segments


class Segmenter:
    """Segments batches of images on `device`.

    Args:
        kinds: masks that it makes, keys of CAPTIONS; the label map is of the first.
        size, patch: side of the square that the model was made for and of a patch, in pixels.
        title: names the model for people.
        identity: tells the model from others, for the files made with it.
        version: changes when the model of that identity is trained anew.
        segment: segments images on the model's own grid.
        segment_at: (height, width) in patches → the same for another grid.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        size: int,
        patch: int,
        device: str,
        title: str,
        identity: str,
        segment: Segment,
        segment_at: Callable[[int, int], Segment],
        version: str = "",
    ) -> None:
        self.kinds, self.size, self.patch, self.title = kinds, size, patch, title
        self.identity, self.version = identity, version
        self._device, self._segment_at = device, segment_at
        self._grids = {(size // patch, size // patch): segment}

    @torch.no_grad()
    def segment(self, images: Tensor) -> Segments:
        """uint8 [B, 3, H, W], sides multiples of the patch → segments on the CPU."""
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        if grid not in self._grids:
            if len(self._grids) > _MOST_GRIDS:
                del self._grids[next(islice(self._grids, 1, None))]  # the oldest but the model's own
            self._grids[grid] = self._segment_at(*grid)
        segments = self._grids[grid](send(images, torch.device(self._device)))
        masks = {kind: soft.float().cpu() for kind, soft in segments.masks.items()}
        return Segments(masks, None if segments.slots is None else segments.slots.float().cpu())


def initial_noise(config: Config, seed: int = 0) -> Tensor | None:
    """The draw [1, K, U] from which gaussian slots start in every image; None for learned slots."""
    if config.slot_init != "gaussian":
        return None
    generator = torch.Generator().manual_seed(seed_of(Stream.SEGMENTATION_SLOTS, seed))
    return torch.randn(1, config.num_slots, config.slot_dim, generator=generator)


def model_segmenter(
    model: Spot, *, title: str = "", identity: str = "", orders: str = "0", seed: int = 0, precision: str = "float32"
) -> Segmenter:
    """Masks and slots of a trained model, on its device. Gaussian slots start from the same noise for every image."""
    config, device = model.config, next(model.parameters()).device
    precision = resolve(precision, device)
    noise = initial_noise(config, seed)
    noise = None if noise is None else send(noise, device)

    def segment_with(model: Spot) -> Segment:
        def segment(images: Tensor) -> Segments:
            initial = None if noise is None else noise.expand(len(images), -1, -1)
            with float32_products(precision), autocast(precision, device):
                output = model.segment(normalise(images), orders=orders, noise=initial)
            return Segments({"decoder": output.masks, "slots": output.slot_attn}, output.slots)

        return segment

    return Segmenter(
        ("decoder", "slots"),
        config.image_size,
        model.encoder.patch_size,
        str(device),
        title,
        identity,
        segment_with(model),
        lambda height, width: segment_with(at_grid(model, height, width)),
    )


def run_segmenter(
    run: str | Path | None,
    *,
    orders: str,
    device: str,
    seed: int = 0,
    precision: str = "float32",
    adaptive_slots: bool | None = None,
) -> Segmenter:
    """A trained run, by default the newest finished one; adaptive_slots: None is as the run was trained."""
    loaded = load_run(find_folder(run) if run else find_run(), device)
    if adaptive_slots is not None:
        loaded.model.config = replace(loaded.config, adaptive_slots=adaptive_slots)
    title, identity = f"run {loaded.path}", f"run {loaded.path.resolve()}"
    segmenter = model_segmenter(
        loaded.model, title=title, identity=identity, orders=orders, seed=seed, precision=precision
    )
    segmenter.version = stamp_of(loaded.path if loaded.path.is_file() else loaded.path / MODEL)
    return segmenter


def cluster_segmenter(
    encoder_name: str, weights: str | None, *, clusters: int, size: int | None, device: str, precision: str = "float32"
) -> Segmenter:
    """k-means on an encoder's features, those that SPOT reconstructs."""
    config = preset("scenes") if encoder_name == SCENES_ENCODER else preset("coco", image_size=CLUSTER_SIZE)
    config = replace(config, encoder=encoder_name, encoder_weights=weights, image_size=size or config.image_size)
    encoder = frozen_encoder(config).to(device)
    precision = resolve(precision, torch.device(device))
    if not 1 <= clusters <= min(encoder.num_tokens, MAX_LABELS):
        raise UserError(f"--clusters {clusters}: use 1 to {min(encoder.num_tokens, MAX_LABELS)}")

    def segment_with(encoder: Encoder) -> Segment:
        def segment(images: Tensor) -> Segments:
            with float32_products(precision), autocast(precision, torch.device(device)):
                features = encoder(normalise(images))
            # Every image is the first of its batch to k-means: the same draws, whatever else is in the batch.
            first = torch.zeros(len(images), dtype=torch.int64)
            members = F.one_hot(kmeans_labels(features, clusters, 0, indices=first), clusters).float()
            # Soft masks by distance to each centre rather than the hard labels: resized, their outlines are smooth.
            # ‖t − c‖² = 1 − 2 t·c + ‖c‖² for unit tokens; the 1 cancels in the softmax.
            tokens = F.normalize(features.float(), dim=-1)
            centres = members.mT @ tokens / members.sum(1).clamp(min=1)[..., None]
            nearness = 2 * tokens @ centres.mT - centres.square().sum(-1)[:, None]
            return Segments({"clusters": (_SHARPNESS * nearness).softmax(-1)})

        return segment

    def segment_at(height: int, width: int) -> Segment:
        other = sharing_copy(encoder)
        other.set_grid(height, width, config.pos_resize)
        return segment_with(other)

    return Segmenter(
        ("clusters",),
        config.image_size,
        encoder.patch_size,
        device,
        f"{clusters} clusters of {encoder_name}'s features",
        f"{clusters} clusters of {encoder_name} {weights or ''}",
        segment_with(encoder),
        segment_at,
        stamp_of(weights and Path(weights)),
    )
