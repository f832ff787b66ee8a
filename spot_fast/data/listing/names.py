"""Names of files: in lists, on the disk, and of masks.

A list may begin with a byte-order mark, end its lines as Windows does, and quote its names. Letters with accents have
two encodings that look alike, NFC (é) and NFD (e and an accent, as on a Mac), and annotations need not use the disk's.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from spot_fast.errors import UserError

MASK = "_mask"  # photo_mask.png beside photo.jpg
# In order of preference. The last are lossy: they are found so that they can be refused.
_MASK_ENDINGS = tuple(".png .tif .tiff .gif .bmp .pgm .tga .webp .jp2 .avif .jpg .jpeg .jpe .jfif".split())
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# UTF-32's mark begins with UTF-16's, so it is tried first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, or what its byte-order mark says; OSError or UnicodeDecodeError.

    errors: as in `bytes.decode`.
    """
    data = path.read_bytes()
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    return data.decode(marked) if marked else data.decode("utf-8", errors)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; UserError if it cannot be read or is no text.

    Bytes that are not UTF-8 are kept, as in file names (surrogateescape).
    """
    try:
        text = read_text(file, errors="surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if "\0" in text:
        raise UserError(f"{file} cannot be read: it is not text")
    # Not splitlines, which also splits at characters that a name may contain.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def listed(line: str, folder: Path) -> Path:
    """The file that a line of a list names, relative to `folder`; if none exists, the path as written.

    It tries the whole line, the line without spaces around it, without quotes, with / for \\, and its first word, which
    a class number follows in some lists.
    """
    bare = line.strip()
    plain = bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'" else bare
    words = re.split(r"[\s,;]", plain, maxsplit=1)
    for name in dict.fromkeys((line, bare, plain, plain.replace("\\", "/"), words[0])):
        path = located(folder / name)
        if name and os.path.isfile(path):
            return path
    return folder / plain


def is_windows(name: str) -> bool:
    """Whether a name is a full path of Windows, such as C:\\photos\\a.jpg or \\\\server\\share."""
    return _WINDOWS.match(name.strip().strip("\"'")) is not None


def composed(name: str) -> str:
    """A name in NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def located(path: Path) -> Path:
    """`path`, or if it does not exist, the file whose name differs only in NFC and NFD."""
    text = os.fspath(path)
    if text.isascii() or os.path.lexists(text) or not path.name:
        return path
    parent = located(path.parent)
    try:
        names = _spellings(parent, parent.stat().st_mtime_ns)
    except (OSError, ValueError):
        return path
    return parent / names.get(composed(path.name), path.name)


@lru_cache(maxsize=64)
def _spellings(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder that are not ASCII, by their NFC. changed: its modification time, for the cache."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):
        return {}
    return {composed(name): name for name in names if not name.isascii()}


def alike(path: Path) -> str:
    """A name in the folder of a missing file that differs only in case or spaces; empty if there is none."""
    try:
        return _by_case(path.parent, path.parent.stat().st_mtime_ns).get(path.name.strip().casefold(), "")
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=4)
def _by_case(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder, by their case-folded form without spaces around them."""
    return {name.strip().casefold(): name for name in os.listdir(folder)}


def without_ending(name: str) -> str:
    """The name of an image or mask file without extension, in NFC and with _mask in lower case."""
    stem = composed(Path(name).stem)
    return stem[: -len(MASK)] + MASK if stem.lower().endswith(MASK) else stem


def masks_in(folder: Path) -> dict[str, Path]:
    """The files of a folder that can be masks by their extension, by `without_ending`."""
    return by_stem(folder, _MASK_ENDINGS, without_ending)


def by_stem(folder: Path, endings: Sequence[str], stem: Callable[[str], str]) -> dict[str, Path]:
    """The files of a folder with one of `endings` in any case, by the `stem` of their names.

    Of several with the same stem the one whose ending comes first, in lower case.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = [(endings.index(ending), name) for name in names if (ending := Path(name).suffix.lower()) in endings]
    # The preferred ones last, where they replace the others: lower case sorts after upper case.
    found.sort(key=lambda each: (-each[0], each[1]))
    return {stem(name): folder / name for _, name in found}
