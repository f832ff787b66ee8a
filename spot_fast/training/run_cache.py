"""What a run caches of its training images, and from where it reads them afterwards (`data.cache` chooses)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spot_fast.config import Config
from spot_fast.data import Loader
from spot_fast.data.base import ImageFiles
from spot_fast.data.caching import feature_cache, pixel_cache
from spot_fast.data.caching import plan as cache
from spot_fast.data.caching.rebuild import require_complete
from spot_fast.data.caching.store import NotBuilt
from spot_fast.data.loading.loader import MAX_THREADS
from spot_fast.training.distributed import World


@dataclass(frozen=True)
class Chosen:
    """What a run will cache, and the fields of its frozen features where these may be cached."""

    plan: cache.Plan
    fields: list[feature_cache.Field]


@dataclass(frozen=True)
class Source:
    """loader: gives the run's batches; features: the frozen features of what it would give, None where they are not
    cached."""

    loader: Loader
    features: feature_cache.FeatureCache | None = None


def choose(
    config: Config,
    loader: Loader,
    fields: Callable[[], list[feature_cache.Field]],
    *,
    device: torch.device,
    world: World,
) -> Chosen:
    """What pays for a run whose images `loader` gives; fields: what is known of its features, asked for if needed.

    UserError where what --cache or --cache-dir asks for cannot be. Nothing is written.
    """
    kept = fields() if config.cache in ("auto", "features") else []
    if world.size > 1 and config.cache != "none" and isinstance(loader.image_set, ImageFiles):
        # Other machines have copies of the images, with inodes of their own.
        loader.image_set.take_key(world.first(loader.image_set.content_key))
    plan = world.first(
        lambda: cache.plan(
            config.cache,
            loader.image_set,
            kept,
            epochs=config.epochs,
            device=device,
            folder=cache.folder_of(config.cache_dir),
            decoder=loader.decoder,
            processes=world.size,
        )
    )
    return Chosen(plan, kept)


def open_source(
    config: Config,
    loader: Loader,
    decoding: str,
    chosen: Chosen,
    function: feature_cache.Function,
    *,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> Source:
    """Caches what was chosen; rank 0 builds what is on disk, then all read it.

    function: gives the fields of a batch of images. decoding: the sentence about who decodes. UserError where a cache
    cannot be written, or more images are corrupt than the loader puts up with.
    """
    image_set, plan, kept = loader.image_set, chosen.plan, chosen.fields
    # Each process holds all rows of what is held in memory, on its own device.
    holder = device if plan.device is not None and plan.device.type == device.type else plan.device
    if isinstance(image_set, ImageFiles) and not plan.complete:
        say(decoding)
    say(plan.reason)
    if plan.on_disk is not None and (reason := world.first(lambda: _not_built(config, loader, function, chosen, say))):
        say(f"nothing is cached: {reason}")
        return Source(loader)
    if plan.kind == "pixels":
        return Source(_pixels(config, loader, plan, holder, world))
    if plan.kind != "features":
        return Source(loader)
    if plan.on_disk is None:
        progress = None if world.main else False
        found = world.together(lambda: feature_cache.in_memory(loader, function, kept, holder, progress))
    else:
        found = world.together(
            lambda: feature_cache.opened(loader, kept, feature_cache.stores_of(image_set, kept, plan.on_disk))
        )
        if holder is not None:
            world.together(lambda: found.hold(holder))
    # Nothing is decoded any more, and a decoder on the GPU would go on holding memory.
    rows = Loader(image_set, config.batch_size, config.seed, rank=world.rank, world=world.size)
    rows.note_corrupt(loader.corrupt)
    return Source(rows, found)


def _not_built(
    config: Config, loader: Loader, function: feature_cache.Function, chosen: Chosen, say: Callable[[str], None]
) -> str:
    """Completes the stores on disk. Why that is impossible, where the user has not asked for a cache; else ""."""
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


def _pixels(config: Config, loader: Loader, plan: cache.Plan, holder: torch.device | None, world: World) -> Loader:
    def opened() -> pixel_cache.CachedPixels:
        store = pixel_cache.store_of(loader.image_set, plan.on_disk, loader.decoder)
        require_complete([store])
        return pixel_cache.CachedPixels(loader.image_set, store, holder)

    pixels = world.together(opened)
    # Its rows are only copied: threads do, and a process would be sent a copy of the whole file.
    rows = Loader(
        pixels, config.batch_size, config.seed, min(loader.workers, MAX_THREADS), rank=world.rank, world=world.size
    )
    rows.note_corrupt(dict(pixels.corrupt.values()))
    return rows
