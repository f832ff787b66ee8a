"""Folders and lists of images: what is an image, what is a mask, and which split has which."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_runs
from data_folders import coco_file
from spot_fast.config import preset
from spot_fast.data import open_set, open_sets
from spot_fast.data.datasets.folder import Folder, list_images
from spot_fast.errors import UserError


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def image(path, size=(30, 20)):
    save(path, Image.new("RGB", size, "red"))


def half(value=3, size=(30, 20)):
    """A label map whose left half has `value`."""
    labels = np.zeros(size[::-1], np.uint8)
    labels[:, : size[0] // 2] = value
    return labels


@pytest.fixture
def tree(tmp_path):
    for name in ("b/two.PNG", "b/c/three.jpeg", "one.jpg", ".hidden/four.jpg", "b/.five.png"):
        image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def names(image_set, root):
    return [str(path.relative_to(root)) for path in image_set.paths]


def open_folder(root, split, **changes):
    return open_set(preset("folder", data=str(root), image_size=16, mask_size=20, **changes), split)


def test_recursive_sorted_without_hidden_files(tree):
    assert [str(path.relative_to(tree)) for path in list_images(tree)] == ["b/c/three.jpeg", "b/two.PNG", "one.jpg"]
    assert list_images([tree / "one.jpg", str(tree / "b")])[0] == tree / "one.jpg"


def test_images(tree):
    images = Folder(tree, image_size=16, limit=2)
    assert len(images) == 2 and not images.has_masks
    assert images.label(0) == str(tree / "b/c/three.jpeg")
    assert images.val_image(0).shape == images.train_image(1, np.random.default_rng(0)).shape == (3, 16, 16)


def test_preset_uses_all_images_for_both_splits(tree):
    """The recipe is COCO's; without masks there is nothing to compare with."""
    train, val = open_sets(preset("folder", data=str(tree), train_images=2))
    assert names(train, tree) == ["b/c/three.jpeg", "b/two.PNG"] and len(val) == 3
    assert train.flip and not val.flip and not train.has_masks and not val.has_masks
    with pytest.raises(UserError, match="read without masks: they belong beside the images, as photo_mask.png"):
        val.val_masks(0)


@pytest.mark.parametrize("validation", ["val", "validation", "valid"])
@pytest.mark.parametrize("inside", ["", "images/"])
def test_subfolders_are_splits(tmp_path, inside, validation):
    image(tmp_path / inside / "train" / "a.jpg")
    assert names(open_folder(tmp_path, "val"), tmp_path) == [f"{inside}train/a.jpg"]
    image(tmp_path / inside / validation / "b.jpg")
    assert names(open_folder(tmp_path, "train"), tmp_path) == [f"{inside}train/a.jpg"]
    assert names(open_folder(tmp_path, "val"), tmp_path) == [f"{inside}{validation}/b.jpg"]


def test_text_file_lists_images(tree):
    file = tree / "b" / "list.txt"
    file.write_text(f"two.PNG\n\n../one.jpg\n{tree}/b/c/three.jpeg\n")
    assert [path.resolve() for path in open_folder(file, "train").paths] == [
        tree / "b/two.PNG",
        tree / "one.jpg",
        tree / "b/c/three.jpeg",
    ]
    save(tree / "one_mask.png", Image.fromarray(half()))
    val = open_folder(file, "val")
    assert len(val) == 1 and val.val_masks(0).instances.max() == 3


@pytest.mark.parametrize(
    "photo, mask",
    [
        ("a/photo.jpg", "a/photo_mask.png"),
        ("images/a/photo.jpg", "masks/a/photo.png"),
        ("images/val/photo.jpg", "masks/val/photo.png"),
        ("val/images/photo.jpg", "val/masks/photo.png"),
    ],
)
def test_masks_beside_images(tmp_path, photo, mask):
    """The mask is no image of its own, and only images with masks are validated on."""
    image(tmp_path / photo)
    save(tmp_path / mask, Image.fromarray(half()))
    image(tmp_path / photo.replace("photo", "zebra"))
    (tmp_path / "val").is_dir() and image(tmp_path / "train/images/x.jpg")
    (tmp_path / "images/val").is_dir() and image(tmp_path / "images/train/x.jpg")
    train, val = open_folder(tmp_path, "train"), open_folder(tmp_path, "val")
    assert names(val, tmp_path) == [photo] and val.has_masks and not val.has_classes
    assert mask not in names(train, tmp_path) and not train.has_masks
    expected = torch.zeros(20, 20, dtype=torch.int64)
    expected[:, :10] = 3  # columns 5 to 25 of the image
    masks = val.val_masks(0)
    assert torch.equal(masks.instances, expected) and masks.classes is None and masks.ignore is None


@pytest.mark.parametrize("ending", [".PNG", ".Png", ".tif", ".tiff", ".TIF", ".gif", ".bmp"])
@pytest.mark.parametrize(
    "photo, mask",
    [
        ("a/photo.v1.jpg", "a/photo.v1_mask"),
        ("a/photo.JPG", "a/photo_MASK"),
        ("images/a/photo.jpg", "masks/a/photo"),
        ("Images/photo.jpg", "Masks/photo"),
        ("images/photo.jpg", "masks/photo_mask"),
    ],
)
def test_other_endings_and_capitals_of_masks(tmp_path, ending, photo, mask):
    """A mask of another ending is neither lost nor taken for an image."""
    image(tmp_path / photo)
    save(tmp_path / f"{mask}{ending}", Image.fromarray(half()))
    train, val = open_folder(tmp_path, "train"), open_folder(tmp_path, "val")
    assert names(train, tmp_path) == names(val, tmp_path) == [photo] and val.has_masks
    assert val.val_masks(0).instances.max() == 3
    (tmp_path / "list.txt").write_text(photo)
    assert open_folder(tmp_path / "list.txt", "val").mask_files(0) == [tmp_path / f"{mask}{ending}"]


def test_png_goes_before_other_masks(tmp_path):
    """And small letters before capitals."""
    image(tmp_path / "a.jpg")
    files = [tmp_path / f"a_mask.{ending}" for ending in ("jpg", "gif", "TIF", "tif", "PNG", "png")]
    for file in files:
        file.write_bytes(b"")
        assert open_folder(tmp_path, "val").masks == [file]


def test_a_lossy_mask_is_refused_and_not_left_out(tmp_path):
    image(tmp_path / "a.jpg")
    image(tmp_path / "a_mask.jpg")
    val = open_folder(tmp_path, "val")
    assert names(val, tmp_path) == ["a.jpg"] and val.has_masks
    with pytest.raises(UserError, match="a_mask.jpg is a JPEG"):
        val.val_masks(0)


def test_what_only_looks_like_a_mask_is_an_image(tmp_path):
    for name in ("gas_mask.png", "masks/venice.jpg", "b/photo.jpg", "b/photo_mask.png"):
        image(tmp_path / name)
    assert [path.name for path in list_images(tmp_path)] == ["photo.jpg", "gas_mask.png", "venice.jpg"]
    (tmp_path / "images").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["photo.jpg", "gas_mask.png"]


@pytest.mark.parametrize(
    "mode, value, seen", [("P", 7, 7), ("P", 255, 0), ("L", 255, 255), ("I;16", 1000, 1000), ("1", 1, 1)]
)
def test_formats_of_masks(tmp_path, mode, value, seen):
    """255 is a rim in a palette, as in VOC, and an instance in a grey image, such as a black and white mask."""
    image(tmp_path / "a.jpg")
    labels = half(1).astype(np.uint16 if mode == "I;16" else np.uint8) * value
    mask = Image.fromarray(labels.astype(bool)) if mode == "1" else Image.fromarray(labels)
    if mode == "P":
        mask.putpalette([0, 0, 0] + [255, 0, 0] * 255)
    save(tmp_path / "a_mask.png", mask)
    with Image.open(tmp_path / "a_mask.png") as stored:
        assert stored.mode == mode
    assert open_folder(tmp_path, "val").val_masks(0).instances[0].tolist() == [seen] * 10 + [0] * 10


def test_coloured_masks_are_refused(tmp_path):
    image(tmp_path / "a.jpg")
    save(tmp_path / "a_mask.png", Image.new("RGB", (30, 20)))
    with pytest.raises(UserError, match="a_mask.png has colours"):
        open_folder(tmp_path, "val").val_masks(0)


@pytest.mark.parametrize(
    "photo, file, name",
    [
        ("a/b.jpg", "labels.json", "a/b.jpg"),
        ("images/b.jpg", "labels.json", "b.jpg"),
        ("a/b.jpg", "annotations/labels.json", "a/b.jpg"),
        ("valid/b.jpg", "valid/_annotations.coco.json", "b.jpg"),
        ("val/b.jpg", "annotations/instances_val.json", "b.jpg"),
    ],
)
def test_coco_file(tmp_path, photo, file, name):
    """Any categories, numbered in their order; the earlier instance has the overlap, which is ignored."""
    image(tmp_path / photo)
    image(tmp_path / "train/other.jpg")
    coco_file(tmp_path / file, [name, "missing.jpg"])
    coco_file(tmp_path / "train" / "train.json", ["other.jpg"])
    (tmp_path / "notes.json").write_text('{"images": 3}')
    train, val = open_folder(tmp_path, "train"), open_folder(tmp_path, "val")
    assert val.paths[0] == tmp_path / photo and len(val) == 2 and val.has_masks and val.has_classes
    assert not train.has_masks and tmp_path / "train/other.jpg" in train.paths
    masks = val.val_masks(0)
    assert masks.instances[0].tolist() == [1] * 5 + [2] * 15  # columns 5 to 25 of the image
    assert masks.classes[0].tolist() == [2] * 5 + [1] * 15
    assert masks.ignore[0].tolist() == [1] * 5 + [0] * 15


def test_coco_file_of_both_splits(tmp_path):
    """Each image belongs to the split whose folder it lies in."""
    for name in ("train/a.jpg", "val/b.jpg"):
        image(tmp_path / name)
    for listed in (["val/b.jpg", "train/a.jpg"], ["b.jpg", "a.jpg"]):
        coco_file(tmp_path / "all.json", listed)
        val = open_folder(tmp_path, "val")
        assert names(val, tmp_path) == ["val/b.jpg"] and val.val_masks(0).instances.max() == 2
    coco_file(tmp_path / "all.json", ["train/a.jpg"])
    with pytest.raises(UserError, match="all.json lists no images in .*val: put the annotations of these"):
        open_folder(tmp_path, "val")


def test_coco_file_without_categories(tmp_path):
    image(tmp_path / "a.jpg")
    coco_file(tmp_path / "x.json", ["a.jpg"], categories=())
    val = open_folder(tmp_path, "val")
    assert val.has_masks and not val.has_classes
    masks = val.val_masks(0)
    assert masks.classes is None and masks.instances.max() == 2 and masks.ignore.sum() == 5 * 20


def test_one_coco_file_or_one_for_validation(tmp_path):
    image(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text('{"images": [1], "annotations": [1]}')  # what an annotation tool wrote for a.jpg
    coco_file(tmp_path / "x.json", ["a.jpg"])
    coco_file(tmp_path / "y.json", ["a.jpg"])
    with pytest.raises(UserError, match=r"has several COCO instances files \(x.json, y.json\): leave one there"):
        open_folder(tmp_path, "val")
    coco_file(tmp_path / "y_val.json", ["a.jpg"])
    assert open_folder(tmp_path, "val").instances.path.name == "y_val.json"
    (tmp_path / "captions_val.json").write_text('{"images": [{}], "annotations": [{"caption": "no masks"}]}')
    assert open_folder(tmp_path, "val").instances.path.name == "y_val.json"
    (tmp_path / "y_val.json").write_text('{"images": [], "annotations": [{"segmentation": [')
    with pytest.raises(UserError, match="y_val.json is not complete JSON"):
        open_folder(tmp_path, "val")


@pytest.fixture
def noise(tmp_path):
    """Two epochs' configuration on five images of noise, 40 x 30."""
    changes = {"encoder": "spot_scenes", "dec_heads": 4, "epochs": 2, "warmup_steps": 1, "train_images": 0}
    for n in range(5):
        save(tmp_path / "data" / f"{n}.jpg", Image.effect_noise((40, 30), 90))
    return preset("folder", **{**tiny_runs.CHANGES, **changes}, data=str(tmp_path / "data"))


def test_training_with_and_without_masks(tmp_path, noise):
    """Quick validation reports the loss in any case, and the overlap of those images that have masks."""
    _, outcome = tiny_runs.train(tmp_path / "runs", noise)
    assert outcome.finished and list(outcome.scores) == ["val_loss"]
    save(tmp_path / "data" / "3_mask.png", Image.fromarray(half(size=(40, 30))))
    _, outcome = tiny_runs.train(tmp_path / "runs", noise)
    assert outcome.finished and 0 < outcome.scores["mbo_i_slots"] < 1


def test_training_continues_where_no_mask_can_be_read(tmp_path, noise):
    """Neither the first validation nor a resumed run ends in an error: the log names the images left out."""
    for n in range(5):
        save(tmp_path / "data" / f"{n}_mask.png", Image.fromarray(half(size=(30, 40))))
    folder, outcome = tiny_runs.train(tmp_path / "runs", noise)
    assert outcome.finished and outcome.scores == {}
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = [line["images"] for line in log if line["kind"] == "unreadable"][-1]
    assert len(left_out) == 5 and "masks of 30 x 40, but it is 40 x 30" in left_out[str(tmp_path / "data" / "0.jpg")]


def test_missing_things_are_named(tree):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list_images("nowhere")
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        list_images([tree / "one.jpg", tree / "empty"])
    with pytest.raises(UserError, match="no images given"):
        Folder([])
    with pytest.raises(UserError, match="--preset folder needs --data PATH, a folder of images, or a text file"):
        open_set(preset("folder"), "train")
    with pytest.raises(UserError, match="notes.txt lists no image that exists"):
        open_folder(tree / "notes.txt", "train")
    (tree / "notes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="notes.txt is neither a folder, nor an image by its name, nor a text file"):
        open_folder(tree / "notes.txt", "train")
    (tree / "x.json").write_text("{}")
    with pytest.raises(UserError, match="x.json is no list of images: name the folder"):
        open_folder(tree / "x.json", "train")
