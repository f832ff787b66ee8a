"""Whether files are the ones they were: the part of a cache's key that comes from the file system.

Name, size and modification time do not tell: archives and copies restore times, and uncompressed images of one kind
have equal sizes. So the key holds of every file also what only the kernel writes, the time of its last change (ctime,
in nanoseconds) and its inode number, and of `SAMPLE` files, evenly spread, the contents: there are file systems without
such a time, as FAT and images that were made reproducibly. The device's number is not in it, since most are given anew
at every start. 118,287 files take 1.5 s on two cores (`bench/studies/cache_key.py`).

It errs on the safe side: a copy, or a change of permissions, gives another key, and what is cached is made again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SAMPLE = 128  # files that are read
_PIECE, _PIECES = 2**16, 16  # of a larger file so many pieces, evenly spread
_UNREAD = bytes(32)
_THREADS, _CHUNK = 8, 1024  # network file systems answer several at once
# Nanoseconds in which a second change may leave a file's times as they are: FAT counts in steps of two seconds.
_GRANULE = 2 * 10**9
# Their inode numbers change while they are mounted.
_CHANGING_INODES = ("vfat", "msdos", "exfat", "fuse", "fuseblk", "cifs", "smb3")
_MOUNTS = "/proc/self/mountinfo"


class Files:
    """The files `paths` as they are now; a missing one is a state too. May take 2 s if they were just written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._without_inode = _devices_of(_CHANGING_INODES)
        stamps = self._stamps(range(len(paths)))
        digest = hashlib.sha256()
        for path, stamp in zip(paths, stamps, strict=True):
            # No name can contain a zero byte, so that other names cannot give the same text.
            digest.update(f"{path.parent.name}/{path.name}\0{stamp}\0".encode(errors="surrogatepass"))
        for content in _contents([paths[place] for place in _spread(len(paths), SAMPLE)]):
            digest.update(content)
        self.key = digest.hexdigest()
        self._found = np.fromiter((hash(stamp[:3]) for stamp in stamps), np.int64, len(stamps))
        if len(paths) > SAMPLE or any(size > _PIECE * _PIECES for size, *_ in stamps):
            _wait_until_old([time for _, modified, changed, _ in stamps for time in (modified, changed)])

    def changed(self, places: Iterable[int]) -> list[int]:
        """Those of `places` whose file is not what it was when the key was made."""
        places = list(places)
        return [
            place
            for place, stamp in zip(places, self._stamps(places), strict=True)
            if hash(stamp[:3]) != self._found[place]
        ]

    def _stamps(self, places: Sequence[int]) -> list[tuple[int, ...]]:
        """(size, times of modification and change in ns, inode number or 0) of files; zeros for a missing one."""
        parts = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
        if len(parts) < 2:
            return [self._stamp(self._paths[place]) for place in places]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda part: [self._stamp(self._paths[place]) for place in part], parts)
            return [stamp for part in found for stamp in part]

    def _stamp(self, path: Path) -> tuple[int, ...]:
        try:
            about = os.stat(path)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return 0, 0, 0, 0
        inode = 0 if about.st_dev in self._without_inode else about.st_ino
        return about.st_size, about.st_mtime_ns, about.st_ctime_ns, inode


def sample(paths: Sequence[Path], count: int = 16) -> list[str]:
    """Short digests of the contents of so many of the files, evenly spread: the same wherever they lie; "" for one that
    cannot be read."""
    found = _contents([paths[place] for place in _spread(len(paths), count)])
    return ["" if content == _UNREAD else content.hex()[:16] for content in found]


def _spread(size: int, count: int) -> list[int]:
    return sorted(set(np.linspace(0, size - 1, min(count, size)).astype(int).tolist()))


def _contents(paths: Sequence[Path]) -> list[bytes]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_content, paths))


def _content(path: Path) -> bytes:
    """sha256 of a file: of all of it up to a megabyte, of pieces of a larger one; `_UNREAD` where it cannot be read."""
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
    """Numbers of the devices with file systems of these kinds, `fuse` standing for fuse.sshfs and all others too."""
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
    """Lets the time pass in which another change would give a file the same times (ns); those to come do not count."""
    now = time.time_ns()
    latest = max((when for when in times if when <= now), default=0)
    time.sleep(max(0, latest + _GRANULE - now) / 1e9)
