"""The Python interface: kinds of images in, masks at their own sizes out, the same as the command's."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import spot_fast
from spot_fast import segment
from spot_fast.errors import UserError
from tiny_runs import tiny
from untrained_runs import untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("api") / "run", tiny())


@pytest.fixture(scope="module")
def model(run):
    return spot_fast.load(run.path, "cpu")


def array(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_masks_have_each_images_size(model):
    photo, wide = Image.fromarray(array(40, 70)), torch.from_numpy(array(20, 90, 1)).permute(2, 0, 1)
    result = model.segment_images([photo, wide, array(33, 31)[..., 0], array(32, 32)], batch_size=3)
    sizes = [(40, 70), (20, 90), (33, 31), (32, 32)]
    assert len(result) == 4 and result.sizes == sizes
    assert result.slots.shape == (4, 3, 16) and result.token_masks.shape == (4, 16, 3)
    for masks, labels, size in zip(result.masks, result.labels, sizes, strict=True):
        assert masks.shape == (3, *size) and masks.dtype == torch.float32
        assert labels.shape == size and labels.dtype == torch.uint8
        torch.testing.assert_close(masks.sum(0), torch.ones(size))
        assert torch.equal(labels.long(), masks.argmax(0))


def test_every_kind_of_image_means_the_same(model):
    pixels = array(48, 36)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = model.segment_images([pixels])
    single = [Image.fromarray(pixels), pixels, pixels[None], chw, chw[None], [chw], pixels[:, ::-1][:, ::-1]]
    for images in single:
        assert torch.equal(model.segment_images(images).slots, expected.slots)
    two = model.segment_images(torch.stack([chw, chw]))
    assert len(two) == 2
    torch.testing.assert_close(two.slots, expected.slots.expand(2, -1, -1), rtol=1e-4, atol=1e-5)
    grey = np.repeat(pixels[..., :1], 3, -1)
    assert torch.equal(model.segment_images(pixels[..., 0]).slots, model.segment_images(grey).slots)


def test_labels_are_those_of_the_segment_command(run, model, tmp_path):
    Image.fromarray(array(50, 30)).save(tmp_path / "photo.png")
    for orders in ("0", "all"):
        out = tmp_path / orders
        argv = [str(tmp_path / "photo.png"), "--run", str(run.path), "--out", str(out), "--orders", orders]
        # the API computes in float32, the command in bfloat16 where the CPU multiplies it
        assert segment.main(argv + ["--device", "cpu", "--precision", "float32"]) == 0
        with Image.open(out / "photo_labels.png") as labels:
            from_api = model.segment_images(Image.open(tmp_path / "photo.png"), orders=orders).labels[0]
            assert np.array_equal(np.asarray(labels), from_api.numpy())


def test_slot_masks_and_seeds_are_a_choice(model):
    image = array(32, 32)
    decoder, slots = model.segment_images(image), model.segment_images(image, masks="slots")
    assert torch.equal(decoder.slots, slots.slots) and torch.equal(slots.token_masks, slots.slot_masks)
    assert not torch.equal(decoder.masks[0], slots.masks[0])
    assert not torch.equal(model.segment_images(image, seed=1).slots, decoder.slots)


@pytest.mark.parametrize(
    "images, words",
    [
        ([], "images is empty"),
        ("photo.jpg", r"images\[0\] is a path: pass PIL.Image.open\('photo.jpg'\)"),
        ([np.zeros((4, 4, 3))], r"images\[0\] has dtype float64: pass uint8"),
        ([array(4, 4), np.zeros((4, 4, 2), np.uint8)], r"images\[1\] has shape \[4, 4, 2\]: expected \[H, W, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"images\[0\] has shape \[4, 4, 3\]: expected \[3, H, W\]"),
        (torch.zeros(3, 0, 3, dtype=torch.uint8), r"images\[0\] has shape \[3, 0, 3\]"),
        ([3], r"images\[0\] is a int"),
    ],
)
def test_wrong_images_are_named(model, images, words):
    with pytest.raises(ValueError, match=words):
        model.segment_images(images)


def test_wrong_options_are_named(model):
    for options, words in (
        ({"masks": "both"}, "masks='both' is unknown"),
        ({"orders": "9"}, "orders '9' is unknown"),
        ({"batch_size": 0}, "batch_size=0: use 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            model.segment_images(array(4, 4), **options)


def test_load_takes_the_newest_run_or_says_what_is_missing(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no finished run"):
        spot_fast.load()
    (tmp_path / "runs").symlink_to(run.path.parent)
    assert torch.equal(spot_fast.load(device="cpu").slot_encoder.slot_mean, run.model.slot_encoder.slot_mean)


def test_importing_the_package_alone_imports_nothing_heavy():
    code = "import sys, spot_fast; assert 'torch' not in sys.modules; spot_fast.UserError; print(dir(spot_fast))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "'load'" in done.stdout, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        spot_fast.lod  # noqa: B018
