"""A tiny hand-made PASCAL VOC 2012."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_folders import make_labelled_voc
from spot_fast.config import preset
from spot_fast.data import open_set, open_sets
from spot_fast.data.datasets.voc import read_names
from spot_fast.errors import UserError


@pytest.fixture
def voc(tmp_path):
    return make_labelled_voc(tmp_path)


def test_rim_is_background(voc):
    val = open_set(preset("voc", data=str(voc), mask_size=40), "val")
    masks = val.val_masks(0)
    expected = torch.zeros(40, 40, dtype=torch.int64)
    expected[0:10, 5:15], expected[20:40, 20:40] = 1, 2  # rows 10 to 50 of the image
    assert torch.equal(masks.instances, expected)
    assert torch.equal(masks.classes, (expected > 0) * 15)
    assert masks.ignore is None


def test_training_crops_at_random(voc):
    train, val = open_sets(preset("voc", data=str(voc), image_size=32))
    assert len(train) == 2 and train.random_crop and not train.has_masks
    crops = [train.train_image(0, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1])
    assert val.val_image(0).shape == (3, 32, 32)


@pytest.mark.parametrize("inside", ["VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_of_its_folders(voc, inside):
    assert len(open_set(preset("voc", data=str(voc / inside)), "train")) == 2


def test_missing_things_are_named(voc):
    root = voc / "VOCdevkit" / "VOC2012"
    with pytest.raises(UserError, match="--preset voc needs --data PATH, a folder with JPEGImages/"):
        open_set(preset("voc"), "train")
    with pytest.raises(UserError, match="has no JPEGImages/"):
        open_set(preset("voc", data=str(root / "ImageSets")), "train")
    (root / "ImageSets/Segmentation/trainaug.txt").unlink()
    with pytest.raises(UserError, match="trainaug.txt is missing: VOC trains on trainaug, the 10,582 names"):
        open_set(preset("voc", data=str(voc)), "train")
    Image.new("RGB", (40, 60)).save(root / "SegmentationObject" / "2007_000032.png")
    val = open_set(preset("voc", data=str(voc)), "val")
    with pytest.raises(UserError, match="has colours"):
        val.val_masks(0)


@pytest.fixture
def sbd(voc):
    """SBD beside a VOC without trainaug.txt: one image of its own, one of VOC's val, one that VOC has too."""
    root = voc / "VOCdevkit" / "VOC2012"
    (root / "ImageSets/Segmentation/trainaug.txt").unlink()
    (root / "ImageSets/Segmentation/train.txt").write_text("2009_000005\n")
    dataset = voc / "benchmark_RELEASE" / "dataset"
    (dataset / "img").mkdir(parents=True)
    (dataset / "train.txt").write_text("2011_000001\n2008_000001\n")
    (dataset / "val.txt").write_text("2007_000032\n2008_000001\n")
    for name in ("2011_000001", "2008_000001"):
        Image.new("RGB", (40, 40), "red").save(dataset / "img" / f"{name}.jpg")
    return dataset


@pytest.mark.parametrize("above", [0, 1, 2])
def test_trainaug_is_made_from_sbd(voc, sbd, above):
    """SBD's train and val and VOC's train, without VOC's val, sorted; VOC's own file where both have one."""
    folder = [sbd, *sbd.parents][above]
    train = open_set(preset("voc", data=str(voc), sbd=str(folder), image_size=16), "train")
    own = voc / "VOCdevkit" / "VOC2012" / "JPEGImages"
    assert train.paths == [own / "2008_000001.jpg", own / "2009_000005.jpg", sbd / "img" / "2011_000001.jpg"]
    assert train.train_image(2, np.random.default_rng(0)).shape == (3, 16, 16)


def test_list_of_voc_goes_before_sbd(voc, sbd):
    """Its images may still come from SBD."""
    file = voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    file.write_text("2011_000001\n2009_000005\n")
    train = open_set(preset("voc", data=str(voc), sbd=str(sbd)), "train")
    assert [path.stem for path in train.paths] == ["2011_000001", "2009_000005"]
    assert train.paths[0].parent == sbd / "img"


def test_sbd_without_images_gives_the_list(voc, sbd):
    for image in (sbd / "img").iterdir():
        image.unlink()
    (sbd / "img").rmdir()
    assert len(open_set(preset("voc", data=str(voc), sbd=str(sbd)), "train")) == 3


def test_what_is_missing_of_sbd_is_named(voc, sbd):
    with pytest.raises(UserError, match=r"trainaug.txt is missing: .* download SBD .* and add --sbd PATH$"):
        open_set(preset("voc", data=str(voc)), "train")
    with pytest.raises(UserError, match="--sbd .*img has no train.txt and val.txt"):
        open_set(preset("voc", data=str(voc), sbd=str(sbd / "img")), "train")
    (sbd / "val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt names no images"):
        open_set(preset("voc", data=str(voc), sbd=str(sbd)), "train")
    (sbd / "val.txt").write_text("2007_000032\n")
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    with pytest.raises(UserError, match="Segmentation/train.txt is missing"):
        open_set(preset("voc", data=str(voc), sbd=str(sbd)), "train")


IMAGES = {"site.v1.0": 1, "my photo 0": 1, "my photo": 1, "2007_000032": 1, "a.png": 1}


@pytest.mark.parametrize(
    "line, name",
    [
        ("site.v1.0", "site.v1.0"),
        ("site.v1.0.jpg", "site.v1.0"),
        ("site.v1.0 1", "site.v1.0"),
        ("my photo 0", "my photo 0"),
        ("my photo 0.JPG", "my photo 0"),
        ("my photo 0 -1", "my photo 0"),
        ("my photo -1", "my photo"),
        ("my photo  1", "my photo"),
        ("2007_000032  1", "2007_000032"),
        ("2007_000032 -1", "2007_000032"),
        ("2007_000032.jpg 2007_000032.png", "2007_000032"),
        ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
        ("img\\2007_000032.jpg", "2007_000032"),
        ("a.png", "a.png"),
        ("a.png.jpg", "a.png"),
        ("  2007_000032\t", "2007_000032"),
        # What is missing is called by its likeliest name.
        ("2008_1 -1", "2008_1"),
        ("2008_1.jpg", "2008_1"),
        ("their photo 0", "their photo 0"),
        ("b.v1.0", "b.v1.0"),
        ("x/b.jpg y/b.png", "b"),
    ],
)
def test_names_in_lists(tmp_path, line, name):
    """Only an image's ending is one; of spaces those images decide that there are."""
    (tmp_path / "val.txt").write_text(f"\n{line}\n\n")
    assert read_names(tmp_path / "val.txt", IMAGES) == [name]


def test_other_endings_of_images_and_masks(voc):
    """In capitals, TIFF for masks; .jpg goes before other endings."""
    root = voc / "VOCdevkit" / "VOC2012"
    photos = root / "JPEGImages"
    (photos / "2007_000032.jpg").rename(photos / "2007_000032.JPG")
    object_file, class_file = (root / f"Segmentation{kind}" / "2007_000032.png" for kind in ("Object", "Class"))
    object_file.rename(object_file.with_suffix(".PNG"))
    Image.open(class_file).save(class_file.with_suffix(".tif"))
    class_file.unlink()
    val = open_set(preset("voc", data=str(voc), mask_size=40), "val")
    assert val.paths == [photos / "2007_000032.JPG"]
    assert val.val_masks(0).instances.max() == 2 and val.val_masks(0).classes.max() == 15
    Image.new("RGB", (40, 60)).save(photos / "2007_000032.jpg")
    assert open_set(preset("voc", data=str(voc)), "val").paths == [photos / "2007_000032.jpg"]
