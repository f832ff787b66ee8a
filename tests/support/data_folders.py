"""Small folders of images and annotations in the layouts of the data sets that `spot_fast.data` opens."""

import json

import numpy as np
from PIL import Image

BOX = [[0, 0, 10, 0, 10, 20, 0, 20]]
OVERLAP = [[5, 0, 30, 0, 30, 20, 5, 20]]


def coco_file(path, file_names, categories=(40, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "categories": [{"id": i} for i in categories],
        "images": [{"id": f"i{n}", "file_name": name, "width": 30, "height": 20} for n, name in enumerate(file_names)],
        "annotations": [
            {"id": 1, "image_id": "i0", "category_id": 7, "segmentation": BOX, "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": "i0", "category_id": 40, "segmentation": OVERLAP, "area": 500, "iscrowd": 0},
        ],
    }
    path.write_text(json.dumps(content))


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (20, 20), "red")).save(path)


def labels(value=1):
    return Image.fromarray(np.full((20, 20), value, np.uint8))


def make_coco(root):
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{n}.jpg" for n in range(count)]
        coco_file(root / "annotations" / f"instances_{split}2017.json", names)
        for name in names:
            save(root / f"{split}2017" / name, Image.new("RGB", (30, 20), "red"))


def make_voc(root):
    inside = root / "VOCdevkit" / "VOC2012"
    (inside / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in (("trainaug", "abc"), ("val", "de")):
        (inside / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            save(inside / "JPEGImages" / f"{name}.jpg")
    for name in "de":
        save(inside / "SegmentationObject" / f"{name}.png", labels())
        save(inside / "SegmentationClass" / f"{name}.png", labels())


def make_folder(root):
    for name in "abc":
        save(root / f"{name}.jpg")


PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [255] * (253 * 3)


def save_labels(path, labels):
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    image.putpalette(PALETTE)
    image.save(path)


def make_labelled_voc(root):
    """Three photos of other sizes, one of them for validation, with two objects and a rim."""
    inside = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationObject", "SegmentationClass"):
        (inside / folder).mkdir(parents=True)
    for name, size in (("2007_000032", (40, 60)), ("2008_000001", (60, 40)), ("2009_000005", (50, 50))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(inside / "JPEGImages" / f"{name}.jpg")
    (inside / "ImageSets/Segmentation/trainaug.txt").write_text("2008_000001\n2009_000005\n\n")
    (inside / "ImageSets/Segmentation/val.txt").write_text("2007_000032\n")
    objects = np.zeros((60, 40), int)
    objects[10:20, 5:15], objects[30:50, 20:40], objects[20:22] = 1, 2, 255
    save_labels(inside / "SegmentationObject" / "2007_000032.png", objects)
    save_labels(inside / "SegmentationClass" / "2007_000032.png", np.where(objects == 255, 255, (objects > 0) * 15))
    return root


def save_clevrtex(folder, variant, numbers):
    """Frames of 320 × 240 with an alpha channel and palette masks, and two of the other files that lie beside them."""
    numbered = np.zeros((240, 320), np.uint8)
    numbered[40:120, 80:140], numbered[100:200, 160:250], numbered[60:90, 200:230], numbered[:20] = 1, 2, 10, 3
    for number in numbers:
        stem = folder / str(number // 1000) / f"CLEVRTEX_{variant}_{number:06d}"
        noise = [Image.effect_noise((320, 240), 60) for _ in "RGB"]
        save(stem.with_name(f"{stem.name}.png"), Image.merge("RGBA", [*noise, Image.new("L", (320, 240), 255)]))
        save(stem.with_name(f"{stem.name}_depth_0001.png"), Image.new("L", (320, 240)))
        save_labels(stem.with_name(f"{stem.name}_flat.png"), numbered)
        stem.with_name(f"{stem.name}.json").write_text("{}")


def make_clevrtex(root):
    save_clevrtex(root / "clevrtex_full", "full", [0, 4_999, 5_000, 9_999, 10_000, 10_001, 49_999])
