"""Chooses and opens a run's cache of its training images: frozen features, decoded pixels or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spot_fast.config import Config
from spot_fast.data import Loader
from spot_fast.data.base import ImageFiles
from spot_fast.data.caching import feature_cache, pixel_cache
from spot_fast.data.caching.plan import Plan, folder_of, plan
from spot_fast.data.caching.rebuild import require_complete
from spot_fast.data.caching.store import NotBuilt
from spot_fast.data.loading.loader import MAX_THREADS
from spot_fast.recipes import timm_name
from spot_fast.training.distributed import World
from spot_fast.training.step import Forward


@dataclass(frozen=True)
class Chosen:
    """What a run will cache, and the fields of its frozen features where these may be cached."""

    plan: Plan
    fields: list[feature_cache.Field]


def frozen_fields(config: Config, forward: Forward, encoder_sha256: str, loader_kind: str) -> list[feature_cache.Field]:
    """The fields of `Forward.frozen_features`, each with a key of all that it depends on besides the image."""
    one = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
    # The encoder's name too: heads, activations and epsilons do not show in its weights.
    words = (
        timm_name(config.encoder),
        encoder_sha256,
        config.feature_norm,
        forward.precision,
        forward.device.type,
        loader_kind,
    )
    key = " ".join(map(str, words))
    keys = key, f"{key} {forward.model.encoder.first_last_block}"
    return [
        feature_cache.Field(name, tuple(value.shape[1:]), value.dtype, key)
        for name, key, value in zip(("target", "hidden"), keys, forward.frozen_features(one), strict=False)
    ]


def choose(config: Config, loader: Loader, forward: Forward, encoder_sha256: str, world: World) -> Chosen:
    """The cache that pays for a run of `loader`'s images.

    UserError where what --cache or --cache-dir asks for cannot be. Nothing is written.
    """
    fields = []
    if config.cache in ("auto", "features"):
        fields = frozen_fields(config, forward, encoder_sha256, loader.kind)
    if world.size > 1 and config.cache != "none" and isinstance(loader.image_set, ImageFiles):
        # The key hashes inodes, which differ where another machine has a copy of the images.
        loader.image_set.take_key(world.on_rank_0(loader.image_set.content_key))
    chosen = world.on_rank_0(
        lambda: plan(
            config.cache,
            loader.image_set,
            fields,
            epochs=config.epochs,
            device=forward.device,
            folder=folder_of(config.cache_dir),
            decoder=loader.decoder,
            processes=world.size,
        )
    )
    return Chosen(chosen, fields)


def open_source(
    config: Config,
    loader: Loader,
    decoding: str,
    chosen: Chosen,
    forward: Forward,
    *,
    world: World,
    say: Callable[[str], None],
) -> tuple[Loader, feature_cache.FeatureCache | None]:
    """Opens the chosen cache: (the run's loader from here on, the features of its batches where they are cached).

    Rank 0 builds what is missing on disk, then all ranks read it. decoding: the line about who decodes. UserError
    where a cache cannot be written, or more images are corrupt than the loader tolerates.
    """
    device, function = forward.device, forward.frozen_features
    image_set, plan, fields = loader.image_set, chosen.plan, chosen.fields
    # A cache in memory is held whole by every process, on its own device: any image may be in its next shard.
    holder = device if plan.device is not None and plan.device.type == device.type else plan.device
    if isinstance(image_set, ImageFiles) and not plan.complete:
        say(decoding)
    say(plan.reason)
    if plan.on_disk is not None and (
        reason := world.on_rank_0(lambda: _not_built(config, loader, function, chosen, say))
    ):
        say(f"nothing is cached: {reason}")
        return loader, None
    if plan.kind == "pixels":
        return _pixels(config, loader, plan, holder, world), None
    if plan.kind != "features":
        return loader, None
    if plan.on_disk is None:
        progress = None if world.is_rank_0 else False
        features = world.on_all_ranks(lambda: feature_cache.in_memory(loader, function, fields, holder, progress))
    else:
        features = world.on_all_ranks(
            lambda: feature_cache.opened(loader, fields, feature_cache.stores_of(image_set, fields, plan.on_disk))
        )
        if holder is not None:
            world.on_all_ranks(lambda: features.hold(holder))
    # A new loader without a decoder: nothing is decoded from here on, and DALI would go on holding GPU memory.
    rows = Loader(image_set, config.batch_size, config.seed, rank=world.rank, world=world.size)
    rows.note_corrupt(loader.corrupt)
    return rows, features


def _not_built(
    config: Config, loader: Loader, function: feature_cache.Function, chosen: Chosen, say: Callable[[str], None]
) -> str:
    """Completes the stores on disk. Returns "", or with --cache auto the reason why that is impossible."""
    plan = chosen.plan
    try:
        if plan.kind == "pixels":
            store = pixel_cache.store_of(loader.image_set, plan.on_disk, loader.decoder)
            pixel_cache.build(loader, store, say=say)
        else:
            stores = feature_cache.stores_of(loader.image_set, chosen.fields, plan.on_disk)
            feature_cache.build(loader, function, stores, say=say)
    except NotBuilt as error:
        if config.cache != "auto":
            raise
        return str(error)
    return ""


def _pixels(config: Config, loader: Loader, plan: Plan, holder: torch.device | None, world: World) -> Loader:
    def opened() -> pixel_cache.CachedPixels:
        store = pixel_cache.store_of(loader.image_set, plan.on_disk, loader.decoder)
        require_complete([store])
        return pixel_cache.CachedPixels(loader.image_set, store, holder)

    pixels = world.on_all_ranks(opened)
    # Rows are only copied, for which threads suffice; a worker process would get a copy of the whole file.
    rows = Loader(
        pixels, config.batch_size, config.seed, min(loader.workers, MAX_THREADS), rank=world.rank, world=world.size
    )
    rows.note_corrupt(dict(pixels.corrupt.values()))
    return rows
