"""Rows of bytes on disk, written one after another and checked when they are read.

A store is a folder:

    about.json    what the rows are, for people; the folder's name holds the key
    rows.bin      the rows, in order, without gaps
    index.bin     for each row its offset, length, height, width, CRC-32 and whether the picture was corrupt
    corrupt.json  label and reason of corrupt pictures, by row

A row counts once its line is in the index, which is written after the row itself: a killed build goes on behind the
last counted row. One process builds at a time, the others wait for it.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic_write

_LINE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("height", "<i4"), ("width", "<i4"), ("check", "<u4"),
                  ("corrupt", "<u4")])  # fmt: skip
_CHECK_ON_RESUME = 64  # last rows whose checksums are compared before a build goes on


class Store:
    """`count` rows in `folder`, which `building` makes; `about` describes them. A complete store can be read."""

    def __init__(self, folder: Path, count: int, about: dict[str, object]) -> None:
        self.folder, self.count = folder, count
        self._rows, self._index = folder / "rows.bin", folder / "index.bin"
        self._about = json.dumps({"rows": count, **about}, indent=2) + "\n"
        self._open()

    def _open(self) -> None:
        size = self._index.stat().st_size if self._index.is_file() else 0
        self.written = min(size // _LINE.itemsize, self.count)
        self.lines = np.fromfile(self._index, _LINE, self.written) if self.written else np.empty(0, _LINE)
        self.corrupt: dict[int, tuple[str, str]] = {}  # row → label, reason
        if (self.folder / "corrupt.json").is_file():
            try:
                found = json.loads((self.folder / "corrupt.json").read_text(encoding="utf-8"))
                self.corrupt = {int(row): (label, reason) for row, (label, reason) in found.items()}
            except (ValueError, TypeError, AttributeError):
                raise self._damaged("corrupt.json cannot be read") from None
        self._checked = np.zeros(self.count, bool)
        self._bytes = None
        if self.complete and self.count and self.nbytes:
            if not self._rows.is_file() or self._rows.stat().st_size < self.nbytes:
                raise self._damaged("rows.bin is shorter than its index says")
            # Copy on write, because PyTorch warns about memory that it may not write to; nothing writes.
            self._bytes = np.memmap(self._rows, np.uint8, "c")

    @property
    def complete(self) -> bool:
        return self.written == self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are written."""
        return int(self.lines[-1]["offset"] + self.lines[-1]["size"]) if self.written else 0

    @contextmanager
    def building(self, say: Callable[[str], None] = print) -> Iterator[Writer | None]:
        """A writer that appends what is missing, or None where nothing is; waits while another process builds."""
        if self.complete:
            yield None
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache folder {self.folder} cannot be made ({error.strerror}): use another "
                            "--cache-dir or --cache none") from None  # fmt: skip
        if not (self.folder / "about.json").is_file():
            atomic_write(self.folder / "about.json", lambda path: path.write_text(self._about, encoding="utf-8"))
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process builds {self.folder}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            self._open()
            if self.complete:
                yield None
                return
            self._drop_damaged_end()
            with Writer(self) as writer:
                yield writer
            self._open()
        finally:
            os.close(lock)

    def _drop_damaged_end(self) -> None:
        """Forgets the last rows as far as a power failure has kept them from the disk."""
        kept = self.written
        present = self._rows.stat().st_size if self._rows.is_file() else 0
        with open(self._rows, "rb") if present else open(os.devnull, "rb") as file:
            for row in range(self.written - 1, max(-1, self.written - 1 - _CHECK_ON_RESUME), -1):
                line = self.lines[row]
                file.seek(int(line["offset"]))
                if zlib.crc32(file.read(int(line["size"]))) != line["check"]:
                    kept = row
        self.written, self.lines = kept, self.lines[:kept]
        self.corrupt = {row: found for row, found in self.corrupt.items() if row < kept}

    def check(self, rows: np.ndarray) -> None:
        """Compares rows with their checksums, each once in a process; UserError where one differs."""
        for row in rows[~self._checked[rows]].tolist():
            if zlib.crc32(self._slice(row)) != self.lines[row]["check"]:
                raise self._damaged(f"row {row} differs from its checksum")
            self._checked[row] = True

    def _slice(self, row: int) -> np.ndarray:
        line = self.lines[row]
        return self._bytes[line["offset"] : line["offset"] + line["size"]]

    def row(self, row: int) -> np.ndarray:
        """The bytes of one row, uint8 [size], a view; UserError where they are damaged."""
        self.check(np.array([row]))
        return self._slice(row)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows that all have the same length: uint8 [len(rows), size]; UserError where one is damaged."""
        self.check(rows)
        size = int(self.lines[0]["size"])
        return self._bytes[: self.count * size].reshape(self.count, size)[rows]

    def _damaged(self, what: str) -> UserError:
        return UserError(f"the cache {self.folder} is damaged ({what}): delete that folder, it will be built again")


@dataclass(frozen=True)
class Cached:
    """A store on disk: what its rows are, in words, its size, the day it was last built on, whether it is complete."""

    folder: Path
    what: str
    nbytes: int
    built: str
    complete: bool


def cached(folder: Path) -> Iterator[Cached]:
    """The stores below `folder`, by name."""
    for about in sorted(folder.glob("*/about.json")):
        try:
            words = json.loads(about.read_text(encoding="utf-8"))
            store = Store(about.parent, int(words["rows"]), words)
        except (OSError, ValueError, KeyError):  # UserError, of a damaged one, is a ValueError
            yield Cached(about.parent, "damaged", _size(about.parent), "", False)
            continue
        what = f"{words.get('data', '')}, {store.count:,} rows of {words.get('field', words.get('kind', ''))}"
        index = about.parent / "index.bin"
        built = time.strftime("%Y-%m-%d", time.localtime((index if index.is_file() else about).stat().st_mtime))
        yield Cached(about.parent, what, _size(about.parent), built, store.complete)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def remove(store: Cached) -> None:
    """Deletes a store; UserError while a process builds it."""
    lock = os.open(store.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"the cache {store.folder} is being built by another process: stop it or wait for it") from None
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(lock)
    # Without about.json it is no cache any more, wherever a kill comes between.
    (store.folder / "about.json").unlink()
    shutil.rmtree(store.folder)


class Writer:
    """Appends rows to an incomplete store; closed, everything written is on the disk."""

    def __init__(self, store: Store) -> None:
        self._store, self._end = store, store.nbytes
        self.written = store.written

    def __enter__(self) -> Writer:
        self._rows = open(self._store._rows, "ab", buffering=0)
        self._rows.truncate(self._end)
        self._index = open(self._store._index, "ab", buffering=0)
        self._index.truncate(self.written * _LINE.itemsize)
        return self

    def append(self, row: np.ndarray, *, height: int = 0, width: int = 0,
               corrupt: tuple[str, str] | None = None) -> None:
        """One more row of any dtype and shape; for a corrupt picture also its label and reason."""
        data = memoryview(np.ascontiguousarray(row)).cast("B") if row.size else b""
        line = np.array((self._end, len(data), height, width, zlib.crc32(data), corrupt is not None), _LINE)
        if corrupt is not None:
            self._store.corrupt[self.written] = corrupt
            text = json.dumps(self._store.corrupt, ensure_ascii=False, indent=1)
            atomic_write(self._store.folder / "corrupt.json", lambda path: path.write_text(text, encoding="utf-8"))
        try:
            _write(self._rows, data)
            _write(self._index, line.tobytes())
        except OSError as error:
            raise self._failed(error) from error
        self._end += len(data)
        self.written += 1

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"the cache {self._store.folder} cannot be written ({error.strerror}): free some space or use "
                         "--cache none or another --cache-dir; what is there is kept")  # fmt: skip

    def __exit__(self, *exception: object) -> None:
        try:
            for file in (self._rows, self._index):
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._rows.close()
            self._index.close()


def _write(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """All of `data`: a write without a buffer may take only a part."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]
