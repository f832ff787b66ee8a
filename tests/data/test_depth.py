"""Images of more than 8 bits a channel are never black for having fewer than 16; PNG's text decides nothing."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spot_fast.data import Folder
from spot_fast.data.decoding import depth, opening
from spot_fast.data.decoding.damage import file_damage

VALUES = np.random.default_rng(0).integers(0, 4096, (9, 7, 4))
VALUES[0, 0] = 4095


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, bits=16, more=b"", after=b""):
    """A PNG of values [h, w, channels]; more: chunks in front of the pixels, after: behind them."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, (None, 0, 4, 2, 6)[channels], 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels + after + chunk(b"IEND", b"")


def rgb(encoded):
    return np.asarray(opening.open_rgb("a.png", encoded))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_as_many_bits_as_the_largest_value_needs(channels, bits):
    values = VALUES[..., :channels] >> 12 - min(bits, 12) << max(bits - 12, 0)
    if channels in (2, 4):
        values[..., -1] = (1 << bits) - 1  # alpha of as many bits: opaque
    image = rgb(png(values)).astype(int)
    colours = values[..., : 3 if channels > 2 else 1]
    assert np.array_equal(image, np.broadcast_to(colours >> bits - 8, image.shape))


def test_sixteen_bits_that_are_used_lose_their_low_byte():
    """As before, and as Pillow does it for colours."""
    for channels in (1, 3):
        values = VALUES[..., :channels] * 16
        assert np.array_equal(rgb(png(values)), np.broadcast_to(values >> 8, (9, 7, 3)))


@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
def test_tiff(tmp_path, compression):
    Image.fromarray(VALUES[..., 0].astype(np.uint16)).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(opening.open_rgb(tmp_path / "a.tif"), (VALUES[..., :1] >> 4).repeat(3, -1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_colours(tmp_path, order):
    """Written by hand: Pillow writes none."""
    pixels = VALUES[..., :3].astype(f"{order}u2").tobytes()
    numbers = [(256, 7), (257, 9), (273, 200), (278, 9), (279, len(pixels))]
    entries = [(tag, 4, 1, value) for tag, value in numbers] + [(258, 3, 3, 8)]
    entries = sorted(entries + [(tag, 3, 1, value) for tag, value in ((259, 1), (262, 2), (277, 3))])

    def packed(tag, kind, count, value):
        short = kind == 3 and count == 1
        return struct.pack(f"{order}HHI", tag, kind, count) + (
            struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        )

    head = struct.pack(f"{order}2sHI4H", b"II" if order == "<" else b"MM", 42, 16, 16, 16, 16, 16)
    table = struct.pack(f"{order}H", len(entries)) + b"".join(packed(*entry) for entry in entries) + b"\0" * 4
    (tmp_path / "a.tif").write_bytes((head + table).ljust(200, b"\0") + pixels)
    assert np.array_equal(opening.open_rgb(tmp_path / "a.tif"), VALUES[..., :3] >> 4)


def test_dark_images_keep_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(png(VALUES[..., :3], more=chunk(b"eXIf", exif.tobytes()[6:])))
    turned = opening.open_rgb(tmp_path / "a.png", upright=True)
    assert np.array_equal(turned, np.rot90(VALUES[..., :3] >> 4, -1))


def test_other_numbers_are_scaled_to_their_range():
    for values in (np.array([[-1, 1]]), np.array([[0, 70_000]]), np.array([[0.25, 0.75]]), np.array([[0, np.nan, 1]])):
        assert depth.eight_bits(values)[0, 0] == 0 and depth.eight_bits(values)[0, -1] == 255


LONG = b"text\0\0" + zlib.compress(b"a" * 3_000_000)


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", LONG),
        chunk(b"iTXt", b"text\0\1\0\0\0" + LONG[6:]),
        chunk(b"iCCP", LONG),
        chunk(b"tEXt", b"text\0" + b"a" * 900_000) * 80,
        chunk(b"zTXt", b"text\0\0broken"),
        chunk(b"zTXt", b"text\0\7x"),
    ],
    ids=["zTXt", "iTXt", "iCCP", "much", "damaged", "unknown"],
)
@pytest.mark.parametrize("where", ["more", "after"])
def test_text_that_pillow_refuses_costs_no_image(tmp_path, text, where):
    path = tmp_path / "a.png"
    path.write_bytes(png(VALUES[..., :3] >> 4, bits=8, **{where: text}))
    images = Folder(tmp_path, image_size=16)
    assert images.val_image(0).shape == (3, 16, 16)
    assert np.array_equal(opening.open_rgb(path), VALUES[..., :3] >> 4)
    assert file_damage(path) is None and file_damage(path, decode=True) is None


def test_a_png_without_whole_pixels_stays_damaged(tmp_path):
    content = bytearray(png(VALUES[..., :3], more=chunk(b"zTXt", LONG)))
    content[-30] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    assert file_damage(tmp_path / "a.png", decode=True).startswith("cannot be read: ")
