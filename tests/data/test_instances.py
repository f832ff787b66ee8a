"""COCO instances files that others write: ids as text, lists that do not agree, odd sizes, byte-order marks."""

import codecs
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.data.base import FullLabels
from spot_fast.data.datasets.coco import Coco
from spot_fast.data.masks.instances import Instances, read_images
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import Scores
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def image(number, name="a.jpg", **changes):
    return {"id": number, "file_name": name, "width": 30, "height": 20} | changes


def annotation(number, **changes):
    return {"id": 5, "image_id": number, "category_id": 1, "segmentation": SQUARE} | changes


def write(path, images, annotations, categories=(1,), **options):
    content = {"images": images, "annotations": annotations, "categories": [{"id": each} for each in categories]}
    path.write_text(json.dumps(content, **options))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "instances.json"


@pytest.mark.parametrize(
    "listed, referred",
    [
        *[(0, "0"), ("0", 0), (7, 7.0), (7, "7.0"), (7, " 7 "), ("7", 7.0)],
        *[(139, "000000000139"), ("000000000139", 139), ("abc", "abc"), ("12_a", "12_a")],
        (2**60 + 1, str(2**60 + 1)),
    ],
)
def test_ids_may_be_text_in_one_list_only(file, listed, referred):
    """Of images and of categories: every object would be lost without a word."""
    instances = Instances(write(file, [image(listed)], [annotation(referred)]))
    assert instances.label_maps(instances.images[0])[0].sum() == 100 and not instances.notes
    write(file, [image(1)], [annotation(1, category_id=referred)], [listed, 3])
    instances = Instances(file)
    assert instances.label_maps(instances.images[0])[1].max() == 1


def test_ids_that_are_alike_stay_apart(file):
    write(file, [image("7", "a.jpg"), image(7, "b.jpg")], [annotation("7"), annotation(7), annotation(7)])
    instances = Instances(file)
    assert [instances.count(each) for each in instances.images] == [1, 2]


def test_annotations_that_belong_to_nothing(file):
    """All of them: an error, which would have been scores without an object. Some: a note with their number."""
    lost = [annotation(9), annotation([1]), annotation(None)]
    nothing = (
        "none of the 3 annotations is of an image in the list: the first has image_id 9, the images have ids such as 1"
    )
    with pytest.raises(UserError, match=nothing):
        Instances(write(file, [image(1)], lost))
    assert Instances(write(file, [image(1)], [annotation(1), *lost])).notes == [
        "3 of 4 annotations are of images that are not in the list"
    ]
    with pytest.raises(UserError, match="none of the 1 annotations is of a known category: .* category_id 9"):
        Instances(write(file, [image(1)], [annotation(1, category_id=9)]))
    unknown = [annotation(1, category_id=9), {"image_id": 1, "segmentation": SQUARE}, annotation(1, category_id=[])]
    instances = Instances(write(file, [image(1)], [annotation(1), *unknown]))
    assert instances.notes == ["3 of 4 annotations are of unknown categories and not drawn"]
    assert instances.label_maps(instances.images[0])[0].max() == 1
    assert not Instances(write(file, [image(1)], [])).notes


@pytest.mark.parametrize(
    "images, message",
    [
        ([image(1), image(1, "b.jpg")], "several images with the id 1 of a.jpg"),
        ([image(1), image(2)], "several images with the file name of a.jpg"),
        ([image(1), image(1)], "several images with the file name of a.jpg"),
    ],
)
def test_images_that_are_listed_twice(file, images, message):
    """Their objects would be another's, or scored twice in parts; the other images are not affected."""
    instances = Instances(write(file, [*images, image(3, "c.jpg")], [annotation(1), annotation(3)]))
    with pytest.raises(UserError, match=message):
        instances.label_maps(instances.images[0])
    assert instances.label_maps(instances.images[-1])[0].any()


@pytest.mark.parametrize(
    "size",
    [
        *({"width": width} for width in (0, None, "?")),
        *({"height": height} for height in (-4, 10**9, float("nan"), float("inf"), 20.5)),
        {"width": 60_000, "height": 60_000},
    ],
)
def test_an_odd_size_is_that_images_alone(file, size):
    """One entry of 5,000 must not end an evaluation, nor take the memory of its map."""
    instances = Instances(write(file, [image(1, **size), image(2, "b.jpg")], [annotation(1), annotation(2)]))
    with pytest.raises(UserError, match="says that a.jpg is .* give its width and height in pixels"):
        instances.label_maps(instances.images[0])
    assert instances.label_maps(instances.images[1])[0].any()
    assert [each.file_name for each in read_images(file)] == ["a.jpg", "b.jpg"]


def test_sizes_may_be_text(file):
    instances = Instances(write(file, [image(1, width="30", height=20.0)], [annotation(1)]))
    assert instances.label_maps(instances.images[0])[0].shape == (20, 30)


def test_what_cannot_be_drawn_is_named(file):
    write(file, [image(1)], [annotation(1), {"id": 8, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}])
    instances = Instances(file)
    with pytest.raises(UserError, match="instances.json: annotation 8 of image a.jpg .*: it has no segmentation"):
        instances.label_maps(instances.images[0])


@pytest.mark.parametrize("crowd", [0, "0", None, False, "false", "", 1, "1", True])
def test_crowd_regions_may_be_marked_as_text(file, crowd):
    instances = Instances(write(file, [image(1)], [annotation(1, iscrowd=crowd)]))
    assert instances.full_labels(instances.images[0], crowd=False).instances.any() == (crowd not in (1, "1"))
    assert instances.full_labels(instances.images[0], crowd=True).instances.any()


@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_byte_order_marks(file, mark, encoding):
    """Notepad and PowerShell write them; training reads the list of images its own way."""
    text = write(file, [image(1, "é.jpg")], [annotation(1)], ensure_ascii=False).read_text()
    file.write_bytes(mark + text.encode(encoding))
    assert Instances(file).images == read_images(file) and Instances(file).images[0].file_name == "é.jpg"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="instances.json cannot be read: 'utf-8' codec"):
        Instances(file)


@pytest.fixture
def crowded(tmp_path):
    """An image with 300 objects of 300 categories."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "val2017" / "a.jpg")
    corners = [(3 * (n % 20), 4 * (n // 20)) for n in range(300)]
    annotations = [
        annotation(1, category_id=1000 + n, segmentation=[[x, y, x + 2, y, x + 2, y + 3, x, y + 3]])
        for n, (x, y) in enumerate(corners)
    ]
    file = tmp_path / "annotations" / "instances_val2017.json"
    write(file, [image(1, width=64, height=64)], annotations, range(1000, 1300))
    return Coco(tmp_path, "val", image_size=64, mask_size=64)


def test_more_objects_and_categories_than_255(crowded):
    """A mask of each object's own is found exactly, whatever the object's number, under every protocol."""
    assert {int(labels.max()) for labels in crowded.full_masks(0)[:2]} == {300}
    for protocol in PROTOCOLS.values():
        truth = GroundTruth(protocol, crowded).masks(0)
        scores = Scores(protocol.rules)
        first = (truth.instances == 300).long()[None]
        classes = None if truth.classes is None else truth.classes[None]
        scores.add(first, 2, truth.instances[None], classes)
        assert scores.per_image()["mbo_i"][0] > 0
        if not protocol.rules.mbo_background and not protocol.rules.cosine:
            assert scores.objects().tolist() == [300]


def test_the_highest_class_is_told_beyond_255(crowded):
    """Overlaps are of the highest class in DINOSAUR's protocol: classes keep their order."""
    crowded.instances._annotations[1][1]["segmentation"] = SQUARE
    full = crowded.full_labels(0, crowd=True)
    assert np.array_equal(full.top_classes >= full.classes, np.ones((64, 64), bool)) and full.covered.any()


def test_label_of_an_image_is_its_listed_name(tmp_path):
    """Images of one name in several folders are told apart."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images = [image(1, "a/1.jpg"), image(2, "b/1.jpg")]
    write(tmp_path / "annotations" / "instances_val2017.json", images, [annotation(1)])
    assert [Coco(tmp_path, "val").label(index) for index in range(2)] == ["a/1.jpg", "b/1.jpg"]


def test_deep_labels_reach_the_protocols_whole(tmp_path):
    """40,000 does not fit 16 bits with a sign."""
    deep = np.full((32, 32), 40_000, np.int32)
    nowhere = np.zeros((32, 32), bool)
    full = FullLabels(deep, deep, deep, nowhere, nowhere)
    for protocol in PROTOCOLS.values():
        if protocol.truth is not None:
            assert torch.equal(protocol.truth(full, 16).instances.unique(), torch.tensor([40_000]))
