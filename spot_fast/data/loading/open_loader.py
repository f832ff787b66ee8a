"""Chooses a run's loader: `--loader` auto, dali or torch."""

from __future__ import annotations

import torch

from spot_fast.data.base import ImageFiles, ImageSet
from spot_fast.data.loading.dali_loader import DaliLoader
from spot_fast.data.loading.dali_pipeline import unavailable
from spot_fast.data.loading.loader import MAX_THREADS, Loader
from spot_fast.errors import UserError, one_line
from spot_fast.system.cpu_threads import available_cores

_MOST_WORKERS = 16  # by default


def open_loader(
    config_loader: str,
    image_set: ImageSet,
    batch_size: int,
    seed: int,
    workers: int | None,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> tuple[Loader, str]:
    """(the loader, a line that says what decodes and why); UserError if dali is requested and does not work.

    workers: None is one for each core that this process may use, divided by `world`, at most 16.

    auto is DALI if it works and `device` is a GPU. On a CPU it is Pillow, whose pixels are the reference, though DALI
    decodes 335 images/s a core against Pillow's 242 (JPEGs of 640 x 480; photos of 480 x 360, 550 against 413, but
    stretched 225 against 353: `bench/loader_speed.py`).
    """
    if config_loader not in ("auto", "dali", "torch"):
        raise UserError(f"--loader {config_loader} is unknown: use auto, dali or torch")
    if workers is None:
        workers = max(1, min(_MOST_WORKERS, available_cores() // world))
    shared = (image_set, batch_size, seed, workers)
    if getattr(image_set, "images", None) is not None:
        return Loader(*shared, rank=rank, world=world), f"{image_set.name} are in memory: nothing is decoded"
    why = ""
    if config_loader == "torch":
        why = "--loader torch"
    elif not isinstance(image_set, ImageFiles):
        why = f"{image_set.name} are not image files"
    elif config_loader == "auto" and device.type != "cuda":
        why = f"the run is on {device.type}"
    elif config_loader == "auto":
        why = unavailable(device)
    if not why:
        try:
            loader = DaliLoader(*shared, device=device, rank=rank, world=world)
            where = "GPU" if device.type == "cuda" else "CPU"
            return loader, f"images are decoded by DALI on the {where} (other formats than JPEG by Pillow)"
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)
            if config_loader == "dali":
                raise UserError(f"--loader dali does not start ({reason}): use --loader torch") from error
            why = f"DALI does not start ({reason})"
    if workers > 1:
        where = f"in {workers} {'processes' if workers > MAX_THREADS else 'threads'}"
    else:
        where = "in one thread" if workers else "in the training thread"
    return Loader(*shared, rank=rank, world=world), f"images are decoded by Pillow {where}: {why}"
