"""MOVi and VOC folders: maps as the official reader gives them, splits, and what is said when something is missing."""

import shutil

import numpy as np
import pytest
from PIL import Image

import golden_tensors
from paths import GOLDEN
from spot_fast.config import preset
from spot_fast.data import open_set
from spot_fast.data.datasets.movi import Movi
from spot_fast.errors import UserError

MINI = GOLDEN / "movi_mini"
GOLDEN = ["movi.*"]


def test_golden_frame():
    frames = Movi(MINI, "val")
    assert len(frames) == 1 and frames.label(0) == "00000000/00000000_image.png"
    assert frames.has_masks and not frames.has_classes
    golden_tensors.assert_close("movi.val_image_224_uint8", frames.val_image(0))
    masks = frames.val_masks(0)
    golden_tensors.assert_close("movi.instance_map_128", masks.instances)
    assert masks.classes is None and masks.ignore is None


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three training and two validation clips of 24 frames; a pixel is (clip, split, frame)."""
    root = tmp_path_factory.mktemp("movi")
    for s, (split, count) in enumerate((("train", 3), ("validation", 2))):
        for c in range(count):
            folder = root / split / f"{c:08d}"
            folder.mkdir(parents=True)
            for f in range(24):
                Image.new("RGB", (16, 16), (c, s, f)).save(folder / f"{f:08d}_image.png")
    return root


def frames_of(image_set):
    return [int(image_set.train_image(i, np.random.default_rng(0))[2, 0, 0]) for i in range(len(image_set))]


def test_training_takes_nine_frames_and_always_the_same(clips):
    stage1 = open_set(preset("movi_c", data=str(clips)), "train")
    stage2 = open_set(preset("movi_c", stage=2, data=str(clips), seed=5), "train")
    frames = frames_of(stage1)
    assert len(frames) == 27 and frames == frames_of(stage2)
    per_clip = [frames[i : i + 9] for i in (0, 9, 18)]
    assert all(len(set(clip)) == 9 and clip == sorted(clip) for clip in per_clip)
    assert per_clip[0] != per_clip[1]
    assert not stage1.flip and not stage1.random_crop


def test_validation_takes_every_frame(clips):
    val = open_set(preset("movi_e", data=str(clips)), "val")
    assert [int(val.val_image(i)[2, 0, 0]) for i in range(len(val))] == list(range(24)) * 2
    assert len(open_set(preset("movi_e", data=str(clips), val_images=30), "val")) == 30
    with pytest.raises(UserError, match="00000000_image.png has no masks 00000000_mask_NN.png beside it"):
        val.val_masks(0)


def test_missing_things_are_named(clips, tmp_path):
    with pytest.raises(UserError, match="--preset movi_c needs --data PATH, a folder with train/ and validation/"):
        open_set(preset("movi_c"), "train")
    with pytest.raises(UserError, match="has no train/: MOVi needs"):
        Movi(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="has no clips"):
        Movi(tmp_path, "train")
    shutil.copytree(MINI / "validation", tmp_path / "validation")
    clip = tmp_path / "validation" / "00000000"
    (clip / "00000000_mask_03.png").rename(clip / "00000000_mask_x.png")
    with pytest.raises(UserError, match="_mask_x.png is not named"):
        Movi(tmp_path, "val").val_masks(0)
    Image.new("L", (5, 5)).save(clip / "00000000_mask_x.png")
    with pytest.raises(UserError, match="_mask_x.png is 5 x 5"):
        Movi(tmp_path, "val").val_masks(0)
