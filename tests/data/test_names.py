"""Names of images as lists, annotations and disks have them: marks, quotes, accents, and bytes that are not UTF-8."""

import csv
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

import tiny_runs
from data_folders import coco_file
from spot_fast.config import preset
from spot_fast.data import Folder, Loader, open_set
from spot_fast.data.datasets.folder import read_list
from spot_fast.data.datasets.voc import read_names
from spot_fast.data.listing.names import alike, listed, located, read_lines
from spot_fast.errors import CorruptImage, UserError
from spot_fast.evaluation.scoring import Evaluation
from spot_fast.evaluation.tables import write_csv
from spot_fast.segmentation.files import Origin, save, save_tensors
from spot_fast.training.run_folder import CORRUPT, RunFolder

NFC, NFD = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
LATIN = os.fsdecode(b"caf\xe9.jpg")


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(path)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_in_every_encoding_that_editors_write(tmp_path, encoding, end):
    for name in ("a.jpg", NFC):
        image(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(f"a.jpg{end}{NFC}{end}".encode(encoding))
    assert read_list(tmp_path / "list.txt") == [tmp_path / "a.jpg", tmp_path / NFC]
    assert read_names(tmp_path / "list.txt") == ["a", NFC.removesuffix(".jpg")]


def test_lists_without_a_mark_that_are_not_utf8(tmp_path):
    """The bytes of the line are those of the file's name."""
    image(tmp_path / LATIN)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert read_list(tmp_path / "list.txt") == [tmp_path / LATIN]


@pytest.mark.parametrize(
    "line, name",
    [
        ('"my photo.jpg"', "my photo.jpg"),
        ("'a.jpg'", "a.jpg"),
        ("  a.jpg \t", "a.jpg"),
        ("sub\\a.jpg", "sub/a.jpg"),
        ("a.jpg 17", "a.jpg"),
        ("a.jpg,cat", "a.jpg"),
        ("a.jpg\t3", "a.jpg"),
        ("my photo.jpg", "my photo.jpg"),
        ("#1.jpg", "#1.jpg"),
        (" a", " a"),
        ("x\x85y.jpg", "x\x85y.jpg"),
        ("./a.jpg", "a.jpg"),
        (f"{NFD}", NFC),
        ("gone.jpg", "gone.jpg"),
    ],
)
def test_a_line_of_a_list(tmp_path, line, name):
    if name != "gone.jpg":
        image(tmp_path / "x.jpg").rename(tmp_path / "x")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x").rename(tmp_path / name)
    assert listed(line, tmp_path) == tmp_path / name


def test_notes_in_lists_and_paths_of_windows(tmp_path):
    image(tmp_path / "a.jpg")
    file = tmp_path / "list.txt"
    file.write_text("# my images\na.jpg\n\ngone.jpg\n")
    assert [path.name for path in read_list(file)] == ["a.jpg", "gone.jpg"]
    for line in ("C:\\photos\\a.jpg", '"d:/photos/a.jpg"', "\\\\server\\share\\a.jpg"):
        file.write_text(f"{line}\n")
        with pytest.raises(UserError, match="lists no image that exists: .* is a path of Windows"):
            read_list(file)
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match="cannot be read"):
        read_lines(file)
    file.write_bytes(b"P6\0\xff")
    with pytest.raises(UserError, match="it is not text"):
        read_lines(file)


@pytest.mark.parametrize("written, stored", [(NFC, NFD), (NFD, NFC)])
def test_accents_may_be_written_in_another_way(tmp_path, written, stored):
    """In lists, COCO files and their folders; the file of the very name comes first."""
    folder = tmp_path / stored
    image(folder / stored)
    assert located(tmp_path / written / written) == folder / stored
    coco_file(tmp_path / "x.json", [f"{written}/{written}"])
    assert Folder(tmp_path, "val").paths == [folder / stored]
    root = tmp_path / "coco"
    for split in ("train", "val"):
        coco_file(root / "annotations" / f"instances_{split}2017.json", [written, "gone.jpg"])
        image(root / f"{split}2017" / stored)
        images = open_set(preset("coco", data=str(root), image_size=16), split)
        assert images.paths == [root / f"{split}2017" / name for name in (stored, "gone.jpg")]
    image(folder / written)
    assert located(folder / written) == folder / written and located(folder / stored) == folder / stored


def test_accents_in_voc(tmp_path):
    inside = tmp_path / "VOC2012"
    (inside / "ImageSets/Segmentation").mkdir(parents=True)
    (inside / "ImageSets/Segmentation/val.txt").write_text(NFC.removesuffix(".jpg"))
    image(inside / "JPEGImages" / NFD)
    for folder, form in (("SegmentationObject", NFC), ("SegmentationClass", NFD)):
        (inside / folder).mkdir()
        Image.fromarray(np.ones((20, 30), np.uint8)).save(inside / folder / form.replace("jpg", "png"))
    images = open_set(preset("voc", data=str(tmp_path), image_size=16), "val")
    assert images.paths == [inside / "JPEGImages" / NFD] and images.val_masks(0).instances.max() == 1


def test_a_name_that_differs_in_case_is_told(tmp_path):
    image(tmp_path / "IMG.JPG")
    images = Folder([tmp_path / "IMG.JPG"], image_size=16)
    images.paths = [tmp_path / "img.jpg", tmp_path / "other.jpg"]
    with pytest.raises(CorruptImage, match=r"img\.jpg does not exist, but IMG\.JPG does: names have to agree in"):
        images.val_image(0)
    with pytest.raises(CorruptImage, match=r"other\.jpg does not exist$"):
        images.val_image(1)


def test_a_folder_is_listed_once_however_many_of_its_files_are_missing(tmp_path, monkeypatch):
    """Of a large set each list takes a tenth of a second, and a hundredth of a set may be missing."""
    image(tmp_path / "a.jpg")
    seen, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: seen.append(folder) or listdir(folder))
    assert [alike(tmp_path / f"{number}.jpg") for number in range(5)] == [""] * 5 and len(seen) == 1


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg", "x" * 300 + ".jpg"])
def test_names_that_no_file_can_have_are_replaced(tmp_path, name):
    """As annotations may give them; a run goes on."""
    for number in range(4):
        image(tmp_path / f"{number}.jpg")
    images = Folder(tmp_path, image_size=16)
    images.paths.append(tmp_path / name)
    loader = Loader(images, 5)
    next(loader.epoch(0))
    assert list(loader.corrupt) == [str(tmp_path / name)]


def test_corrupt_txt_names_files_that_are_not_utf8(tmp_path):
    """Byte for byte, also where a resumed run adds others."""
    with RunFolder.create(tiny_runs.tiny(), root=tmp_path) as folder:
        folder.write_corrupt({LATIN: f"image {LATIN} cannot be\nread"})
        folder.write_corrupt({"two\nlines.jpg": "no", NFD: "no"})
        assert (folder.path / CORRUPT).read_bytes().split(b"\n") == [
            NFD.encode() + b"\tno",
            b"caf\xe9.jpg\timage caf\xe9.jpg cannot be read",
            b"two lines.jpg\tno",
            b"",
        ]


def test_tables_name_files_that_are_not_utf8(tmp_path):
    evaluation = Evaluation(
        tables=[],
        images=0,
        data="x",
        labels=[],
        indices=[],
        skipped={LATIN: f"image {LATIN}"},
        reconstruction={},
        seconds_per_image=0.0,
        metric_seconds_per_image=0.0,
    )
    write_csv(tmp_path / "x.csv", [("run", evaluation)])
    with open(tmp_path / "x.csv", encoding="utf-8") as file:
        assert [line["image"] for line in csv.DictReader(file)] == ["caf\\udce9.jpg"]


def test_outputs_of_segment_name_files_that_are_not_utf8(tmp_path):
    metadata = Origin(LATIN, LATIN, "run").metadata() | {"model": f"run {LATIN}"}
    save(Image.new("RGB", (2, 2)), tmp_path / f"{LATIN}.png", metadata)
    save_tensors({}, tmp_path / f"{LATIN}.safetensors", metadata)
    with Image.open(tmp_path / f"{LATIN}.png") as image:
        assert image.info["image"] == "caf?.jpg"
