"""What a JPEG's header decides: who may decode the image, its size, and how it is turned."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from spot_fast.data.decoding import jpeg

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


def encoded(image=IMAGE, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


CMYK = encoded(IMAGE.convert("CMYK"))
TRANSFORM = CMYK.index(b"Adobe") + 11
YCCK = CMYK[:TRANSFORM] + b"\2" + CMYK[TRANSFORM + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        encoded(),
        encoded(progressive=True),
        encoded(subsampling=0),
        encoded(IMAGE.convert("L")),
        encoded(exif=exif(6)),
        encoded(comment=b"a comment"),
        encoded(icc_profile=b"a profile " * 9000),
        encoded().replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    ],
)
def test_plain_jpegs(data):
    assert Image.open(io.BytesIO(data)).size == (40, 24)
    header = jpeg.plain_header(data)
    assert (header.width, header.height) == (40, 24)
    assert all(data[begin : begin + 2] == b"\xff\xe1" for begin, _ in header.metadata)


@pytest.mark.parametrize(
    "data",
    [
        CMYK,
        YCCK,
        encoded(keep_rgb=True),
        encoded(kind="PNG"),
        encoded(IMAGE.convert("P"), "GIF"),
        encoded()[:-2],
        encoded() + b"more",
        encoded()[:300] + b"\xff\xd9",
        b"",
        b"\xff\xd8\xff\xd9",
        encoded().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        encoded().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc9\x00\x11\x08"),  # arithmetic code
        encoded().replace(b"\x00\x18\x00\x28", b"\x00\x00\x00\x28"),  # the height comes later
        encoded().replace(b"\xff\xdb\x00\x43", b"\xff\xdb\x00\x01"),  # lengths of a segment that cannot be
        encoded().replace(b"\xff\xdb\x00\x43", b"\xff\xdb\xff\xff"),
    ],
    ids=range(15),
)
def test_everything_else(data):
    assert jpeg.plain_header(data) is None


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_and_nothing_else_is_kept(turn):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % turn
    for options in (dict(exif=exif(turn)), dict(xmp=xmp), dict(exif=exif(turn), xmp=xmp.replace(b"%d" % turn, b"4"))):
        data = encoded(**options)
        header = jpeg.plain_header(data)
        assert header.metadata and jpeg.orientation(data) == turn
        bare = jpeg.oriented(data, header.metadata, turn)
        upright = (ImageOps.exif_transpose(Image.open(io.BytesIO(each))) for each in (data, bare))
        assert np.array_equal(*upright)
        image = Image.open(io.BytesIO(bare))
        assert dict(image.getexif()) == ({} if turn == 1 else {0x0112: turn}) and "xmp" not in image.info


def test_orientation_of_what_is_no_image():
    assert jpeg.orientation(b"this is not an image") is None
    assert jpeg.orientation(encoded(exif=exif(0))) == jpeg.orientation(encoded(exif=exif(9))) == 1
