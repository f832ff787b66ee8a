"""PNG files without the text that image generators and editors write into them.

Pillow refuses a file whose text, once decompressed, is longer than a megabyte, or damaged; no pixel depends on it.
Chunks are those of the PNG specification: length of four bytes, type of four, data, checksum of four.
"""

from __future__ import annotations

from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_text(path: str | Path, encoded: bytes | None = None) -> bytes | None:
    """The PNG file without text and colour profile; None where it is no PNG or has none of them.

    encoded: what is in the file, where that has been read already.
    """
    if encoded is None:
        with open(path, "rb") as file:
            encoded = SIGNATURE + file.read() if file.read(len(SIGNATURE)) == SIGNATURE else b""
    if not encoded.startswith(SIGNATURE):
        return None
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at + 8 <= len(encoded):
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        if encoded[at + 4 : at + 8] not in _TEXT:
            kept.append(encoded[at:end])
        at = end
    return b"".join(kept) if len(kept) > 1 and sum(map(len, kept)) < len(encoded) else None
