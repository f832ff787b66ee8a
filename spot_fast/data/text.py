"""Text files as people save them: UTF-8, or whatever their byte-order mark says."""

from __future__ import annotations

import codecs
from pathlib import Path

# UTF-32's mark begins with UTF-16's, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(path: Path) -> str:
    """The text of a file without its byte-order mark; OSError, or UnicodeDecodeError where it is no such text."""
    data = path.read_bytes()
    return data.decode(next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8"))
