"""Decides what to cache of the training images, frozen features, decoded pixels or nothing, and where.

Features are best if an image has one outcome or two and their size allows; a random crop has unlimited outcomes, so
pixels are cached instead. Features live in the device's memory, in the machine's, or on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spot_fast.data.base import ImageSet
from spot_fast.data.caching import pixel_cache
from spot_fast.data.caching.feature_cache import Field, outcomes, stores_of
from spot_fast.data.caching.store import Store
from spot_fast.errors import UserError
from spot_fast.files import expanded

_SHARE = 0.5  # of the free memory or disk that a cache takes by default
_DISK_MARGIN = 2**28  # left free in any case


@dataclass(frozen=True)
class Plan:
    """kind: none, pixels or features. reason: the sentence for the user. device: whose memory holds them, None if they
    are read from the folder `on_disk`. complete: already on disk."""

    kind: str
    reason: str
    device: torch.device | None = None
    on_disk: Path | None = None
    complete: bool = False


def folder_of(given: str | None) -> Path | None:
    """--cache-dir, $SPOT_FAST_CACHE or ~/.cache/spot_fast, which need not exist; None without a home folder.

    UserError if --cache-dir is no folder and cannot be made.
    """
    named = os.environ.get("SPOT_FAST_CACHE") if given is None else given
    folder = expanded(named or "~/.cache/spot_fast")
    if given is None:
        return folder
    if not given:
        raise UserError("--cache-dir is empty: name a folder")
    if folder is None:
        raise UserError(f"--cache-dir {given}: the home folder is not known ($HOME is not set), write it out")
    if not os.path.isdir(folder) and not _can_be_written(folder):
        raise UserError(f"--cache-dir {given} is not a folder that can be made and written to: use another one")
    return folder


def _existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _can_be_written(folder: Path) -> bool:
    existing = _existing(folder)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _no_room(folder: Path | None) -> str:
    """Why `folder` cannot take the cache."""
    if folder is None:
        return "there is no folder for it, $HOME is not set (name one with --cache-dir)"
    if not _can_be_written(folder):
        return f"{folder} {'cannot be' if os.path.isdir(folder) else 'is not a folder that can be made and'} written to"
    return f"{folder} has only {text(free_disk(folder))} free"


def plan(
    mode: str,
    image_set: ImageSet,
    fields: Sequence[Field],
    *,
    epochs: int,
    device: torch.device,
    folder: Path | None,
    decoder: str = "torch",
    processes: int = 1,
) -> Plan:
    """Plans what to cache of `image_set`; mode is none, pixels, features or auto.

    fields: the frozen features of an image; folder: of caches, if there is one; decoder: the loader's; processes: how
    many train together, each with its own copy in memory. UserError if the requested mode is impossible, or too large
    for memory and disk.
    """
    if mode == "none":
        return Plan("none", "nothing is cached: --cache none")
    if mode == "pixels":
        return _pixels(image_set, folder, device, decoder, asked=True, why="--cache pixels")
    if not outcomes(image_set):
        why = f"a random crop of {image_set.name} has unlimited outcomes, so its features cannot be cached"
        if mode == "features":
            raise UserError(f"--cache features: {why}: use --cache pixels, or --crop center or stretch")
        return _pixels(image_set, folder, device, decoder, asked=False, why=why, epochs=epochs)
    features = _features(image_set, fields, folder, device, asked=mode == "features", processes=processes)
    if mode == "features" or (features.kind == "features" and epochs > outcomes(image_set)):
        return features
    why = features.reason
    if features.kind == "features":
        times = "once" if epochs == 1 else f"in {epochs} epochs about once mirrored and once not"
        why = f"every image is needed {times}, so features are not cached"
    return _pixels(image_set, folder, device, decoder, asked=False, why=why, epochs=epochs)


def _features(
    image_set: ImageSet,
    fields: Sequence[Field],
    folder: Path | None,
    device: torch.device,
    *,
    asked: bool,
    processes: int,
) -> Plan:
    size = sum(field.nbytes for field in fields) * len(image_set) * outcomes(image_set)
    sides = ", mirrored and not" if outcomes(image_set) == 2 else ""
    dtype = str(fields[0].dtype).removeprefix("torch.")
    what = f"features of {len(image_set)} images{sides}, {text(size)} in {dtype}"
    share = 1.0 if asked else _SHARE

    def fits(memory: torch.device) -> bool:
        if memory.type == "cpu":  # all processes share it
            return size * processes <= share * free_bytes(memory)
        return size <= _SHARE * free_bytes(memory)  # even on request: a GPU has to hold the training too

    holder = next(filter(fits, dict.fromkeys([device, torch.device("cpu")])), None)
    if not image_set.content_key():
        if holder is not None:
            copies = f", in each of {processes} processes" if processes > 1 else ""
            where = f"{text(free_bytes(holder))} free on {holder.type}"
            return Plan("features", f"{what}, are cached{copies}: {where}", holder)
        return _refuse(asked, f"{what}, do not fit the memory: {text(free_bytes(torch.device('cpu')))} are free")
    stores = [] if folder is None else stores_of(image_set, fields, folder)
    complete, built = _complete(stores), sum(store.nbytes for store in stores)
    free = 0 if folder is None else free_disk(folder)
    if complete or size - built <= share * (free - _DISK_MARGIN):
        state = "are read from" if complete else "are built once in"
        rest = "" if complete else f" ({text(free)} free there{f', {text(built)} are built' if built else ''})"
        if device.type == "cpu" or holder == device:
            held = f" and held on {device.type}" if device.type != "cpu" else ""
            return Plan("features", f"{what}, {state} {folder}{rest}{held}", device if held else None, folder, complete)
        if asked or holder is not None:
            return Plan("features", f"{what}, {state} {folder}{rest}", None, folder, complete)
        why = "do not fit the memory, and to read them from disk takes longer than to compute them on a GPU"
        return Plan("none", f"{what}, {why}")
    if holder is not None:
        return Plan("features", f"{what}, are cached on {holder.type} for this run alone: {_no_room(folder)}", holder)
    memory = text(free_bytes(torch.device("cpu")))
    return _refuse(asked, f"{what}, cannot be kept: {_no_room(folder)}, {memory} are free in memory")


def _refuse(asked: bool, reason: str) -> Plan:
    if asked:
        raise UserError(f"--cache features: {reason}; use --cache pixels, another --cache-dir or fewer --train-images")
    return Plan("none", reason)


def _pixels(
    image_set: ImageSet,
    folder: Path | None,
    device: torch.device,
    decoder: str,
    *,
    asked: bool,
    why: str,
    epochs: int = 2,
) -> Plan:
    if not image_set.content_key():
        return Plan("none", f"nothing is cached: {image_set.name} are in memory already" if asked else why)
    if epochs < 2:
        return Plan("none", why)
    if image_set.random_crop and decoder != "torch":
        if asked:
            raise UserError(
                "--cache pixels keeps whole images, as Pillow decodes them, where a crop is random: use "
                "--loader torch, or --cache none with --loader dali"
            )
        return Plan("none", f"{why}, and --loader dali gives no whole images to keep")
    stores = [] if folder is None else [pixel_cache.store_of(image_set, folder, decoder)]
    complete, built = _complete(stores), sum(store.nbytes for store in stores)
    size = built if complete else pixel_cache.expected_bytes(image_set)
    free = 0 if folder is None else free_disk(folder)
    what = f"decoded pixels of {len(image_set)} images, {text(size)}"
    if not complete and size - built > (1.0 if asked else _SHARE) * (free - _DISK_MARGIN):
        if asked:
            raise UserError(
                f"--cache pixels: {what}, cannot be kept: {_no_room(folder)}; use another --cache-dir, "
                "--cache none or fewer --train-images"
            )
        if not free:
            return Plan("none", f"{why}; {what}, are not kept: {_no_room(folder)}")
        return Plan("none", f"{why}; {what}, are more than half of the {text(free)} that are free in {folder}")
    state = "are read from" if complete else "are built once in"
    held = device.type == "cuda" and not image_set.random_crop and size <= _SHARE * free_bytes(device)
    reason = f"{why}: {what}, {state} {folder}{' and held on the GPU' if held else ''}"
    return Plan("pixels", reason, device if held else None, folder, complete)


def _complete(stores: Sequence[Store]) -> bool:
    return bool(stores) and all(store.complete for store in stores)


def text(size: float) -> str:
    """A size in bytes in readable units, such as 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def free_disk(folder: Path) -> int:
    """Bytes free below `folder`, which need not exist yet; 0 if it is not writable."""
    return shutil.disk_usage(_existing(folder)).free if _can_be_written(folder) else 0


def free_bytes(device: torch.device) -> int:
    """Free memory of `device`, on a CPU within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_read_number("/proc/meminfo", "MemAvailable:") * 1024]
    versions = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in versions:  # of control groups
        if most := _read_number(f"/sys/fs/cgroup/{limit}"):
            free.append(max(0, most - _read_number(f"/sys/fs/cgroup/{used}")))
    return min(value for value in free if value) if any(free) else 0


def _read_number(file: str, after: str = "") -> int:
    """The integer that follows the word `after` in `file`, 0 if there is none."""
    try:
        words = Path(file).read_text(encoding="utf-8").split()
        return int(words[words.index(after) + 1 if after else 0])
    except (OSError, ValueError, IndexError):
        return 0
