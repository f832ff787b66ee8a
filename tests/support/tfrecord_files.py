"""Tiny TFRecord files, written from the formats' definitions: CRC-32C bit by bit, protobuf messages by hand."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32))


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def delimited(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def bytes_feature(values: Sequence[bytes]) -> bytes:
    return delimited(1, b"".join(delimited(1, value) for value in values))


def float_feature(values: Sequence[float]) -> bytes:
    return delimited(2, delimited(1, struct.pack(f"<{len(values)}f", *values)))


def int_feature(values: Sequence[int], *, packed: bool = True) -> bytes:
    if packed:
        return delimited(3, delimited(1, b"".join(map(varint, values))))
    return delimited(3, b"".join(varint(1 << 3) + varint(value) for value in values))


def example(features: Mapping[str, bytes]) -> bytes:
    entries = (delimited(1, delimited(1, name.encode()) + delimited(2, value)) for name, value in features.items())
    return delimited(1, b"".join(entries))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def clip(frames: Sequence[Image.Image], masks: Sequence[Image.Image]) -> bytes:
    """A clip with the features that are read, and some of each type around them."""
    return example(
        {
            "depth": bytes_feature([b"\0" * 300]),
            "metadata/depth_range": float_feature([0.5, 12.0]),
            "segmentations": bytes_feature([png(mask) for mask in masks]),
            "forward_flow": int_feature(range(1000)),
            "video": bytes_feature([png(frame) for frame in frames]),
            "metadata/num_frames": int_feature([len(frames)]),
        }
    )


def write_shards(folder: Path, name: str, shards: Sequence[Sequence[bytes]]) -> list[Path]:
    """Shards `name`-00000-of-0000N with the given messages as records."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{i:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    for path, messages in zip(paths, shards, strict=True):
        path.write_bytes(b"".join(map(frame, messages)))
    return paths
