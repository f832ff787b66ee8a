"""Names of files: as lists write them, and as they are on the disk.

A list may begin with a byte-order mark, end its lines as Windows does, and quote its names. The letters of a name with
accents may be written in two ways that look alike, NFC (é) and NFD (e and an accent), and the one who wrote the
annotations need not have used the one of the disk, such as an archive packed on a Mac.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from spot_fast.errors import UserError

MASK = "_mask"  # photo_mask.png beside photo.jpg
# Of several the first is the mask. The last are lossy: they are found so that they can be refused.
_ENDINGS = (
    ".png",
    ".tif",
    ".tiff",
    ".gif",
    ".bmp",
    ".pgm",
    ".tga",
    ".webp",
    ".jp2",
    ".avif",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# UTF-32's mark begins with UTF-16's, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file without its byte-order mark; OSError, or UnicodeDecodeError where it is no such text.

    errors: what becomes of bytes that are not UTF-8 in a file without a mark, as in `bytes.decode`.
    """
    data = path.read_bytes()
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    return data.decode(marked) if marked else data.decode("utf-8", errors)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without what ends them; UserError where it cannot be read or is no text.

    Bytes that are not UTF-8 stay as they are, as in the names of files (surrogateescape).
    """
    try:
        text = read_text(file, errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if "\0" in text:
        raise UserError(f"{file} cannot be read: it is not text")
    # Not splitlines, which takes characters for ends of lines that a name may have.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def listed(line: str, folder: Path) -> Path:
    """The file that a line of a list names, relative to `folder`; where none exists, the path as it is written.

    Tried in this order: the line as it stands, without blanks around it, without quotes, with / for \\, and its first
    word, behind which lists of classes have a number.
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
    """Whether a name is a full path of Windows: C:\\photos\\a.jpg or \\\\server\\share."""
    return _WINDOWS.match(name.strip().strip("\"'")) is not None


def composed(name: str) -> str:
    """A name in NFC, whatever it is written in."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def located(path: Path) -> Path:
    """The file itself, or where there is none of that spelling, the one whose name differs in NFC and NFD alone."""
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
    """The names in a folder that are not ASCII, by their NFC; changed: when the folder was last."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):
        return {}
    return {composed(name): name for name in names if not name.isascii()}


def alike(path: Path) -> str:
    """A name beside a missing file that differs from it in case or blanks alone; empty where there is none."""
    try:
        return _by_case(path.parent, path.parent.stat().st_mtime_ns).get(path.name.strip().casefold(), "")
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=4)
def _by_case(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder, without blanks around them, by what is left of them where case does not count."""
    return {name.strip().casefold(): name for name in os.listdir(folder)}


def without_ending(name: str) -> str:
    """The name of an image's or mask's file without its ending, in NFC and with _mask in small letters."""
    stem = composed(Path(name).stem)
    return stem[: -len(MASK)] + MASK if stem.lower().endswith(MASK) else stem


def masks_in(folder: Path) -> dict[str, Path]:
    """The files that can be masks by their ending, in any capitals, each under its name without that.

    Of those that differ in their ending alone the one whose ending comes first in `_ENDINGS`, in small letters.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = [(_ENDINGS.index(ending), name) for name in names if (ending := Path(name).suffix.lower()) in _ENDINGS]
    # The preferred ones last, where they replace the others: small letters sort behind capitals.
    found.sort(key=lambda each: (-each[0], each[1]))
    return {without_ending(name): folder / name for _, name in found}
