"""`python -m spot_fast.data check`: recognised sets, reported damage, and the printed command, which works."""

import json
import re
import shlex

import pytest
from PIL import Image

import tfrecord_files as files
from data_folders import labels, make_clevrtex, make_coco, make_folder, make_voc, save
from spot_fast.config import preset
from spot_fast.data import open_set, open_sets
from spot_fast.data.__main__ import main
from spot_fast.errors import UserError
from spot_fast.training import arguments
from spot_fast.training.schedule import learning_rate


@pytest.fixture
def check(capsys):
    """(exit code, what was printed, what was complained about) of a check; never a traceback."""

    def run(path, *options):
        code = main(["check", str(path), *options])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and err.count("\n") <= 1
        assert (code == 0) == (not err) == ("train with:" in out)
        return code, out, err

    return run


def make_clips(root):
    for clip in ("train/00000000", "train/00000001", "validation/00000000"):
        for t in range(10):
            save(root / clip / f"{t:08d}_image.png")
            if clip[0] == "v":
                save(root / clip / f"{t:08d}_mask_00.png", labels(255))


def make_shards(root):
    one = files.clip([Image.new("RGB", (8, 8), "red")] * 10, [Image.new("L", (8, 8))] * 10)
    files.write_shards(root / "movi_e/128x128/1.0.0", "movi_e-train.tfrecord", [[one, one], [one]])
    files.write_shards(root / "movi_e/128x128/1.0.0", "movi_e-validation.tfrecord", [[one]])


def make_large_shards(root):
    one = files.clip([Image.new("RGB", (256, 256), "red")] * 10, [Image.new("L", (256, 256))] * 10)
    files.write_shards(root / "movi_e/256x256/1.0.0", "movi_e-train.tfrecord", [[one, one]])
    files.write_shards(root / "movi_e/256x256/1.0.0", "movi_e-validation.tfrecord", [[one]])


def make_masks(root):
    make_folder(root)
    save(root / "a_mask.png", labels())
    save(root / "b_mask.png", labels())


KINDS = {
    make_coco: ("COCO 2017", "train  3 images", "val    2 images, 2 annotations", "coco", 3),
    make_voc: ("PASCAL VOC 2012", "train  3 images", "val    2 images, 4 mask files", "voc", 3),
    make_clips: ("MOVi as PNG clips", "train  2 clips, 20 frames", "val    1 clip, 10 frames, masks", "movi_c", 18),
    make_shards: ("MOVi as TFRecord (movi_e)", "train  3 clips in 2 shards", "val    1 clip in 1 shard", "movi_e", 27),
    make_large_shards: ("MOVi as TFRecord (movi_e)", "train  2 clips in 1", "val    1 clip in 1", "movi_e_256", 18),
    make_clevrtex: ("ClevrTex", "train  3 images", "val    2 images, 2 mask files", "clevrtex", 3),
    make_folder: ("image folder", "train  3 images", "val    3 images\n", "folder", 3),
    make_masks: ("image folder", "train  3 images", "val    2 images, 2 mask files", "folder", 3),
}


@pytest.mark.parametrize("decode", [[], ["--decode", "--jobs", "3"]])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_whole_sets(tmp_path, check, make, decode):
    """The printed command opens as many images, which fill a batch, and has a warm-up that fits."""
    root = tmp_path / "a set"
    make(root)
    code, out, _ = check(root, *decode)
    title, train, val, preset, images = KINDS[make]
    assert code == 0 and out.startswith(f"{root}: {title}\n") and train in out and val in out
    assert "nothing is missing or damaged" in out
    words = shlex.split(out.splitlines()[-1])
    assert words[:5] == ["python", "-m", "spot_fast.train", "--preset", preset]
    config = arguments.parse(words[3:]).config()
    train_set, val_set = open_sets(config)
    assert len(train_set) == images >= config.batch_size and len(val_set) > 0
    assert learning_rate(config, images).total_steps > 0


def damage(path, content=None):
    """Another content, or the first half of it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)


def test_damaged_files_are_listed(tmp_path, check):
    make_coco(tmp_path)
    (tmp_path / "train2017/0.jpg").unlink()
    damage(tmp_path / "train2017/1.jpg")
    damage(tmp_path / "val2017/1.jpg", b"")
    code, out, err = check(tmp_path, "--list", str(tmp_path / "bad.txt"))
    assert code == 2 and "missing or damaged: 3" in out
    for line in ("train2017/0.jpg: missing", "train2017/1.jpg: truncated: no end of the JPEG", "val2017/1.jpg: empty"):
        assert f"{tmp_path}/{line}" in out
    assert "error: 2 of 3 images of train are missing or damaged, more than 1%: get them again, beginning with" in err
    assert (tmp_path / "bad.txt").read_text().splitlines() == [
        f"{tmp_path}/{name}" for name in ("train2017/0.jpg", "train2017/1.jpg", "val2017/1.jpg")
    ]


def test_as_many_damaged_files_as_the_loader_tolerates(tmp_path, check):
    make_folder(tmp_path)
    damage(tmp_path / "a.jpg", b"text")
    code, out, _ = check(tmp_path)
    assert code == 0 and "a.jpg: cannot be read: not an image of a known format" in out
    for n in range(200):
        save(tmp_path / "more" / f"{n}.png")
    damage(tmp_path / "b.jpg", b"text")
    assert check(tmp_path)[0] == 0  # 2 of 203
    damage(tmp_path / "c.jpg", b"text")
    assert "3 of 203 images" in check(tmp_path)[2]


def test_a_long_list_is_cut(tmp_path, check):
    for n in range(30):
        save(tmp_path / f"{n:02d}.png")
        damage(tmp_path / f"{n:02d}.png")
    _, out, _ = check(tmp_path)
    assert len(re.findall("truncated", out)) == 10 and "and 20 more: --list FILE writes them all" in out


@pytest.mark.parametrize(
    "make, file, reason",
    [
        (make_voc, "VOCdevkit/VOC2012/SegmentationObject/d.png", "missing"),
        (make_clips, "validation/00000000/00000003_mask_00.png", "00000003_image.png has no masks"),
        (make_clips, "train/00000001/00000003_image.png", None),
        (make_masks, "a_mask.png", None),
    ],
)
def test_missing_files_of_other_sets(tmp_path, check, make, file, reason):
    """One is tolerated; where nothing refers to a file, nothing can miss it."""
    make(tmp_path)
    (tmp_path / file).unlink()
    code, out, _ = check(tmp_path)
    assert code == 0 and (reason in out if reason else "nothing is missing" in out)


@pytest.mark.parametrize("content", [b"", b"half", b"this is not a mask"])
def test_damaged_masks(tmp_path, check, content):
    make_masks(tmp_path)
    damage(tmp_path / "a_mask.png", None if content == b"half" else content)
    code, out, _ = check(tmp_path)
    assert code == 0 and f"{tmp_path / 'a_mask.png'}: " in out


def test_masks_that_do_not_fit_are_found_by_decoding(tmp_path, check):
    make_masks(tmp_path)
    save(tmp_path / "a_mask.png", Image.new("L", (3, 4)))
    assert "nothing is missing" in check(tmp_path)[1]
    assert "a_mask.png gives a.jpg masks of 3 x 4" in check(tmp_path, "--decode")[1]


def test_damaged_shards(tmp_path, check):
    make_shards(tmp_path)
    shard = next(tmp_path.rglob("*train*00000-of-00002"))
    whole = shard.read_bytes()
    content = bytearray(whole)
    content[len(content) // 4] ^= 1
    shard.write_bytes(content)
    code, out, _ = check(tmp_path)
    assert code == 0 and f"record 0 of {shard}: is damaged: its data does not have its checksum" in out
    shard.write_bytes(whole[:-10])
    code, out, err = check(tmp_path)
    assert code == 2 and f"{shard} is cut off in record 1: download the file again" in err
    shard.unlink()
    assert f"error: {shard} is missing: download all shards of the split" in check(tmp_path)[2]
    shard.write_bytes(files.frame(files.example({"video": files.bytes_feature([b"no image", b""])})))
    out = check(tmp_path)[1]
    assert f"record 0 of {shard}: video 0: cannot be read: not an image of a known format; video 1: empty" in out


def test_sbd_is_passed_on(tmp_path, check):
    make_voc(tmp_path)
    segmentation = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (segmentation / "trainaug.txt").rename(segmentation / "train.txt")
    assert "trainaug.txt is missing: VOC trains on trainaug" in check(tmp_path)[2]
    sbd = tmp_path / "sbd"
    save(sbd / "img" / "f.jpg")
    (sbd / "train.txt").write_text("a\nf\nd\n")
    (sbd / "val.txt").write_text("b\n")
    code, out, _ = check(tmp_path, "--sbd", str(sbd))
    assert code == 0 and "train  4 images" in out and f"--sbd {sbd}" in out.splitlines()[-1]
    assert "trainaug has 4 names here and 10,582 in published results" in out


def test_without_validation_it_still_trains(tmp_path, check):
    make_coco(tmp_path)
    (tmp_path / "annotations/instances_val2017.json").unlink()
    code, out, _ = check(tmp_path)
    assert code == 0 and "instances_val2017.json is missing" in out and out.splitlines()[-1].endswith("--eval-images 0")
    (tmp_path / "annotations/instances_train2017.json").write_text("{")
    assert "instances_train2017.json is not a COCO" in check(tmp_path)[2]


SIZED = '{"images": [{"id": 1, "file_name": "a", "height": HEIGHT, "width": 1}], "annotations": []}'


@pytest.mark.parametrize(
    "content",
    [
        "[1, 2]",
        '{"images": 3, "annotations": []}',
        '{"images": [3], "annotations": []}',
        '{"images": [{"id": [], "file_name": "a", "height": 1, "width": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a\\u0000b", "height": 1, "width": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "\\ud800", "height": 1, "width": 1}], "annotations": [{"image_id": 1}]}',
        '{"images": [{"id": 1, "file_name": 7, "height": 1, "width": 1}], "annotations": []}',
        *(SIZED.replace("HEIGHT", height) for height in ("1e30", "null", "1e999")),
        '{"images": [{"id": 1, "file_name": "a", "height": 9, "width": 1}], "annotations": [4]}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_strange_annotation_files_give_a_sentence(tmp_path, check, content):
    make_coco(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(content, errors="surrogateescape")
    for options in ([], ["--decode"]):
        check(tmp_path, *options)


def test_annotations_that_cannot_be_drawn_are_found_by_decoding(tmp_path, check):
    make_folder(tmp_path)
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 20} for n in "abc"]
    broken = {"id": 5, "segmentation": {"counts": "?", "size": [1, 1]}}
    content = {"images": images, "annotations": [broken | {"image_id": n} for n in "ab"]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert "nothing is missing" in check(tmp_path)[1]
    code, out, err = check(tmp_path, "--decode")
    assert code == 2 and "annotation 5 of image a.jpg cannot be decoded" in out and "2 of 3 images of val" in err


def test_what_is_no_data_set(tmp_path, check, capsys):
    assert "does not exist: name the folder of a data set" in check(tmp_path / "nowhere")[2]
    assert "has no images" in check(tmp_path)[2]
    (tmp_path / "a.txt").write_text("b\n")
    assert "lists no image that exists" in check(tmp_path / "a.txt")[2]
    make_folder(tmp_path)
    assert "--jobs is 0: use 1 or more" in check(tmp_path, "--jobs", "0")[2]
    with pytest.raises(SystemExit) as stop:
        main(["check"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the following arguments are required: PATH (see --help)\n"


@pytest.mark.parametrize("kind", ["array_record", "riegeli", "parquet"])
def test_movi_in_another_format_of_tfds(tmp_path, check, kind):
    """The release is TFRecord; newer versions of TensorFlow Datasets prepare others."""
    folder = tmp_path / "movi_c" / "128x128" / "1.0.0"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"movi_c-{split}.{kind}-00000-of-00001").write_bytes(b"x")
    sentence = f"{folder} holds {kind} (movi_c-"
    remedy = f"tfds convert_format --dataset_dir={folder} --out_file_format=tfrecord"
    code, _, err = check(tmp_path)
    assert code == 2 and sentence in err and remedy in err
    for name in ("movi_c", "movi_e"):
        with pytest.raises(UserError, match=r"which is not read: convert it with tfds convert_format"):
            open_set(preset(name, data=str(tmp_path)), "train")


def test_davis_is_no_voc(tmp_path, check):
    """Its images lie in JPEGImages/ too, in a folder for each video; it is a folder of images."""
    for t in range(3):
        save(tmp_path / "JPEGImages/480p/bear" / f"{t:05d}.jpg", Image.effect_noise((20, 20), 90).convert("RGB"))
        save(tmp_path / "Annotations/480p/bear" / f"{t:05d}.png", labels())
    code, out, _ = check(tmp_path)
    assert code == 0 and "image folder" in out and "train  3 images" in out
    assert f"note: 3 label maps left out: {tmp_path / 'Annotations'} 3" in out


def test_list_in_no_folder(tmp_path, capsys):
    make_folder(tmp_path)
    assert main(["check", str(tmp_path), "--list", str(tmp_path / "no" / "bad.txt")]) == 2
    assert "no/bad.txt: the folder" in capsys.readouterr().err
