"""Reads a JPEG's header, to decide whether DALI or Pillow decodes it.

Not with Pillow: every file passes through here under the interpreter lock, so it has to be quick.

Markers are those of ITU-T T.81, annex B: FFD8 begins a file, FFD9 ends it, and between them come segments, each with a
marker and a length of two bytes, until the first scan.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import ExifTags, Image

from spot_fast.data.decoding import opening

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all of Huffman's code
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic code
_SCAN, _APP1, _APP14 = 0xDA, 0xE1, 0xEE


@dataclass(frozen=True)
class Header:
    """Size in pixels as stored, and the byte ranges [start, end) of metadata (EXIF, XMP) in the file."""

    width: int
    height: int
    metadata: tuple[tuple[int, int], ...]


def plain_header(data: bytes) -> Header | None:
    """The header of a whole JPEG that decoders agree on: 8 bits, grey or YCbCr, Huffman coded.

    None for other formats, files without their last bytes or with more, RGB or CMYK, and headers that make no sense.
    """
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    at, frame, metadata = 2, None, []
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        code, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if code == 0xFF:  # fill bytes before a marker
            at += 1
            continue
        if code == _SCAN:
            return None if frame is None else Header(*frame, tuple(metadata))
        if end < at + 4 or code in OTHER_FRAMES or 0xD0 <= code <= 0xD9:
            return None
        if code in _FRAMES:
            frame = _frame(data[at + 4 : end])
            if frame is None:
                return None
        elif code == _APP1:
            metadata.append((at, end))
        elif code == _APP14 and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] == 0:
            return None  # RGB as it is
        at = end
    return None


def _frame(segment: bytes) -> tuple[int, int] | None:
    """(width, height) if the frame has 8 bits and one or three components."""
    if len(segment) < 6:
        return None
    precision, height, width, components = struct.unpack(">BHHB", segment[:6])
    if precision != 8 or components not in (1, 3) or not width or not height or segment[6::3] == b"RGB":
        return None
    return width, height


def orientation(data: bytes) -> int | None:
    """As `opening.orientation`; None if Pillow cannot open the image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return opening.orientation(image)
    except Exception:  # Pillow's plugins raise errors of every kind
        return None


def oriented(data: bytes, metadata: tuple[tuple[int, int], ...], turn: int) -> bytes:
    """The JPEG with the orientation `turn` as its only metadata, so that no reader can find another one."""
    kept, at = [], 2
    for begin, end in metadata:
        kept.append(data[at:begin])
        at = end
    # TIFF, little endian, one directory with one entry: tag, type 3 (16 bits), count, value.
    tiff = b"II*\0" + struct.pack("<IHHHIII", 8, 1, ExifTags.Base.Orientation, 3, 1, turn, 0)
    exif = b"" if turn == 1 else b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\0\0" + tiff
    return b"".join([_START, exif, *kept, data[at:]])
