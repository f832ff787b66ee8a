"""Rows of bytes on disk, written one after another and checked when they are read.

A store is a folder:

    about.json    what the rows are, for people; the folder's name holds the key
    rows.bin      the rows, in order, without gaps
    index.bin     for each row its offset, length, height, width, CRC-32 and whether the image was corrupt
    corrupt.json  label and reason of corrupt images, by row

A row counts once its line is in the index, which is written after the row: a build continues where a killed one
stopped. One process builds at a time, others wait. Reading a complete store needs no write permission. If another
user's store can be neither read nor completed, a user gets an own store beside it.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spot_fast.errors import UserError
from spot_fast.files import atomic_write, sync

_LINE = np.dtype(
    [("offset", "<i8"), ("size", "<i8"), ("height", "<i4"), ("width", "<i4"), ("check", "<u4"), ("corrupt", "<u4")]
)
_CHECK_ON_RESUME = 64  # last rows whose checksums are compared before a build continues


class NotBuilt(UserError):
    """A cache cannot be written or completed; a run that did not request it continues without one."""


class Store:
    """`count` rows in `folder`, which `about` describes; they can be read when all are written (`building`).

    instead_of: another user's unusable store of the same rows.
    """

    def __init__(self, folder: Path, count: int, about: dict[str, object], instead_of: Path | None = None) -> None:
        self.folder, self.count, self.instead_of = folder, count, instead_of
        self._rows, self._index = folder / "rows.bin", folder / "index.bin"
        self._about = json.dumps({"rows": count, **about}, indent=2) + "\n"
        self._open()

    def _open(self) -> None:
        self._unreadable: OSError | None = None
        self._bytes: np.ndarray | _Unmapped | None = None
        try:
            self._read_index()
            if self.complete and self.count and self.nbytes:
                if not os.path.isfile(self._rows) or self._rows.stat().st_size < self.nbytes:
                    raise self._damaged("rows.bin is shorter than its index says")
                self._bytes = _mapped(self._rows)
        except OSError as error:
            self._unreadable = error
            self.written, self.lines, self.corrupt = 0, np.empty(0, _LINE), {}
        # Rows of corrupt images are never used, and a kill may have left them half replaced: they need no check.
        self._checked = self.lines["corrupt"].astype(bool)

    def _read_index(self) -> None:
        try:
            size = self._index.stat().st_size
        except FileNotFoundError:
            size = 0
        self.written = min(size // _LINE.itemsize, self.count)
        self.lines = np.fromfile(self._index, _LINE, self.written) if self.written else np.empty(0, _LINE)
        reasons: dict[int, tuple[str, str]] = {}
        if os.path.isfile(self.folder / "corrupt.json"):
            try:
                words = json.loads((self.folder / "corrupt.json").read_text(encoding="utf-8"))
                reasons = {int(row): (label, reason) for row, (label, reason) in words.items()}
            except (ValueError, TypeError, AttributeError):
                raise self._damaged("corrupt.json cannot be read") from None
        # The index decides which rows are corrupt: a kill may have prevented corrupt.json.
        self.corrupt = {
            row: reasons.get(row, (f"row {row}", "it could not be read"))
            for row in np.flatnonzero(self.lines["corrupt"]).tolist()
        }

    @property
    def complete(self) -> bool:
        return self.written == self.count

    @property
    def nbytes(self) -> int:
        """Size of the written rows."""
        return int((self.lines["offset"] + self.lines["size"]).max()) if self.written else 0

    def can_be_built(self) -> bool:
        """Whether this process may write the missing rows, or another one is writing them."""
        if not os.path.lexists(self.folder):
            return True
        if self._unreadable is not None:
            return False
        files = [file for file in (self._rows, self._index) if os.path.lexists(file)]
        writable = os.access(self.folder, os.W_OK | os.X_OK) and all(os.access(file, os.W_OK) for file in files)
        return writable or _is_locked(self.folder)

    @contextmanager
    def building(self, say: Callable[[str], None] = print) -> Iterator[Writer | None]:
        """A writer for the missing rows, None if there are none; waits while another process builds."""
        if self.complete:
            yield None
            return
        if self.instead_of is not None:
            say(f"the cache {self.instead_of} is another user's and cannot be used: {self.folder.name} is built")
        with self._locked(say):
            if self.complete:
                yield None
                return
            try:
                self._drop_damaged_end()
            except OSError as error:
                raise self._failed(error) from error
            with Writer(self) as writer:
                yield writer
            self._open()

    @contextmanager
    def _locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Locks the store against other writers and reads its state again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _open_lock(self.folder)
        except OSError as error:
            raise self._failed(error) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process builds {self.folder}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            self._open()
            if self._unreadable is not None:
                raise self._failed(self._unreadable)
            if not os.path.isfile(self.folder / "about.json"):
                self._write_words("about.json", self._about)
            yield
        finally:
            os.close(lock)

    def refill(self, rows: Iterable[tuple[int, np.ndarray, int, int]], say: Callable[[str], None] = print) -> None:
        """Replaces the rows of corrupt images by (row, data, height, width).

        Processes that have the complete store open continue without them.
        """
        with self._locked(say):
            try:
                with open(self._rows, "r+b", buffering=0) as file, open(self._index, "r+b", buffering=0) as index:
                    for row, data, height, width in rows:
                        if row not in self.corrupt:
                            continue
                        content, old = _content(data), self.lines[row]
                        # First the data, then the line: a kill between them leaves the row corrupt, never wrong.
                        same = int(old["size"]) == len(content)
                        offset = file.seek(int(old["offset"])) if same else file.seek(0, os.SEEK_END)
                        _write(file, content)
                        sync(file.fileno())
                        line = np.array((offset, len(content), height, width, zlib.crc32(content), False), _LINE)
                        index.seek(row * _LINE.itemsize)
                        _write(index, line.tobytes())
                        del self.corrupt[row]
                    sync(index.fileno())
            except OSError as error:
                raise self._failed(error) from error
            self._write_corrupt()
            self._open()

    def _write_corrupt(self) -> None:
        # As ASCII: names that are not UTF-8 can be written in no other way.
        self._write_words("corrupt.json", json.dumps(self.corrupt, indent=1))

    def _write_words(self, name: str, words: str) -> None:
        try:
            atomic_write(self.folder / name, lambda path: path.write_text(words, encoding="utf-8"))
        except UserError as error:
            cause = error.__cause__
            raise self._failed(cause if isinstance(cause, OSError) else OSError(str(error))) from None

    def _failed(self, error: OSError) -> NotBuilt:
        reason = error.strerror or error
        return NotBuilt(
            f"the cache {self.folder} cannot be written ({reason}): free some space or use --cache none or "
            "another --cache-dir; rows written so far are kept"
        )

    def _drop_damaged_end(self) -> None:
        """Drops the last rows if a power failure kept them from the disk."""
        kept = self.written
        with open(self._rows if self._rows.is_file() else os.devnull, "rb") as file:
            for row in range(self.written - 1, max(-1, self.written - 1 - _CHECK_ON_RESUME), -1):
                line = self.lines[row]
                file.seek(int(line["offset"]))
                if zlib.crc32(file.read(int(line["size"]))) != line["check"]:
                    kept = row
        self.written, self.lines = kept, self.lines[:kept]
        self.corrupt = {row: why for row, why in self.corrupt.items() if row < kept}

    def check(self, rows: np.ndarray) -> None:
        """Compares rows with their checksums, each once in a process; UserError if one differs."""
        for row in rows[~self._checked[rows]].tolist():
            if zlib.crc32(self._slice(row)) != self.lines[row]["check"]:
                raise self._damaged(f"row {row} differs from its checksum")
            self._checked[row] = True

    def _slice(self, row: int) -> np.ndarray:
        line = self.lines[row]
        return self._bytes[int(line["offset"]) : int(line["offset"] + line["size"])]

    def row(self, row: int) -> np.ndarray:
        """The bytes of one row, uint8 [size], a view; UserError if they are damaged."""
        self.check(np.array([row]))
        return self._slice(row)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows of equal length: uint8 [len(rows), size]; UserError if one is damaged."""
        self.check(rows)
        if isinstance(self._bytes, _Unmapped):
            return np.stack([self._slice(row) for row in rows.tolist()])
        size = int(self.lines[0]["size"])
        return self._bytes[: self.count * size].reshape(self.count, size)[rows]

    def _damaged(self, what: str) -> UserError:
        return UserError(f"the cache {self.folder} is damaged ({what}): delete that folder, it will be built again")


class _Unmapped:
    """The bytes of a file, for file systems without memory mapping."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)

    def __getitem__(self, part: slice) -> np.ndarray:
        data, start = np.empty(part.stop - part.start, np.uint8), part.start
        while start < part.stop:
            count = os.preadv(self._file.fileno(), [memoryview(data)[start - part.start :]], start)
            if not count:
                raise UserError(f"the cache {self._file.name} has become shorter: delete its folder")
            start += count
        return data


def _mapped(path: Path) -> np.ndarray | _Unmapped:
    try:
        # Copy on write, because PyTorch warns about memory that it may not write to; nothing writes.
        return np.memmap(path, np.uint8, "c")
    except PermissionError:
        raise
    except OSError:
        return _Unmapped(path)


def located(folder: Path, name: str, count: int, about: dict[str, object]) -> Store:
    """The store `name` below `folder`, or this user's own if another user's cannot be read or completed."""
    shared = folder / name
    try:
        store = Store(shared, count, about)
        if store.complete or store.can_be_built():
            return store
    except UserError:  # damaged
        if os.access(shared, os.W_OK | os.X_OK):
            raise
    return Store(folder / f"{name}-user{os.getuid()}", count, about, shared)


@dataclass(frozen=True)
class Cached:
    """A store on disk: what its rows are, its size, and the day it was last written."""

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
        except (OSError, ValueError, KeyError, TypeError):  # UserError, of a damaged one, is a ValueError
            yield Cached(about.parent, "damaged", _size(about.parent), "", False)
            continue
        what = f"{words.get('data', '')}, {store.count:,} rows of {words.get('field', words.get('kind', ''))}"
        index = about.parent / "index.bin"
        built = time.strftime("%Y-%m-%d", time.localtime((index if index.is_file() else about).stat().st_mtime))
        yield Cached(about.parent, what, _size(about.parent), built, store.complete)


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # another user's, or removed meanwhile
        for file in folder.iterdir():
            size += file.stat().st_size
    return size


def remove(store: Cached) -> None:
    """Deletes a store; UserError while a process builds it, or without permission."""
    if _is_locked(store.folder):
        raise UserError(f"the cache {store.folder} is being built by another process: stop it or wait for it")
    try:
        # Without about.json it is no cache any more, even if a kill interrupts the rest.
        (store.folder / "about.json").unlink()
        shutil.rmtree(store.folder)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"the cache {store.folder} cannot be removed ({reason}): ask its owner to do it") from None


def _open_lock(folder: Path) -> int:
    """Opens the lock of a store; another user's lock for reading only."""
    try:
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        try:
            return os.open(folder / "lock", os.O_RDONLY)
        except OSError:
            raise error from None


def _is_locked(folder: Path) -> bool:
    """Whether a process writes the store; False on file systems without locks, where nobody knows."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(lock)


class Writer:
    """Appends rows to an incomplete store; closing it waits until they are on the disk."""

    def __init__(self, store: Store) -> None:
        self._store, self._end = store, store.nbytes
        self.written = store.written

    def __enter__(self) -> Writer:
        try:
            self._rows = _appended(self._store._rows, self._end)
            self._index = _appended(self._store._index, self.written * _LINE.itemsize)
        except OSError as error:
            raise self._store._failed(error) from error
        return self

    def append(
        self, row: np.ndarray, *, height: int = 0, width: int = 0, corrupt: tuple[str, str] | None = None
    ) -> None:
        """Appends a row of any dtype and shape; corrupt: label and reason of a corrupt image."""
        data = _content(row)
        line = np.array((self._end, len(data), height, width, zlib.crc32(data), corrupt is not None), _LINE)
        if corrupt is not None:
            self._store.corrupt[self.written] = corrupt
            self._store._write_corrupt()
        try:
            _write(self._rows, data)
            _write(self._index, line.tobytes())
        except OSError as error:
            raise self._store._failed(error) from error
        self._end += len(data)
        self.written += 1

    def __exit__(self, *exception: object) -> None:
        try:
            for file in (self._rows, self._index):
                sync(file.fileno())
        except OSError as error:
            raise self._store._failed(error) from error
        finally:
            self._rows.close()
            self._index.close()


def _appended(path: Path, size: int) -> io.FileIO:
    """Opens a file for appending after its first `size` bytes; what follows them is cut off."""
    file = open(path, "ab", buffering=0)
    if file.tell() > size:
        file.truncate(size)
    return file


def _content(row: np.ndarray) -> memoryview | bytes:
    return memoryview(np.ascontiguousarray(row)).cast("B") if row.size else b""


def _write(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """All of `data`: a write without a buffer may take only a part."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]
