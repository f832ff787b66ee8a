"""ClevrTex's folders as they are unpacked: numbers, splits, the central square, masks, and what may be missing."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_folders import make_clevrtex, save_clevrtex
from spot_fast.config import preset
from spot_fast.data import open_set
from spot_fast.data.__main__ import main as data_main
from spot_fast.errors import CorruptImage, UserError


@pytest.fixture
def root(tmp_path):
    make_clevrtex(tmp_path)
    return tmp_path


def opened(root, split="val", **changes):
    return open_set(preset("clevrtex", data=str(root), **changes), split)


@pytest.mark.parametrize("inside", ["", "clevrtex_full"])
def test_splits_are_the_published_numbers(root, inside):
    """Tests 0-4,999, validation 5,000-9,999, training from 10,000 on, however many of them are there."""
    train, test = opened(root / inside, "train"), opened(root / inside)
    assert [train.label(i) for i in range(len(train))] == [
        f"CLEVRTEX_full_{number:06d}.png" for number in (10_000, 10_001, 49_999)
    ]
    assert [test.label(i) for i in range(len(test))] == ["CLEVRTEX_full_000000.png", "CLEVRTEX_full_004999.png"]
    assert test.has_masks and not test.has_classes and not train.has_masks and not train.flip
    assert len(opened(root, "train", train_images=2)) == 2


def test_images_and_masks_are_the_central_square(root):
    """Of 320 × 240 the benchmark takes 192 × 192 from (64, 24); masks are object numbers whatever their colours."""
    stored = Image.open(root / "clevrtex_full/0/CLEVRTEX_full_000000.png").convert("RGB").crop((64, 24, 256, 216))
    numbers = np.asarray(Image.open(root / "clevrtex_full/0/CLEVRTEX_full_000000_flat.png"))[24:216, 64:256]
    images = opened(root, image_size=192, mask_size=192)
    assert torch.equal(images.val_image(0), torch.from_numpy(np.asarray(stored).transpose(2, 0, 1).copy()))
    assert torch.equal(images.val_masks(0).instances, torch.from_numpy(numbers.astype(np.int64)))
    assert images.val_masks(0).instances.unique().tolist() == [0, 1, 2, 10]
    half = opened(root)
    expected = np.asarray(stored.resize((224, 224), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert torch.equal(half.val_image(0), torch.from_numpy(expected.copy()))
    assert half.val_masks(0).instances.shape == (128, 128)


def test_the_region_for_dali_is_the_same_square(root):
    geometry = opened(root, "train").geometry(320, 240, np.random.default_rng(0))
    across, down = 320 / geometry.width, 240 / geometry.height
    corners = [geometry.left * across, geometry.top * down]
    corners += [(geometry.left + 224) * across, (geometry.top + 224) * down]
    assert corners == pytest.approx([64, 24, 256, 216])


def test_outd_is_for_tests_alone(tmp_path):
    save_clevrtex(tmp_path / "clevrtex_outd", "outd", [0, 9_999])
    assert len(opened(tmp_path)) == 2
    with pytest.raises(UserError, match="outd, which has no training images: train on clevrtex_full"):
        opened(tmp_path, "train")


def test_one_of_several_variants(root, tmp_path):
    save_clevrtex(root / "clevrtex_camo", "camo", [0, 1, 2, 4_000])
    assert opened(root).name == "ClevrTex full test"
    assert len(opened(root / "clevrtex_camo")) == 3 and len(opened(root / "clevrtex_camo", "train")) == 1
    save_clevrtex(tmp_path / "others/clevrtex_camo", "camo", [0])
    save_clevrtex(tmp_path / "others/clevrtex_vbg", "vbg", [0])
    with pytest.raises(UserError, match=r"several variants \(clevrtex_vbg, clevrtex_camo\): give the folder of one"):
        opened(tmp_path / "others")
    save_clevrtex(root / "clevrtex_full", "vbg", [3])
    with pytest.raises(UserError, match="has images of .*: give each variant a folder of its own"):
        opened(root)


def test_what_is_missing_is_named(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no CLEVRTEX_\*_NNNNNN.png: ClevrTex needs clevrtex_full/"):
        opened(tmp_path / "empty")
    (root / "clevrtex_full/0/CLEVRTEX_full_000000_flat.png").unlink()
    with pytest.raises(UserError, match="CLEVRTEX_full_000000_flat.png does not exist"):
        opened(root).val_masks(0)
    (root / "clevrtex_full/4/CLEVRTEX_full_004999.png").write_bytes(b"text")
    with pytest.raises(CorruptImage, match="CLEVRTEX_full_004999.png cannot be read: not an image"):
        opened(root).val_image(1)
    save_clevrtex(tmp_path / "part/clevrtex_full", "full", [20_000])
    with pytest.raises(UserError, match="no images with numbers from 0 to 4,999, which are ClevrTex full test: unpack"):
        opened(tmp_path / "part")
    save_clevrtex(tmp_path / "part/clevrtex_full/copy", "full", [20_000])
    with pytest.raises(UserError, match="have the same number: remove one of them"):
        opened(tmp_path / "part", "train")
    rgb = Image.open(root / "clevrtex_full/4/CLEVRTEX_full_004999_flat.png").convert("RGB")
    rgb.save(root / "clevrtex_full/4/CLEVRTEX_full_004999_flat.png")
    with pytest.raises(UserError, match=r"_flat.png has colours \(RGB\) instead of indexed labels"):
        opened(root).val_masks(1)


def test_the_check_counts_what_a_partial_download_lacks(root, capsys):
    assert data_main(["check", str(root), "--decode"]) == 0
    out = capsys.readouterr().out
    assert f"{root}: ClevrTex\n  train  3 images\n  val    2 images, 2 mask files\nnothing is missing" in out
    assert "note: ClevrTex full train has 3 images here and 40,000 in published results" in out
    assert f"--preset clevrtex --data {root}" in out
