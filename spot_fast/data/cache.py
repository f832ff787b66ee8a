"""What a frozen function makes of every training picture, computed once and kept in memory.

Pays where pictures do not change from epoch to epoch: the function then runs once a picture instead of once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from .base import ImageSet
from .loader import Loader

# uint8 pictures [B, 3, S, S] → tensors whose first axis is the picture's.
Function = Callable[[Tensor], tuple[Tensor, ...]]

_SHARE = 0.5  # of the free memory that a cache takes unasked


@dataclass(frozen=True)
class Plan:
    """Where to keep a cache (None: nowhere) and the sentence that explains it."""

    device: torch.device | None
    reason: str


def plan(mode: str, image_set: ImageSet, bytes_per_picture: int, epochs: int, device: torch.device) -> Plan:
    """Whether to keep the function's results for `image_set`; mode is none, features or auto.

    UserError where mode is features and the pictures change or the memory does not suffice.
    """
    if mode == "none":
        return Plan(None, "features are not cached: --cache none")
    if image_set.augments:
        if mode == "features":
            raise UserError("--cache features needs pictures that are the same in every epoch: add --no-flip, and "
                            "--crop center or stretch, or use --cache none")  # fmt: skip
        return Plan(None, "features are not cached: pictures change from epoch to epoch (flip or random crop)")
    if mode == "auto" and epochs < 2:
        return Plan(None, "features are not cached: every picture is needed once")
    size = bytes_per_picture * len(image_set)
    share = _SHARE if mode == "auto" else 1.0
    for place in dict.fromkeys([device, torch.device("cpu")]):
        free = free_bytes(place)
        if size <= share * free:
            return Plan(place, f"features of {len(image_set)} pictures are cached: {_text(size)} of {_text(free)} free "
                               f"on {place.type}")  # fmt: skip
    if mode == "features":
        raise UserError(f"--cache features needs {_text(size)} and {_text(free)} are free: use --cache none or fewer "
                        "--train-images")  # fmt: skip
    return Plan(None, f"features are not cached: {_text(size)} is more than half of the {_text(free)} that are free")


def _text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`, within the control group's limit on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_read_number("/proc/meminfo", "MemAvailable:") * 1024]
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        most = _read_number(f"/sys/fs/cgroup/{limit}")
        if most:
            free.append(max(0, most - _read_number(f"/sys/fs/cgroup/{used}")))
    return min(value for value in free if value) if any(free) else 0


def _read_number(file: str, after: str = "") -> int:
    """The integer that follows the word `after` in `file`, 0 where there is none."""
    try:
        words = Path(file).read_text(encoding="utf-8").split()
        return int(words[words.index(after) + 1 if after else 0])
    except (OSError, ValueError, IndexError):
        return 0


class Cache:
    """The function's results for every picture; `take` gives rows."""

    def __init__(self, tensors: tuple[Tensor, ...], corrupt: dict[str, str]) -> None:
        self.tensors = tensors
        self.corrupt = corrupt  # label → reason of pictures that others stand in for

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Rows of pictures `indices` int64 [B], on `device`."""
        indices = indices.to(self.tensors[0].device, non_blocking=True)
        return tuple(t.index_select(0, indices).to(device, non_blocking=True) for t in self.tensors)


@torch.no_grad()
def fill(image_set: ImageSet, function: Function, *, batch_size: int, device: torch.device, seed: int = 0,
         workers: int = 0, progress: bool | None = None) -> Cache:  # fmt: skip
    """Runs `function` on every training picture and keeps the results on `device`.

    `function` always sees `batch_size` pictures, because the last bits of its results may depend on how many there
    are. A corrupt picture gets the row of the picture that the loader puts in its place in epoch 0.
    """
    count = len(image_set)
    loader = Loader(image_set, 1, seed, workers)
    kept: tuple[Tensor, ...] | None = None
    rows, pictures = [], []
    with tqdm(total=count, desc="features", unit="image", leave=False,
              disable=None if progress is None else not progress) as bar:  # fmt: skip
        for done, (row, batch) in enumerate(zip(loader.order(0).tolist(), loader.epoch(0), strict=True), 1):
            rows.append(row)
            pictures.append(batch.images)
            bar.update()
            if len(rows) == batch_size or done == count:
                filler = pictures[:1] * (batch_size - len(rows))
                results = function(torch.cat(pictures + filler))
                if kept is None:
                    kept = tuple(torch.empty(count, *r.shape[1:], dtype=r.dtype, device=device) for r in results)
                place = torch.tensor(rows, device=device)
                for tensor, result in zip(kept, results, strict=True):
                    tensor[place] = result[: len(rows)].to(device)
                rows, pictures = [], []
    return Cache(kept or (), dict(loader.corrupt))
