"""Finds the image files of a folder, and notes for the user what it leaves out.

It searches all folders below, also through links, each once. Hidden files and leftovers of operating systems
(__MACOSX, @eaDir, Thumbs.db) are skipped silently. Notes count what else is left out: unreadable folders, links to
nowhere or saved as text, other extensions, and label maps beside their images.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from spot_fast.errors import UserError

# Pillow's image formats; it also reads documents, icons and scientific data.
_FORMATS = frozenset("AVIF BMP DDS DIB GIF JPEG JPEG2000 PCX PNG PPM QOI SGI SUN TGA TIFF WEBP".split())
_LEFT_BEHIND = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
# Left out without a note, as are files without an extension.
_ASIDE = frozenset(
    ".txt .json .jsonl .xml .csv .tsv .md .rst .yaml .yml .toml .html .htm .pdf .py .m .ipynb .sh .log .ini .cfg .lst "
    ".names .data .md5 .sha1 .sha256 .xmp .aae .url .bib .license".split()
) | {""}
_ARCHIVES = frozenset((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
_LONGEST_LINK = 4095  # bytes
_SHOWN = 4  # extensions and folders that a note names


@cache
def extensions() -> frozenset[str]:
    """Extensions of images that Pillow reads here, in lower case."""
    known = Image.registered_extensions()
    return frozenset({".mpo", *(ending for ending, name in known.items() if name in _FORMATS and name in Image.OPEN)})


@dataclass
class Listing:
    """Images below `root`, sorted, and what is left out."""

    root: Path
    paths: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    as_text: list[Path] = field(default_factory=list)  # links that are text files, as git writes them on Windows
    other: Counter[str] = field(default_factory=Counter)
    labels: Counter[Path] = field(default_factory=Counter)  # by folder

    def notes(self) -> list[str]:
        """A line for each kind of thing left out."""
        notes = []
        if self.unreadable:
            notes.append(f"{counted(len(self.unreadable), 'folder')} could not be read: {_some(self.unreadable)}")
        if self.broken:
            links = [str(path) for path in self.broken]
            notes.append(f"{counted(len(links), 'link')} to nowhere left out: {_some(links)}")
        if self.as_text:
            links = _some([str(path) for path in self.as_text])
            notes.append(
                f"{counted(len(self.as_text), 'link')} saved as text left out: {links}; make links of them again"
            )
        archives = Counter({ending: number for ending, number in self.other.items() if ending in _ARCHIVES})
        for kind, remedy in ((self.other - archives, ""), (archives, "; unpack archives")):
            if kind:
                endings = _some([f"{ending} {number:,}" for ending, number in kind.most_common()])
                notes.append(f"{counted(kind.total(), 'file')} with other extensions left out: {endings}{remedy}")
        if self.labels:
            folders = [f"{folder} {number:,}" for folder, number in sorted(self.labels.items())]
            notes.append(f"{counted(self.labels.total(), 'label map')} left out: {_some(folders)}")
        return notes


def counted(number: int, unit: str) -> str:
    """A number with its unit: 1 image, 2,000 images."""
    return f"{number:,} {unit}" + "s" * (number != 1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def list_folder(root: Path) -> Listing:
    """The images in and below a folder, label maps included; UserError if the folder cannot be read."""
    found = Listing(root)
    # Real folders come before links: an image that both lead to gets the path without a link.
    waiting, links, seen = [root], [], set()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            about = os.stat(folder)
            if (key := (about.st_dev, about.st_ino)) in seen:
                continue
            seen.add(key)
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise UserError(f"{root} cannot be read ({error.strerror}): change its permissions") from None
            found.unreadable.append(f"{folder} ({error.strerror})")
            continue
        for entry in inside:
            _sort_in(found, entry, folder / entry.name, waiting, links)
    found.paths.sort()
    return found


def _sort_in(found: Listing, entry: os.DirEntry, path: Path, folders: list[Path], links: list[Path]) -> None:
    if entry.name.startswith(".") or entry.name.lower() in _LEFT_BEHIND:
        return
    try:
        if entry.is_dir():
            (links if entry.is_symlink() else folders).append(path)
            return
        is_file, lost = entry.is_file(), entry.is_symlink() and not path.exists()
    except OSError:  # such as a link to itself
        is_file, lost = False, True
    ending = path.suffix.lower()
    if lost:
        found.broken.append(path)
    elif is_file and ending in extensions():
        found.paths.append(path)
    elif is_file and not ending and _leads_somewhere(path):
        found.as_text.append(path)
    elif is_file and ending not in _ASIDE:
        found.other[ending] += 1


def _leads_somewhere(path: Path) -> bool:
    """Whether a file contains the path of a folder or an image and nothing else."""
    try:
        if not 0 < path.stat().st_size <= _LONGEST_LINK:
            return False
        target = path.parent / os.fsdecode(path.read_bytes())
        return target.is_dir() or target.suffix.lower() in extensions() and target.is_file()
    except (OSError, ValueError):  # ValueError: a zero byte
        return False
