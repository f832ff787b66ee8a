"""Whether files have changed: the part of a cache's key that comes from the file system.

Name, size and modification time do not suffice: archives and copies restore times, and uncompressed images of one kind
have equal sizes. So the key also contains each file's change time (ctime) and inode number, which only the kernel
writes, and the contents of `SAMPLE` files, since FAT and reproducibly made images have no ctime. Device numbers change
at every boot and are not in it. 118,287 files take 1.5 s on two cores (`bench/studies/cache_key.py`).

It errs on the safe side: after a copy, or a change of permissions, the cache is built again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SAMPLE = 128  # files that are read, evenly spread
_PIECE, _PIECES = 2**16, 16  # of a larger file 16 evenly spread pieces are read
_UNREAD = bytes(32)
_THREADS, _CHUNK = 8, 1024  # network file systems answer several requests at once
# Nanoseconds within which a second change may leave a file's times the same: FAT counts in steps of two seconds.
_GRANULE = 2 * 10**9
# File systems whose inode numbers change while mounted.
_CHANGING_INODES = ("vfat", "msdos", "exfat", "fuse", "fuseblk", "cifs", "smb3")
_MOUNTS = "/proc/self/mountinfo"


class Files:
    """The current state of files, even missing ones. Waits up to 2 s if they were just written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._without_inode = _devices_of(_CHANGING_INODES)
        stamps = self._stamps(range(len(paths)))
        digest = hashlib.sha256()
        for path, stamp in zip(paths, stamps, strict=True):
            # No name can contain a zero byte, so different names give different texts.
            digest.update(f"{path.parent.name}/{path.name}\0{stamp}\0".encode(errors="surrogatepass"))
        for content in _contents(_spread(paths, SAMPLE)):
            digest.update(content)
        self.key = digest.hexdigest()
        self._hashes = np.fromiter((hash(stamp[:3]) for stamp in stamps), np.int64, len(stamps))
        if len(paths) > SAMPLE or any(size > _PIECE * _PIECES for size, *_ in stamps):
            _wait_until_old([time for _, modified, changed, _ in stamps for time in (modified, changed)])

    def changed(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` whose file has changed since the key was made."""
        indices = list(indices)
        stamps = zip(indices, self._stamps(indices), strict=True)
        return [index for index, stamp in stamps if hash(stamp[:3]) != self._hashes[index]]

    def _stamps(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        """(size, times of modification and change in ns, inode number or 0) of files; zeros for a missing one."""

        def stamps(part: Sequence[int]) -> list[tuple[int, ...]]:
            return [self._stamp(self._paths[index]) for index in part]

        parts = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
        if len(parts) < 2:
            return stamps(indices)
        with ThreadPoolExecutor(_THREADS) as pool:
            return [stamp for part in pool.map(stamps, parts) for stamp in part]

    def _stamp(self, path: Path) -> tuple[int, ...]:
        try:
            about = os.stat(path)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return 0, 0, 0, 0
        inode = 0 if about.st_dev in self._without_inode else about.st_ino
        return about.st_size, about.st_mtime_ns, about.st_ctime_ns, inode


def sample(paths: Sequence[Path]) -> list[str]:
    """Short digests of 16 evenly spread files; "" for one that cannot be read."""
    contents = _contents(_spread(paths, 16))
    return ["" if content == _UNREAD else content.hex()[:16] for content in contents]


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    indices = np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int).tolist()
    return [paths[index] for index in sorted(set(indices))]


def _contents(paths: Sequence[Path]) -> list[bytes]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_content, paths))


def _content(path: Path) -> bytes:
    """sha256 of a file, of pieces of one larger than a megabyte; `_UNREAD` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in np.linspace(0, max(0, size - _PIECE), _PIECES if size > _PIECE else 1).astype(int).tolist():
                file.seek(start)
                digest.update(file.read(_PIECE))
    except (OSError, ValueError):
        return _UNREAD
    return digest.digest()


def _devices_of(kinds: Sequence[str]) -> set[int]:
    """Numbers of the devices with file systems of these kinds; `fuse` includes fuse.sshfs and the like."""
    found = set()
    try:
        with open(_MOUNTS, encoding="utf-8", errors="replace") as file:
            for line in file:
                device, kind = line.split()[2], line.partition(" - ")[2].split()[0]
                if kind in kinds or kind.partition(".")[0] in kinds:
                    found.add(os.makedev(*map(int, device.split(":"))))
    except (OSError, ValueError, IndexError):
        pass  # a system without such a file
    return found


def _wait_until_old(times: Iterable[int]) -> None:
    """Waits until another change would give a file other times (ns), but not for times in the future."""
    now = time.time_ns()
    latest = max((when for when in times if when <= now), default=0)
    time.sleep(max(0, latest + _GRANULE - now) / 1e9)
