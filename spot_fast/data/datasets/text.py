"""Text files as people save them: UTF-8, or whatever their byte-order mark says."""

from __future__ import annotations

import codecs
from pathlib import Path

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
