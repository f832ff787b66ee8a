"""TFRecord files and the tf.train.Example messages in them, read without TensorFlow.

A record is its length (uint64), the masked CRC-32C of those eight bytes, the data, and the masked CRC-32C of the
data; numbers are little-endian. An Example is the protobuf message {1: Features}, Features the map
{1: {1: name, 2: Feature}}, and a Feature is one of {1: list of bytes}, {2: list of float}, {3: list of int64}. Only
lists of bytes are read here, on demand: an image in a record of megabytes costs its own bytes and a few headers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spot_fast.errors import CorruptImage, UserError
from spot_fast.system.optional import required

_MASK_DELTA = 0xA282EAD8
_HEADER, _FOOTER = 12, 4
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C (not zlib's CRC-32) as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = required("crc32c", "reading TFRecord files", "crc32c").crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """Position of a record's data in its file; `number` counts from 0."""

    path: Path
    number: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"record {self.number} of {self.path}"


def records(path: Path) -> Iterator[Record]:
    """The file's records in order; reads only their headers. UserError if it is cut off or a header is damaged."""
    try:
        with open(path, "rb", buffering=0) as file:
            size, start, number = os.fstat(file.fileno()).st_size, 0, 0
            while start < size:
                header = os.pread(file.fileno(), _HEADER, start)
                if len(header) == _HEADER and masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                    raise UserError(
                        f"{path} is damaged: the length of record {number} does not have its checksum; "
                        "download the file again"
                    )
                length = int.from_bytes(header[:8], "little")
                end = start + _HEADER + length + _FOOTER
                if len(header) < _HEADER or end > size:
                    raise UserError(f"{path} is cut off in record {number}: download the file again")
                yield Record(path, number, start + _HEADER, length)
                start, number = end, number + 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read(record: Record, offset: int, length: int) -> bytes:
    """Reads `length` bytes of the record's file; CorruptImage if that fails."""
    with _opened(record) as window:
        return window.read(offset, length)


def verified(record: Record) -> bytes:
    """The record's data; CorruptImage if it does not match its checksum."""
    data = read(record, record.offset, record.length + _FOOTER)
    if masked_crc32c(data[:-_FOOTER]) != int.from_bytes(data[-_FOOTER:], "little"):
        raise CorruptImage(f"{record} is damaged: its data does not have its checksum; download the file again")
    return data[:-_FOOTER]


class Example:
    """The features of a tf.train.Example, by name; CorruptImage if the record is no such message."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._features: dict[str, tuple[int, int]] = {}
        with _opened(record) as window:
            for start, end in window.inside(record.offset, record.offset + record.length, 1):
                for entry in window.inside(start, end, 1):
                    name, feature = b"", (entry[1], entry[1])
                    for field, begin, stop in window.fields(*entry):
                        if field == 1:
                            name = window.take(begin, stop - begin)
                        elif field == 2:
                            feature = (begin, stop)
                    self._features[name.decode(errors="replace")] = feature

    def bytes_list(self, name: str) -> list[tuple[int, int]]:
        """(offset in the file, length) of each value of a feature of bytes; empty if there is no such feature."""
        with _opened(self.record) as window:
            lists = window.inside(*self._features.get(name, (0, 0)), 1)
            return [(start, end - start) for values in lists for start, end in window.inside(*values, 1)]


@contextmanager
def _opened(record: Record) -> Iterator[_Window]:
    try:
        with open(record.path, "rb", buffering=0) as file:
            yield _Window(record, file.fileno())
    except OSError as error:
        raise CorruptImage(f"{record} cannot be read: {error.strerror or error}") from None


class _Window:
    """Reads messages of one record, a few hundred bytes at a time."""

    _SIZE = 256

    def __init__(self, record: Record, file: int) -> None:
        self.record, self.file, self.limit = record, file, record.offset + record.length
        self._start, self._bytes = 0, b""

    def read(self, start: int, length: int) -> bytes:
        data = os.pread(self.file, length, start)
        if len(data) < length:
            raise CorruptImage(f"{self.record} is cut off: download the file again")
        return data

    def take(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, an offset in the file."""
        if length < 0 or start + length > self.limit:
            raise self._malformed()
        if not self._start <= start or start + length > self._start + len(self._bytes):
            size = min(max(length, self._SIZE), self.limit - start)
            self._start, self._bytes = start, self.read(start, size)
        at = start - self._start
        return self._bytes[at : at + length]

    def varint(self, start: int) -> tuple[int, int]:
        """A variable-length integer (seven bits a byte, lowest first, the last below 128) and where it ends."""
        value = 0
        for number in range(10):
            byte = self.take(start + number, 1)[0]
            value |= (byte & 127) << 7 * number
            if byte < 128:
                return value & (1 << 64) - 1, start + number + 1
        raise self._malformed()

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, start, end of the value) of each field of the message from `start` to `end`."""
        while start < end:
            tag, start = self.varint(start)
            wire, begin = tag & 7, start
            if wire == _VARINT:
                start = self.varint(start)[1]
            elif wire == _DELIMITED:
                length, begin = self.varint(start)
                start = begin + length
            elif wire in (_FIXED32, _FIXED64):
                start += 4 if wire == _FIXED32 else 8
            else:
                raise self._malformed()
            if start > end:
                raise self._malformed()
            yield tag >> 3, begin, start

    def inside(self, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
        """(start, end) of each field `number` of the message from `start` to `end`."""
        return ((begin, stop) for field, begin, stop in self.fields(start, end) if field == number)

    def _malformed(self) -> CorruptImage:
        return CorruptImage(f"{self.record} is damaged: it is not a tf.train.Example")
