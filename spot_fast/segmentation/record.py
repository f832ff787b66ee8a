"""OUT/.segments.jsonl, the record of what the segment command wrote, with which a stopped call goes on.

A line a finished image: its name, size, its regions where they were asked for, and the settings it was made with. Lines
are only ever appended, each at once and after the image's files, so that a killed process loses the images it was
working on and nothing else, and calls with other images or settings may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from spot_fast.errors import UserError
from spot_fast.files import reason

NAME = ".segments.jsonl"


class Record:
    """The record in folder `out`.

    settings: everything, but for the image, that an image's outputs depend on. read: look for earlier lines, which
    `offset_of` finds.
    """

    def __init__(self, out: Path, settings: dict, *, read: bool) -> None:
        self.path, self._settings = out / NAME, settings
        text = json.dumps(settings, sort_keys=True)
        self.of_settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        # key of an image → where its line begins, and its stamp. Of several lines the last counts, whatever settings it
        # has: its files replaced those of the lines before.
        self._lines: dict[str, tuple[int, str]] = {}
        self._descriptor: int | None = None
        if read and self.path.exists():
            self._read()

    def _read(self) -> None:
        at = 0
        with self.path.open("rb") as file:
            for line in file:
                entry = _parsed(line)
                if entry is not None and "key" in entry:
                    self._lines.pop(entry["key"], None)
                    if entry.get("settings") == self.of_settings:
                        self._lines[entry["key"]] = at, entry.get("stamp")
                at += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def has(self, key: str, stamp: str) -> bool:
        """Whether the image was finished with the same settings, and has not changed since."""
        return self._lines.get(key, (0, None))[1] == stamp

    def add(self, key: str, stamp: str, entry: dict) -> None:
        """Appends an image's line. UserError where the disk is full."""
        line = _line({"settings": self.of_settings, "key": key, "stamp": stamp, **entry})
        try:
            if self._descriptor is None:
                self._open()
            _write_all(self._descriptor, line)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({reason(error)}): free some space or make it writable; --resume goes "
                "on with what is missing"
            ) from None
        # Where the line went, also if another process writes to the same file.
        self._lines[key] = os.lseek(self._descriptor, 0, os.SEEK_CUR) - len(line), stamp

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._descriptor).st_size
        head = _line({"settings": self.of_settings, "values": self._settings})
        # A process killed while it wrote leaves half a line, which stays one.
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            head = b"\n" + head
        _write_all(self._descriptor, head)

    def entries(self, keys: list[str]) -> Iterator[dict]:
        """The lines of finished images."""
        with self.path.open("rb") as file:
            for key in keys:
                file.seek(self._lines[key][0])
                yield json.loads(file.readline())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode("ascii") + b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _parsed(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:  # half a line
        return None
    return entry if isinstance(entry, dict) else None
