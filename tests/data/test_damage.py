"""Damaged image files are found from both ends of the file, and nothing that can be read is called damaged."""

import io

import pytest
from PIL import Image

from spot_fast.data.decoding import damage
from spot_fast.data.decoding.damage import data_damage, file_damage


def encoded(kind, **options):
    stream = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whole_and_truncated_files(tmp_path, kind):
    path, content = tmp_path / "a.jpg", encoded(kind)
    path.write_bytes(content)
    assert file_damage(path) is None and file_damage(path, decode=True) is None and data_damage(path, content) is None
    path.write_bytes(content[: len(content) // 2])
    expected = f"truncated: no end of the {kind}" if kind in ("JPEG", "PNG") else "cannot be read: "
    assert file_damage(path).startswith(expected) and data_damage(path, path.read_bytes()).startswith(expected)


def test_whole_jpeg_and_png_are_not_decoded(tmp_path, monkeypatch):
    """A hundred thousand of them are looked at in seconds."""
    monkeypatch.setattr(damage, "open_rgb", None)
    for kind in ("JPEG", "PNG"):
        assert data_damage(tmp_path, encoded(kind)) is None
    assert data_damage(tmp_path, encoded("JPEG") + b"\0" * 20) is None  # padding


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photo_with_something_appended_is_whole(tmp_path, kind):
    """Phones append previews and films to their images."""
    assert data_damage(tmp_path, encoded(kind) + b"film" * 5000) is None


def test_damage_in_the_middle_needs_decoding(tmp_path):
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 255
    assert data_damage(tmp_path, bytes(content)) is None
    assert data_damage(tmp_path, bytes(content), decode=True).startswith("cannot be read: ")


def test_what_is_no_image(tmp_path):
    path = tmp_path / "a.jpg"
    assert file_damage(path) == "missing"
    path.write_bytes(b"")
    assert file_damage(path) == "empty"
    path.write_text("this is not an image")
    assert file_damage(path) == "cannot be read: not an image of a known format"
    assert file_damage(tmp_path) == "cannot be read: Is a directory"
    assert file_damage(tmp_path / "x\0y") == "cannot be read: embedded null byte"
