"""COCO: maps and images equal the official ones; every region format; clear sentences for what is missing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import golden_tensors
from paths import GOLDEN
from spot_fast.config import preset
from spot_fast.data import open_set, open_sets
from spot_fast.data.datasets.coco import CLASS_OF_CATEGORY, Coco
from spot_fast.data.masks.regions import decode_segmentation
from spot_fast.errors import CorruptImage, UserError

MINI = GOLDEN / "coco_mini"
IDS = [42, 7, 1000]
GOLDEN = ["coco.image_*"]


@pytest.fixture(scope="module")
def mini():
    return Coco(MINI, "val")


def test_images_are_in_the_order_of_the_file(mini):
    golden_tensors.assert_close("coco.image_ids", torch.tensor(mini.image_ids))
    assert [mini.label(i) for i in range(len(mini))] == [f"{i:012d}.jpg" for i in IDS]


@pytest.mark.parametrize("index, image_id", list(enumerate(IDS)))
def test_full_maps(mini, index, image_id):
    for kind, labels in zip(("instance", "class", "ignore"), mini.full_masks(index), strict=True):
        golden_tensors.assert_close(f"coco.image_{image_id}.{kind}_map_full", torch.from_numpy(labels))


@pytest.mark.parametrize("mask_size", [320, 128])
@pytest.mark.parametrize("index, image_id", list(enumerate(IDS)))
def test_cropped_maps(index, image_id, mask_size):
    masks = Coco(MINI, "val", mask_size=mask_size).val_masks(index)
    for kind, labels in (("instance", masks.instances), ("class", masks.classes), ("ignore", masks.ignore)):
        golden_tensors.assert_close(f"coco.image_{image_id}.{kind}_map_{mask_size}", labels)
    assert masks.instances.dtype == torch.int64


@pytest.mark.parametrize("index, image_id", list(enumerate(IDS)))
def test_images(mini, index, image_id):
    """Exact with the JPEG decoder the golden files were made with, two levels with another."""
    image = mini.val_image(index)
    assert image.dtype == torch.uint8
    golden_tensors.assert_close(f"coco.image_{image_id}.val_image_224_uint8", image, atol=2)


def test_normalised_image():
    image = Coco(MINI, "val", image_size=96).val_image(0).double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    golden_tensors.assert_close("coco.image_42.val_image_96", normalised, atol=2 / 255 / 0.224)


def test_classes_are_numbered_without_gaps():
    assert list(CLASS_OF_CATEGORY.values()) == list(range(1, 81))
    assert (CLASS_OF_CATEGORY[1], CLASS_OF_CATEGORY[13], CLASS_OF_CATEGORY[90]) == (1, 12, 80)
    assert 12 not in CLASS_OF_CATEGORY and 91 not in CLASS_OF_CATEGORY


@pytest.mark.parametrize(
    "categories, classes",
    [
        (None, {1, 12}),  # no list: COCO's numbering, and 12 is none of its categories
        ([1, 13], {1, 12}),  # COCO's own, or some of them
        ([1, 12, 13], {1, 2, 3}),  # others, numbered by their place in the list
    ],
)
def test_categories_that_are_not_cocos_are_numbered_by_the_file(layout, categories, classes):
    """A set in COCO's layout with categories of its own: none of its objects may get lost."""
    file = layout / "annotations" / "instances_val2017.json"
    boxes = {1: [0, 0, 9, 0, 9, 9, 0, 9], 12: [20, 0, 29, 0, 29, 9, 20, 9], 13: [0, 20, 9, 20, 9, 29, 0, 29]}
    content = json.loads(file.read_text())
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": i, "segmentation": [box]} for i, box in boxes.items()
    ]
    if categories:
        content["categories"] = [{"id": i, "name": f"thing {i}"} for i in categories]
    file.write_text(json.dumps(content))
    instances, drawn, _ = Coco(layout, "val").full_masks(0)
    assert set(np.unique(drawn)) - {0} == classes and len(np.unique(instances)) == len(classes) + 1


def test_region_formats_agree():
    from pycocotools import mask as rle

    box = np.zeros((20, 30), np.uint8)
    box[3:9, 5:25] = 1
    polygon = [[5, 3, 25, 3, 25, 9, 5, 9]]
    compressed = rle.encode(np.asfortranarray(box))
    as_text = {"size": [20, 30], "counts": compressed["counts"].decode()}
    flat = box.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    for segmentation in (polygon, as_text, {"size": [20, 30], "counts": counts}):
        assert np.array_equal(decode_segmentation(segmentation, 20, 30), box.astype(bool))
    assert not decode_segmentation([], 20, 30).any()


@pytest.fixture
def layout(tmp_path):
    """Two training images and one validation image, image folders under images/."""
    (tmp_path / "annotations").mkdir()
    for split, names in (("train2017", ["a.jpg", "b.jpg"]), ("val2017", ["c.jpg"])):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        images = []
        for number, name in enumerate(names):
            Image.new("RGB", (50, 40), (200, 10 * number, 0)).save(folder / name)
            images.append({"id": number, "file_name": name, "width": 50, "height": 40})
        # Training must not read masks: these regions cannot be decoded.
        annotations = [{"id": 9, "image_id": 0, "category_id": 1, "segmentation": {"counts": "?", "size": [1, 1]}}]
        content = {"info": {"note": 'a quoted "images": [0]'}, "annotations": annotations, "images": images}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_training_never_touches_masks(layout):
    config = preset("coco", data=str(layout), image_size=32)
    train, val = open_sets(config)
    assert (len(train), len(val)) == (2, 1)
    assert train.flip and not val.flip and not train.has_masks
    assert train.train_image(1, np.random.default_rng(0)).shape == (3, 32, 32)
    with pytest.raises(UserError, match="without masks"):
        train.val_masks(0)
    with pytest.raises(UserError, match=r"instances_val2017.json: annotation 9 of image c.jpg cannot be decoded"):
        val.val_masks(0)


def test_limits(layout):
    train, _ = open_sets(preset("coco", data=str(layout), train_images=1, val_images=1))
    assert len(train) == 1


def test_missing_things_are_named(layout):
    with pytest.raises(UserError, match="--preset coco needs --data PATH, a folder with annotations/instances_train"):
        open_sets(preset("coco"))
    with pytest.raises(UserError, match="--data nowhere is not a folder: --preset coco needs"):
        open_set(preset("coco", data="nowhere"), "val")
    with pytest.raises(UserError, match="neither train2017/ nor images/train2017/"):
        Coco(MINI, "train")
    file = layout / "annotations" / "instances_val2017.json"
    text = file.read_text()
    for content, message in [
        (text[:-40], "not complete JSON"),
        ("[]", 'no list "images"'),
        (text.replace("file_name", "name"), "lacks 'file_name'"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            Coco(layout, "val")
    file.unlink()
    with pytest.raises(UserError, match="instances_val2017.json is missing: COCO needs"):
        Coco(layout, "val")
    (layout / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(UserError, match='no list "images"'):
        Coco(layout, "train")


def test_corrupt_image_is_named(layout):
    image = layout / "images" / "val2017" / "c.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(CorruptImage, match=r"c\.jpg cannot be read"):
        Coco(layout, "val").val_image(0)
