"""Sizes and rounding of torchvision, and every kind of image file as 8-bit RGB."""

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.data import Folder
from spot_fast.data.decoding import opening, transforms
from spot_fast.errors import CorruptImage


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (640, 480, (298, 224)),
        (480, 640, (224, 298)),
        (500, 333, (336, 224)),
        (224, 224, (224, 224)),
        (1, 3, (224, 672)),
    ],
)
def test_minor_size_truncates(width, height, expected):
    assert transforms.minor_size(width, height, 224) == expected


def test_center_crop_rounds_half_to_even():
    columns = np.tile(np.arange(13, dtype=np.uint8), (8, 1))
    for width, left in ((13, 2), (11, 2), (9, 0), (10, 1)):  # margins 5, 3, 1 and 2: halves 2.5, 1.5, 0.5 and 1
        crop = np.asarray(transforms.center_crop(Image.fromarray(columns[:, :width]), 8))
        assert crop[0, 0] == left and crop.shape == (8, 8)
        assert torch.equal(transforms.center_crop_labels(columns[:, :width], 8), torch.tensor(crop).long())


def test_labels_follow_the_image():
    """A label map resized by nearest neighbour and one painted as an image have the same squares."""
    labels = np.random.default_rng(0).integers(0, 70_000, (37, 61))  # beyond 16 bits
    square = transforms.center_crop_labels(labels, 74)
    assert square.shape == (74, 74)
    assert torch.equal(square, torch.from_numpy(labels.repeat(2, 0).repeat(2, 1)[:, 24:98]))
    assert torch.equal(transforms.stretch_labels(labels[:30, :30], 60)[::2, ::2], torch.from_numpy(labels[:30, :30]))


def test_random_crop_reaches_both_ends():
    rng = np.random.default_rng(0)
    corners = {transforms.random_corner(12, 9, 8, rng) for _ in range(200)}
    assert corners == {(left, top) for left in range(5) for top in range(2)}


GREY = np.array([[0, 64], [128, 255]], np.uint8)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        (Image.fromarray(GREY.astype(np.float32) / 255), GREY),
        (Image.fromarray(GREY > 100), (GREY > 100) * 255),
        (Image.fromarray(GREY).convert("P"), GREY),
        (Image.fromarray(np.stack([GREY, GREY * 0 + 255], -1), "LA"), GREY),
        (Image.fromarray(np.stack([GREY, GREY, GREY, GREY * 0], -1)), GREY * 0 + 255),
        (Image.fromarray(255 - np.stack([GREY, GREY, GREY, GREY * 0 + 255], -1), "CMYK"), GREY),
    ],
    ids=["grey", "16 bits", "32 bits", "float", "1 bit", "palette", "grey with alpha", "transparent", "cmyk"],
)
@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")
def test_every_mode_becomes_rgb(tmp_path, image, expected):
    path = tmp_path / "image.tif"
    image.save(path)
    rgb = opening.open_rgb(path)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - np.asarray(expected, int)[..., None]).max() <= 1


def test_transparent_palette(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(opening.open_rgb(tmp_path / "p.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_corrupt_files_are_named(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("import os; os.abort()")
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("cut.png", ""),
        ("text.jpg", "not an image of a known format"),
        ("empty.png", "not an image of a known format"),
        ("gone.png", "does not exist"),
    ):
        with pytest.raises(CorruptImage, match=rf"image .*{name} .*{reason}"):
            opening.open_rgb(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise.save(tmp_path / "large.png")
    with pytest.raises(CorruptImage, match=r"large.png cannot be read: .*decompression bomb"):
        opening.open_rgb(tmp_path / "large.png")


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (1601, 30), (9000, 250)])
def test_the_kept_part_of_a_strip_is_that_of_the_whole(size):
    """Within one level: the whole is never made, so that memory follows the square."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    whole = transforms.minor_size(*size, 24)
    left, top, *kept = transforms.kept_part(*whole, 24)
    assert max(kept) == transforms.WHOLE * 24 < max(whole)
    expected = np.asarray(image.resize(whole, Image.Resampling.BILINEAR)).astype(int)
    resized = np.asarray(transforms.resize_minor(image, 24)).astype(int)
    assert np.abs(resized - expected[top : top + kept[1], left : left + kept[0]]).max() <= 1
    labels = np.arange(size[0] * size[1]).reshape(size[::-1])
    square = transforms.center_crop_labels(labels, 24)
    whole_map = transforms._resize_labels(labels, *whole)
    corner = transforms.center_corner(*kept, 24)
    left, top = left + corner[0], top + corner[1]
    assert np.array_equal(square, whole_map[top : top + 24, left : left + 24])


def test_ordinary_images_are_resized_as_a_whole():
    """To the bit as torchvision does, up to sixteen times as long as wide."""
    image = Image.effect_noise((640, 40), 90).convert("RGB")
    expected = image.resize(transforms.minor_size(640, 40, 24), Image.Resampling.BILINEAR)
    assert np.array_equal(transforms.resize_minor(image, 24), expected)


@pytest.mark.parametrize("crop", ["center", "random", "stretch"])
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_memory_of_a_strip_follows_the_square(tmp_path, crop, size):
    """Resized as a whole it would have 13 million pixels a row."""
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    Image.fromarray(np.ones(size[::-1], np.uint8)).save(tmp_path / "strip_mask.png")
    images = Folder(tmp_path, "val", image_size=224, crop=crop)
    assert images.prepared(0).numel() <= transforms.WHOLE * 3 * 224**2
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 224, 224)
    assert torch.equal(images.train_image(0, np.random.default_rng(0)), red) and torch.equal(images.val_image(0), red)
    assert images.val_masks(0).instances.eq(1).all()


def test_both_loaders_crop_a_strip_at_the_same_place(tmp_path):
    """`geometry` is what DALI goes by."""
    Image.fromarray(np.arange(4000, dtype=np.uint16).astype(np.uint8)[None].repeat(10, 0)).save(tmp_path / "a.png")
    images = Folder(tmp_path, image_size=20, crop="random")
    for seed in range(5):
        place = images.geometry(4000, 10, np.random.default_rng(seed))
        square = images.train_image(0, np.random.default_rng(seed))
        whole = Image.open(tmp_path / "a.png").resize((place.width, place.height), Image.Resampling.BILINEAR)
        expected = np.asarray(whole).astype(int)[place.top : place.top + 20, place.left : place.left + 20]
        assert np.abs(square[0].numpy().astype(int) - expected).max() <= 1


def test_an_image_that_needs_too_much_memory_is_named(tmp_path, monkeypatch):
    """So that the loader replaces it, instead of ending a run with a MemoryError."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def full(*arguments, **options):
        raise MemoryError

    images = Folder(tmp_path, image_size=8)
    for owner, function in ((Image.Image, "convert"), (Image.Image, "resize"), (Image, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, full)
            if function == "convert":
                Image.new("L", (8, 8)).save(tmp_path / "a.png")
            with pytest.raises(CorruptImage, match=r"image .*a\.png needs more memory than is free: scale it down"):
                images.val_image(0)
