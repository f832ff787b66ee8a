"""Damage inside a JPEG is detected, however intact its ends are, and no whole file is reported as damaged."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFile

from spot_fast.data.decoding.damage import data_damage
from spot_fast.data.decoding.jpeg_scan import _last_bytes_decide, _single_scan, broken, lost_inside

RNG = np.random.default_rng(0)


def photo(width, height):
    """Noise that has more of what is large than of what is small."""
    image = Image.new("RGB", (width, height), "grey")
    for scale in (64, 16, 4, 1):
        size = max(1, width // scale), max(1, height // scale)
        noise = Image.fromarray(RNG.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), 0.3)
    return image


def encoded(image, **options):
    kept, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, 1 << 22  # or Pillow cannot encode noise progressively
    try:
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        return file.getvalue()
    finally:
        ImageFile.MAXBLOCK = kept


KINDS = {
    "baseline": {},
    "optimised": dict(optimize=True),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_blocks=7),
    "progressive restarts": dict(progressive=True, restart_marker_rows=1),
    "full chroma": dict(subsampling=0),
}


def test_whole_images_of_every_kind():
    """Sizes that end within a block, all codes, subsamplings, modes and qualities; flat ones, whose bits are zeros."""
    plain = Image.new("RGB", (200, 150), "white")
    images = [photo(*size) for size in ((64, 48), (83, 57), (17, 9), (1, 1), (160, 16))] + [plain, photo(3, 500)]
    for image, mode, (quality, options) in itertools.product(
        images, ("RGB", "L", "CMYK"), itertools.product((5, 75, 100), KINDS.values())
    ):
        data = encoded(image.convert(mode), quality=quality, **options)
        assert broken(data) is None and data_damage("a.jpg", data, decode=True) is None, (image.size, mode, options)


def test_whole_photos_are_not_walked_through():
    """That would take tens of times as long as to decode them, under the interpreter lock."""
    for options in (KINDS["baseline"], KINDS["optimised"], KINDS["full chroma"]):
        for mode in ("RGB", "L"):
            assert _last_bytes_decide(encoded(photo(333, 227).convert(mode), quality=85, **options))
    exif = Image.Exif()
    exif[0x010E] = "a thumbnail may stand here: \xff\xda"
    data = encoded(photo(160, 120), exif=exif.tobytes())
    assert _last_bytes_decide(data) and data[slice(*_single_scan(data))] and broken(data) is None


def damaged(data, how, part):
    """In the middle, with both ends of the file in place."""
    data = bytearray(data)
    length = int(part * len(data))
    start = len(data) // 2 - length // 2
    if how == "cut":
        del data[start : start + length]
    elif how == "doubled":
        data[start:start] = data[start : start + length]
    else:
        fill = {"zeroed": b"\0", "overwritten": b"disk", "ones": b"\xff"}[how]
        data[start : start + length] = (fill * length)[:length]
    return bytes(data)


@pytest.mark.parametrize("how", ["cut", "zeroed", "overwritten", "doubled", "ones"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_inside_is_found(kind, how):
    """A tenth to a half of a photo's data, its last bytes in place."""
    for part in (0.1, 0.25, 0.5):
        data = damaged(encoded(photo(320, 240), quality=80, **KINDS[kind]), how, part)
        assert data_damage("a.jpg", data) is None  # both ends are as they should be
        assert data_damage("a.jpg", data, decode=True), (kind, how, part)


def test_a_few_lost_bytes():
    """A hundredth of a photo: less than a row of blocks."""
    data = encoded(photo(640, 480), quality=90)
    middle, size = len(data) // 2, len(data) // 100
    assert lost_inside(data[:middle] + data[middle + size :]) is not None
    assert lost_inside(data[:middle] + data[middle - size :]) is not None


def test_scans_that_are_missing():
    """A progressive image that was cut and closed again is a blurred one."""
    data = encoded(photo(160, 120), progressive=True)
    scans = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    for scan in scans[1:]:
        start = data.rindex(b"\xff\xc4", 0, scan)  # its table goes with it
        assert broken(data[:start] + b"\xff\xd9") == "a scan is missing"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"appended",
        lambda data: data[:-2] + b"\xff\xff\xd9",  # fill bytes
        lambda data: data[:-2] + b"\0\0\xff\xd9",
        lambda data: data[:-2] + bytes(500) + b"\xff\xd9",  # padding
        lambda data: data[:-2] + b"\xff\xfe\x00\x06text\xff\xd9",  # a comment behind the scan
        lambda data: data[:2] + b"\xff\xfe\x00\x04\xff\xda" + data[2:],  # a marker in a comment
    ],
)
def test_oddities_are_no_damage(change):
    for options in KINDS.values():
        assert data_damage("a.jpg", change(encoded(photo(90, 70), **options)), decode=True) is None


@pytest.mark.parametrize(
    "old, new",
    [
        (b"\xff\xc0\x00\x11\x08", b"\xff\xc9\x00\x11\x08"),
        (b"\xff\xc0\x00\x11\x08\x00\x46", b"\xff\xc0\x00\x11\x08\x00\x00"),
    ],
)
def test_what_is_not_judged(old, new):
    data = encoded(photo(90, 70))
    assert old in data and broken(data.replace(old, new)) is None


def test_nonsense_ends_in_a_sentence():
    """Any byte of a header may be damaged."""
    data = encoded(photo(90, 70), progressive=True)
    for place in range(2, data.index(b"\xff\xda") + 20, 3):
        for byte in (0, 17, 255):
            reason = broken(data[:place] + bytes([byte]) + data[place + 1 :])
            assert reason is None or isinstance(reason, str)
