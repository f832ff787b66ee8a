"""Which files of a folder are images: what is left out is counted and named, by the check and by the run."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import tiny_runs
from spot_fast import train
from spot_fast.data import Folder
from spot_fast.data.__main__ import main
from spot_fast.data.datasets.folder import list_images, list_noted
from spot_fast.data.listing.search import extensions
from spot_fast.errors import UserError
from spot_fast.segmentation import files as segment_files


def image(path, mode="RGB", size=(30, 20), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def labels(path, colours=False, values=5, size=(30, 20)):
    """A label map, grey or of a few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    maps = np.random.default_rng(0).integers(0, values, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(np.stack([maps * 40, maps, maps], -1) if colours else maps).save(path)


def names(paths, root):
    return [str(path.relative_to(root)) for path in paths]


@pytest.mark.parametrize("ending", "jfif jpe JPG jpeg mpo tga avif webp tiff pgm j2k pcx dib qoi apng sgi".split())
def test_every_ending_that_pillow_reads(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    kind = {"mpo": "MPO", "apng": "PNG", "pgm": "PPM"}.get(ending.lower())
    path = tmp_path / f"a.{ending}"
    with open(path, "wb") as file:
        Image.new("RGB", (20, 20), "red").save(file, kind or Image.registered_extensions()[f".{ending.lower()}"])
    images = Folder(tmp_path, image_size=16)
    assert images.paths == [path] and not images.notes
    assert abs(images.val_image(0)[0].float().mean() - 255) < 3


def test_documents_icons_and_films_are_no_images():
    assert not {".pdf", ".eps", ".ico", ".fits", ".h5", ".ttf", ".mpg", ".wmf"} & extensions()


def test_what_is_not_read_is_counted(tmp_path):
    """Files of unknown kinds, archives apart; not what lies beside images in any set, nor what systems leave."""
    image(tmp_path / "a.jpg")
    unread = "b.heic c.HEIC d.cr2 all.zip notes.txt a.xml Thumbs.db .DS_Store ._a.jpg __MACOSX/._a.jpg README"
    for name in (*unread.split(), "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths, notes = list_noted(tmp_path)
    assert names(paths, tmp_path) == ["a.jpg"]
    assert notes == [
        "3 files with other extensions left out: .heic 2, .cr2 1",
        "1 file with other extensions left out: .zip 1; unpack archives",
    ]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"has no images \(.*\) in it: 3 files with other extensions left out: .heic 2"):
        list_images(tmp_path)


def test_linked_folders_are_followed_each_once(tmp_path):
    """Also around in circles; an image has the path without a link where it has one."""
    root, other = tmp_path / "photos", tmp_path / "disk2" / "b"
    for path in (root / "a" / "0.jpg", other / "1.jpg", other / "sub" / "2.jpg"):
        image(path)
    for link, target in (
        (root / "b", other),
        (root / "again", other),
        (root / "A", root / "a"),
        (root / "up", root),
        (other / "back", root),
        (root / "a" / "file.jpg", other / "1.jpg"),
    ):
        link.symlink_to(target)
    paths, notes = list_noted(root)
    assert names(paths, root) == ["a/0.jpg", "a/file.jpg", "again/1.jpg", "again/sub/2.jpg"] and not notes
    assert len(Folder(root)) == 4


def test_links_that_lead_nowhere_are_named(tmp_path):
    image(tmp_path / "a.jpg")
    for name, target in (("gone.jpg", "nowhere.jpg"), ("folder", "unmounted/disk"), ("self.jpg", "self.jpg")):
        (tmp_path / name).symlink_to(target)
    paths, (note,) = list_noted(tmp_path)
    assert names(paths, tmp_path) == ["a.jpg"] and note.startswith("3 links to nowhere left out: ")
    assert str(tmp_path / "gone.jpg") in note


def test_links_that_became_text_are_named(tmp_path):
    """As git leaves them where it may not make links, and some archives; other files without ending are none."""
    image(tmp_path / "disk2" / "1.jpg")
    image(tmp_path / "photos" / "a.jpg")
    for name, text in (("b", "../disk2"), ("c", "../disk2/1.jpg"), ("README", "two photos"), ("d", "no/folder")):
        (tmp_path / "photos" / name).write_text(text)
    paths, (note,) = list_noted(tmp_path / "photos")
    assert names(paths, tmp_path / "photos") == ["a.jpg"]
    assert note.startswith("2 links saved as text left out: ") and "photos/b, " in note


def test_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    """One of them; the folder itself is an error."""
    image(tmp_path / "a.jpg")
    image(tmp_path / "private" / "b.jpg")
    scandir = os.scandir

    def refusing(folder):
        if Path(folder) in refused:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = {tmp_path / "private"}
    paths, notes = list_noted(tmp_path)
    assert names(paths, tmp_path) == ["a.jpg"]
    assert notes == [f"1 folder could not be read: {tmp_path / 'private'} (Permission denied)"]
    refused = {tmp_path}
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): change its permissions"):
        list_noted(tmp_path)


@pytest.mark.parametrize(
    "photo, beside",
    [
        ("images/training/{}.jpg", ["annotations/training/{}.png"]),  # ADE20K
        ("ade/{}.jpg", ["ade/{}_seg.png", "ade/{}_parts_1.png"]),
        (
            "leftImg8bit/train/ulm/ulm_{}_leftImg8bit.png",
            ["gtFine/train/ulm/ulm_{}_gtFine_labelIds.png", "gtFine/train/ulm/ulm_{}_gtFine_color.png"],
        ),
        ("JPEGImages/480p/bear/{}.jpg", ["Annotations/480p/bear/{}.png"]),  # DAVIS
        ("photos/{}.jpg", ["SegmentationClass/{}.png", "SegmentationObject/{}.png"]),
        ("val2017/{}.jpg", ["annotations/panoptic_val2017/{}.png"]),
        ("img/{}.jpg", ["anno_png/{}.png"]),  # known by what is in it
        ("all/{}.jpg", ["all/{}.png"]),
        ("701/{}.png", ["LabeledApproved_full_labels/{}_L.png"]),  # CamVid
        ("DUTS-TR-Image/{}.jpg", ["DUTS-TR-Mask/{}.png"]),
        ("images/{}.png", ["images_gt/{}.png"]),
    ],
)
def test_label_maps_of_known_layouts_are_no_images(tmp_path, photo, beside):
    """Grey ones, and coloured ones where a name says so."""
    for number in range(3):
        image(tmp_path / photo.format(number), seed=number)
        for name in beside:
            labels(tmp_path / name.format(number), colours="color" in name or "panoptic" in name or "seg" in name)
    paths, (note,) = list_noted(tmp_path)
    assert names(paths, tmp_path) == [photo.format(number) for number in range(3)]
    assert note.startswith(f"{3 * len(beside)} label maps left out: {tmp_path}")


@pytest.mark.parametrize(
    "files",
    [
        [("with_mask/{}.png", "RGB"), ("without_mask/{}.png", "RGB")],  # photos of people, named for what they wear
        [("labels/{}.jpg", "RGB"), ("bottles/{}.jpg", "RGB")],
        [("cats/{}.png", "L"), ("dogs/{}.png", "L")],
        [("masks/{}.png", "L"), ("faces/{}.png", "L")],  # grey photos
        [("cats/{}.png", "1"), ("dogs/{}.png", "1"), ("birds/{}.png", "RGB")],  # drawings
        [("small/{}.png", "RGB"), ("small/{}.jpg", "RGB")],
        [("a/{}.jpg", "RGB"), ("a/{}_l.png", "RGB"), ("a/{}_color.png", "RGB")],
        [("masks/{}.png", "1")],
    ],
)
def test_images_are_not_taken_for_label_maps(tmp_path, files):
    for name, mode in files:
        for number in range(4):
            image(tmp_path / name.format(number), mode, seed=number)
    paths, notes = list_noted(tmp_path)
    assert len(paths) == 4 * len(files) and not notes


def test_masks_that_are_used_are_not_noted(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    labels(tmp_path / "masks" / "a.png")
    image(tmp_path / "images" / "b.jpg")
    labels(tmp_path / "images" / "b_mask.png")
    images = Folder(tmp_path, "val")
    assert len(images) == len(images.masks) == 2 and not images.notes


def test_the_check_the_run_and_segment_say_what_is_left_out(tmp_path, capsys, monkeypatch):
    for number in range(4):
        image(tmp_path / "data" / f"{number}.jpg", seed=number)
    (tmp_path / "data" / "x.heic").write_bytes(b"x")
    note = "note: 1 file with other extensions left out: .heic 1"
    assert main(["check", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out.count(note) == 1
    options = tiny_runs.options(
        encoder="spot_scenes", dec_heads=4, epochs=1, warmup_steps=0, train_images=0, eval_every=1
    )
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "folder", "--data", "data", "--cache", "none", "--no-tensorboard", *options]) == 0
    assert capsys.readouterr().out.count(note) == 1
    said = []
    segment_files.find_images([tmp_path / "data"], tmp_path / "out", said.append)
    assert [f"note: {line}" for line in said] == [note]
