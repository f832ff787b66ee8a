"""The slots of many images as one safetensors file: "slots" [images, K, U] float32, the images' names as metadata.

While images are segmented their slots are appended to FILE.partial, from which the file is made at the end, without
holding them in memory; a stopped call goes on with what is there.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor

from spot_fast.errors import UserError
from spot_fast.files import atomic_write, reason

_OF, _SETTINGS, _KEYS = "spot_fast:of", "spot_fast:settings", "spot_fast:keys"  # metadata
_HEAD = struct.Struct("<16sQQ")  # of FILE.partial: settings, K, U
_ROWS = 1024  # copied at a time


class SlotFile:
    """Slots on their way to `target`.

    settings: as `Record.of_settings`; slots of others are not gone on with. read: go on with an earlier call's.
    """

    def __init__(self, target: Path, settings: str, *, read: bool) -> None:
        self.target, self._settings = target, settings
        self._partial = _partial(target)
        self._shape: tuple[int, int] | None = None
        self._rows: dict[str, int] = {}  # key of an image → its row, the last of several
        self._count = 0  # of rows
        self._descriptor: int | None = None
        if not read:
            self._partial.unlink(missing_ok=True)
        elif self._partial.exists():
            self._go_on()
        elif target.exists():
            self._take_apart()

    def _row(self) -> np.dtype:
        return np.dtype([("key", "S32"), ("slots", "<f4", self._shape)])

    def _go_on(self) -> None:
        with self._partial.open("rb") as file:
            head = file.read(_HEAD.size)
        settings, *shape = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0)
        if settings != self._settings.encode():
            self._partial.unlink()
            return
        self._shape = tuple(shape)
        rows = (self._partial.stat().st_size - _HEAD.size) // self._row().itemsize
        os.truncate(self._partial, _HEAD.size + rows * self._row().itemsize)  # half a row, from a killed process
        self._count = rows
        if rows:
            self._rows = {key.decode(): row for row, key in enumerate(self._mapped()["key"].tolist())}

    def _take_apart(self) -> None:
        """Begins with the rows of a finished file."""
        metadata = _metadata(self.target)
        if metadata.get(_SETTINGS) != self._settings:
            return
        with safe_open(self.target, framework="np") as file:
            keys, slots = json.loads(metadata[_KEYS]), file.get_slice("slots")
            for at in range(0, len(keys), _ROWS):
                end = min(at + _ROWS, len(keys))
                for key, of_image in zip(keys[at:end], slots[at:end], strict=True):
                    self._append(key, of_image)

    def _mapped(self) -> np.memmap:
        return np.memmap(self._partial, self._row(), "r", offset=_HEAD.size)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, key: str, slots: Tensor) -> None:
        """Appends the slots [K, U] of an image; UserError where the disk is full."""
        self._append(key, slots.numpy())

    def _append(self, key: str, slots: np.ndarray) -> None:
        try:
            if self._descriptor is None:
                self._shape = self._shape or slots.shape
                self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                if not os.fstat(self._descriptor).st_size:
                    os.write(self._descriptor, _HEAD.pack(self._settings.encode(), *self._shape))
            row = np.array([(key.encode(), slots)], self._row()).tobytes()
            if os.write(self._descriptor, row) < len(row):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise UserError(
                f"{self._partial} cannot be written ({reason(error)}): free some space or make it writable; --resume "
                "goes on with what is missing"
            ) from None
        self._rows[key] = self._count
        self._count += 1

    def finish(self, keys: Sequence[str], names: Sequence[str], model: str) -> None:
        """Writes `target` with the rows of `keys`, in that order, and removes FILE.partial.

        names: of the images, the metadata entry "images"; model: a key that tells the model from others.
        """
        self.close()
        mapped = self._mapped()
        order = [self._rows[key] for key in keys]
        size = len(order) * mapped["slots"][0].nbytes
        header = {
            "__metadata__": {
                "images": json.dumps(list(names)),
                _OF: model,
                _SETTINGS: self._settings,
                _KEYS: json.dumps(list(keys)),
            },
            "slots": {"dtype": "F32", "shape": [len(order), *self._shape], "data_offsets": [0, size]},
        }
        text = json.dumps(header).encode("ascii")
        text += b" " * (-len(text) % 8)

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for at in range(0, len(order), _ROWS):
                    file.write(mapped["slots"][order[at : at + _ROWS]].tobytes())

        atomic_write(self.target, write)
        self._partial.unlink()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file; none of any other file."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except Exception:  # the library's own and the system's: whatever the file is, it was not written here
        return {}


def check_target(path: Path, model: str, *, resume: bool) -> None:
    """UserError where `path` is a file, but not one with slots of the same model, or a stopped call would be lost."""
    if (partial := _partial(path)).exists() and not resume:
        raise UserError(f"{partial} has the slots of a stopped call: add --resume, or --overwrite to begin anew")
    if path.exists() and _metadata(path).get(_OF) != model:
        raise UserError(f"{path} exists and holds no slots of the same model: choose another file, or add --overwrite")
