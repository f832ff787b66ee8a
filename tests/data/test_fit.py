"""Images and masks meet in every data set: turned by EXIF or not, scaled copies; other sizes are refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import tfrecord_files as files
from spot_fast.data.datasets.coco import Coco
from spot_fast.data.datasets.folder import Folder
from spot_fast.data.datasets.movi import Movi
from spot_fast.data.datasets.movi_tfrecord import MoviRecords
from spot_fast.data.datasets.voc import Voc
from spot_fast.data.masks.fit import scaled_copy, turned
from spot_fast.errors import UserError
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth

SIZE = 64
NAME = "holiday"


def photo(path, size=(60, 90), orientation=1):
    """An image that is of `size` when upright, with a red square in its upper left corner; stored turned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    upright = Image.new("RGB", size, "blue")
    upright.paste("red", (0, 0, min(size) // 2, min(size) // 2))
    turn = Image.Exif()
    turn[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)  # the orientation that undoes it
    stored = Image.new("RGB", size)
    stored.paste(upright)
    stored.getexif()[0x0112] = turn[0x0112]
    stored = ImageOps.exif_transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=95)
    assert ImageOps.exif_transpose(Image.open(path)).size == size


def labels(path, size, square):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size)
    image.paste(1, (0, 0, square, square))
    image.save(path)


def coco(root, size, square, *, name=NAME, folder=False):
    path = root / ("labels.json" if folder else "annotations/instances_val2017.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    box = [0, 0, square, 0, square, square, 0, square]
    images = [{"id": 7, "file_name": f"{name}.jpg", "width": size[0], "height": size[1]}]
    annotations = [{"image_id": 7, "category_id": 1, "segmentation": [box]}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1}]}))


def open_coco(root, size, square, photo_of, name=NAME):
    coco(root, size, square, name=name)
    photo_of(root / "val2017" / f"{name}.jpg")
    return Coco(root, "val", image_size=SIZE, mask_size=SIZE)


def open_json(root, size, square, photo_of, name=NAME):
    coco(root, size, square, name=name, folder=True)
    photo_of(root / f"{name}.jpg")
    return Folder(root, "val", image_size=SIZE, mask_size=SIZE)


def open_folder(root, size, square, photo_of, name=NAME):
    labels(root / f"{name}_mask.png", size, square)
    photo_of(root / f"{name}.jpg")
    return Folder(root, "val", image_size=SIZE, mask_size=SIZE)


def open_voc(root, size, square, photo_of, name=NAME):
    for folder in ("SegmentationObject", "SegmentationClass"):
        labels(root / folder / f"{name}.png", size, square)
    photo_of(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(name)
    return Voc(root, "val", image_size=SIZE, mask_size=SIZE)


OPENERS = [open_coco, open_json, open_folder, open_voc]


def overlap(image_set):
    """IoU of what is red in the image and of the mask, the least of all protocols."""
    image = image_set.val_image(0).int()
    red = image[0] > image[2] + 60
    overlaps = []
    for protocol in PROTOCOLS.values():
        mask = GroundTruth(protocol, image_set).masks(0).instances > 0
        at = (torch.arange(SIZE) * len(mask)) // SIZE
        mask = mask[at][:, at]
        overlaps.append(((red & mask).sum() / (red | mask).sum()).item())
    return min(overlaps)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("open_set", OPENERS)
def test_masks_of_the_upright_image(tmp_path, open_set, orientation):
    """As annotation tools show photos of a phone, half turns and mirrors too; squares and scaled copies alike."""
    for number, (size, masks) in enumerate([((60, 90), (60, 90)), ((90, 90), (90, 90)), ((60, 90), (120, 180))]):
        square = min(masks) // 2
        image_set = open_set(tmp_path / str(number), masks, square, partial(photo, size=size, orientation=orientation))
        assert overlap(image_set) > 0.9


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("open_set", OPENERS)
def test_masks_of_the_stored_image(tmp_path, open_set, orientation):
    """As tools without EXIF show it: whichever image has the masks' size is the one that they are laid over."""
    size = (60, 90)

    def write(path):
        photo(path, size, 1)  # what such a tool shows has its square in the corner
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif, quality=95)

    for number, scale in enumerate((1, 2)):
        masks = (size[0] * scale, size[1] * scale)
        image_set = open_set(tmp_path / str(number), masks, min(masks) // 2, write)
        assert overlap(image_set) > 0.9


@pytest.mark.parametrize("orientation", [2, 3, 4])
@pytest.mark.parametrize(
    "open_set, name", [(open_coco, "000000000007"), (open_coco, "COCO_val2014_000000000007"), (open_voc, "2007_000032")]
)
def test_published_images_stay_as_they_are_stored(tmp_path, open_set, name, orientation):
    """Where sizes do not tell: COCO's and VOC's masks are on the stored pixels, and SPOT reads those."""
    image_set = open_set(tmp_path, (60, 90), 30, lambda path: photo(path, (60, 90), orientation), name)
    image_set.crop = "stretch"
    with Image.open(image_set.paths[0]) as stored:
        expected = np.asarray(stored.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(image_set.val_image(0).numpy(), expected)


@pytest.mark.parametrize("masks", [(64, 64), (90, 60), (60, 80), (1, 1), (6000, 90)])
@pytest.mark.parametrize("open_set", OPENERS)
def test_other_shapes_are_refused(tmp_path, open_set, masks):
    """Another image, or a crop: the file and both sizes are named, under every protocol; the image can be seen."""
    image_set = open_set(tmp_path, masks, 1, photo)
    for protocol in PROTOCOLS.values():
        with pytest.raises(UserError, match=rf"gives {NAME}.jpg masks of {masks[0]} x {masks[1]}, but it is 60 x 90: "):
            GroundTruth(protocol, image_set).masks(0)
    assert image_set.val_image(0).shape == (3, SIZE, SIZE)


def test_both_sizes_of_a_turned_image_are_named(tmp_path):
    image_set = open_folder(tmp_path, (64, 64), 1, lambda path: photo(path, orientation=6))
    with pytest.raises(UserError, match=r"but it is 90 x 60 \(60 x 90 upright\)"):
        image_set.val_masks(0)


def test_voc_needs_both_maps_of_one_size(tmp_path):
    image_set = open_voc(tmp_path, (60, 90), 30, photo)
    labels(image_set.mask_files(0)[1], (120, 180), 60)
    with pytest.raises(UserError, match=r"SegmentationClass/holiday.png is 120 x 180, .*Object/holiday.png is 60 x 90"):
        image_set.val_masks(0)


def test_movi_frames_and_masks(tmp_path):
    """A frame is stretched, and so would be masks of any other shape."""
    clip = tmp_path / "validation" / "00000000"
    clip.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(clip / "00000000_image.png")
    frames = Movi(tmp_path, "val", image_size=16, mask_size=16)
    for size, fits in (((16, 16), True), ((32, 32), True), ((16, 24), False)):
        Image.new("L", size, 255).save(clip / "00000000_mask_01.png")
        if fits:
            assert frames.val_masks(0).instances.min() == 1
        else:
            with pytest.raises(UserError, match="mask_01.png gives 00000000_image.png masks of 16 x 24, but it is 16"):
                frames.val_masks(0)
    Image.new("L", (16, 16), 255).save(clip / "00000000_mask_01.png", format="JPEG")
    with pytest.raises(UserError, match="mask_01.png is a JPEG"):
        frames.val_masks(0)


def test_movi_records(tmp_path):
    clips = [files.clip([Image.new("RGB", (8, 8))], [Image.new("L", size)]) for size in ((8, 8), (8, 12))]
    files.write_shards(tmp_path, "movi_e-validation.tfrecord", [clips])
    frames = MoviRecords(tmp_path, "val", image_size=8, mask_size=8)
    frames.val_masks(0)
    with pytest.raises(UserError, match="masks of 8 x 12, but it is 8 x 8"):
        frames.val_masks(1)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ((640, 427), (320, 213), True),
        ((640, 427), (320, 214), True),
        ((640, 426), (1280, 853), True),
        ((500, 375), (224, 168), True),
        ((4032, 3024), (640, 480), True),
        ((480, 640), (640, 480), False),
        ((640, 480), (640, 427), False),
        ((60, 90), (1, 1), False),
        ((8, 8), (9, 10), False),
        ((1, 1), (1, 1), True),
    ],
)
def test_scaled_copies(one, other, same):
    """Sides may be rounded, either way; in either order."""
    assert scaled_copy(one, other) == scaled_copy(other, one) == same


def test_the_exact_size_goes_before_a_scaled_copy():
    """Nearly square images are scaled copies of themselves turned."""
    assert turned((100, 101), (101, 100), (100, 101), False) is True
    assert turned((101, 100), (101, 100), (100, 101), True) is False
    assert turned((50, 50), (101, 100), (100, 101), True) is True
    assert turned((64, 64), (60, 90), (60, 90), True) is None


def test_training_does_not_look_at_masks(tmp_path):
    """Nor at headers: what training sees of an image is what it saw."""
    coco(tmp_path, (64, 64), 8)
    (tmp_path / "annotations/instances_val2017.json").rename(tmp_path / "annotations/instances_train2017.json")
    photo(tmp_path / "train2017" / f"{NAME}.jpg", orientation=6)
    train = Coco(tmp_path, "train", image_size=SIZE)
    assert train.rgb(0).size == (90, 60) and train._upright_masks == {}
    train.train_image(0, np.random.default_rng(0))
    assert train._upright_masks == {}
