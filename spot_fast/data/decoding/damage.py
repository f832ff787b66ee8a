"""Finds damaged image files, mostly from their first and last bytes.

A JPEG or PNG with the right beginning and end counts as whole. Anything else is decoded before it counts as damaged:
the loader reads what Pillow reads, such as photos with something appended. `decode` also finds JPEGs that are damaged
inside, which Pillow fills with grey or garbage.
"""

from __future__ import annotations

import os
from pathlib import Path

from spot_fast.data.decoding.jpeg_scan import lost_inside
from spot_fast.data.decoding.opening import PNG, open_rgb
from spot_fast.errors import CorruptImage

_HEAD, _TAIL = 8, 64
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PADDING = b"\x00\n\r "


def file_damage(path: Path, *, decode: bool = False) -> str | None:
    """Why an image file is damaged, such as "truncated: no end of the JPEG"; None if it is not. decode: in any case."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = os.pread(file.fileno(), _HEAD, 0)
            tail = os.pread(file.fileno(), _TAIL, max(0, size - _TAIL))
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return _damage(path, None, size, head, tail, decode)


def data_damage(name: Path, encoded: bytes, *, decode: bool = False) -> str | None:
    """`file_damage` of an image in memory; `name` is for messages."""
    return _damage(name, encoded, len(encoded), encoded[:_HEAD], encoded[-_TAIL:], decode)


def _damage(path: Path, encoded: bytes | None, size: int, head: bytes, tail: bytes, decode: bool) -> str | None:
    if not size:
        return "empty"
    missing_end, inside = "", decode and head.startswith(_JPEG)
    if head.startswith(_JPEG):
        missing_end = "" if tail.rstrip(_PADDING).endswith(_JPEG_END) else "truncated: no end of the JPEG"
    elif head.startswith(PNG):
        missing_end = "" if tail.endswith(_PNG_END) else "truncated: no end of the PNG"
    else:
        decode = True
    if not decode and not missing_end:
        return None
    try:
        open_rgb(path, encoded)
    except CorruptImage as error:
        return missing_end or str(error).removeprefix(f"image {path} ")
    found = lost_inside(path.read_bytes() if encoded is None else encoded) if inside else None
    return found and f"damaged inside: {found}"
