"""Segments in COCO's format: what pycocotools and COCOeval make of them, and whose ids they have."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import spot_fast
from spot_fast import segment
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.evaluation.recall import mask_scores
from spot_fast.segmentation import coco
from spot_fast.segmentation.overlays import labels_at
from untrained_runs import TINY, untrained

quiet = contextlib.redirect_stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with runs/untrained and four images, two of them in a folder of their own."""
    folder = tmp_path_factory.mktemp("work")
    untrained(folder / "runs" / "untrained", preset("scenes", **TINY))
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (90, 50)), ("b.png", (31, 64)), ("in/c.jpg", (64, 64)), ("in/d.jpg", (40, 80))):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).resize(size).save(path)
    return folder


@pytest.fixture
def run(work, monkeypatch, tmp_path):
    """Segments the images into tmp_path/out with decoder masks only."""
    monkeypatch.chdir(work)
    return lambda *argv: segment.main(
        ["images", "--out", str(tmp_path / "out"), "--masks", "decoder", "--no-overlay", *map(str, argv)]
    )


def annotations(path, images):
    """A COCO annotation file that lists (id, file_name, width, height), without an object."""
    listed = [dict(zip(("id", "file_name", "width", "height"), image, strict=True)) for image in images]
    path.write_text(json.dumps({"images": listed, "annotations": [], "categories": []}))
    return path


def opened(path):
    with quiet(io.StringIO()):
        return COCO(str(path))


def test_every_region_is_the_label_map(run, tmp_path):
    assert run("--coco", tmp_path / "new" / "all.json") == 0
    data = opened(tmp_path / "new" / "all.json")
    names = {image["file_name"]: image for image in data.dataset["images"]}
    assert list(names) == ["a.jpg", "b.png", "in/c.jpg", "in/d.jpg"]
    assert [image["id"] for image in names.values()] == [1, 2, 3, 4]
    for name, image in names.items():
        with Image.open(tmp_path / "out" / f"{name.rpartition('.')[0]}_labels.png") as png:
            labels = np.asarray(png)
        assert labels.shape == (image["height"], image["width"])
        found = data.loadAnns(data.getAnnIds(image["id"]))
        assert [each["slot"] for each in found] == np.unique(labels).tolist()
        for each in found:
            mask = labels == each["slot"]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert np.array_equal(data.annToMask(each), mask) and each["area"] == mask.sum() and not each["iscrowd"]
            assert each["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert 0 < each["score"] <= 1 and each["category_id"] == 1
    ids = [each["id"] for each in data.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_cocoeval_finds_objects_that_are_the_segments(run, work, tmp_path):
    """The file loads as detections; scored against itself as ground truth everything is found."""
    assert run("--coco", tmp_path / "all.json") == 0
    data = opened(tmp_path / "all.json")
    with quiet(io.StringIO()):
        scored = COCOeval(data, data.loadRes(data.dataset["annotations"]), "segm")
        scored.params.useCats = 0
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    per_image = len(data.dataset["annotations"]) / 4
    assert scored.stats[6:9].tolist() == pytest.approx([1 / per_image, 1, 1])


def test_ids_names_and_sizes_of_an_annotation_file(run, tmp_path, capsys):
    """Names are found with and without their folders; what is not listed is left out and said."""
    file = annotations(tmp_path / "val.json", [(17, "a.jpg", 90, 50), (5, "c.jpg", 64, 64), ("x", "in/d.jpg", 80, 160)])
    assert run("--coco", tmp_path / "all.json", "--annotations", file) == 0
    data = json.loads((tmp_path / "all.json").read_text())
    assert [(image["id"], image["file_name"]) for image in data["images"]] == [
        (17, "a.jpg"),
        (5, "c.jpg"),
        ("x", "in/d.jpg"),
    ]
    sizes = {each["image_id"]: each["segmentation"]["size"] for each in data["annotations"]}
    assert sizes == {17: [50, 90], 5: [64, 64], "x": [160, 80]}  # d.jpg is a copy at half the annotated size
    assert "does not list 1 of 4 images, which are left out" in capsys.readouterr().err


def test_an_image_of_another_shape_than_annotated_is_skipped(run, tmp_path, capsys):
    file = annotations(tmp_path / "val.json", [(1, "a.jpg", 50, 90), (2, "b.png", 31, 64)])
    assert run("--coco", tmp_path / "all.json", "--annotations", file) == 0
    assert "a.jpg is 90 x 50, the annotations are of 50 x 90" in capsys.readouterr().err
    assert [image["id"] for image in json.loads((tmp_path / "all.json").read_text())["images"]] == [2]


def test_masks_of_a_turned_photo_are_where_its_annotations_are(work, tmp_path, monkeypatch):
    """COCO's own masks are drawn on the stored pixels whatever EXIF says; others on the upright image."""
    monkeypatch.chdir(work)
    photo = tmp_path / "in" / "000000000007.jpg"
    photo.parent.mkdir()
    image = Image.new("RGB", (96, 48))
    image.paste((255, 255, 255), (0, 0, 30, 48))
    image.save(photo, exif=_turned(6))
    sizes = {}
    for name, listed in (("coco", (96, 48)), ("upright", (48, 96))):
        file = annotations(tmp_path / f"{name}.json", [(7, photo.name, *listed)])
        assert segment.main([str(photo), "--no-overlay", "--out", str(tmp_path / name), "--coco",
                             str(tmp_path / f"{name}_segments.json"), "--annotations", str(file)]) == 0  # fmt: skip
        with Image.open(tmp_path / name / "000000000007_labels.png") as labels:
            sizes[name] = labels.size
    assert sizes == {"coco": (96, 48), "upright": (48, 96)}


def _turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--coco", "x.txt"], "--coco x.txt: give the name of a .json file"),
        (["--slots-file", "x.npz"], "--slots-file x.npz: give the name of a .safetensors file"),
        (["--annotations", "x.json"], "says what images are called in --coco FILE.json: add that"),
        (["--annotations", "x.json", "--coco", "./x.json"], "--coco x.json is the file of --annotations"),
        (["--annotations", "x.json", "--coco", "y.json", "--scenes", "1"], "lists no generated images"),
        (["--annotations", "x.json", "--coco", "y.json"], "x.json is missing"),
        (["--no-labels"], "leave nothing to write: add --coco"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, argv, sentence, capsys):
    assert run(*argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_lists_other_images_is_an_error(run, tmp_path, capsys):
    file = annotations(tmp_path / "val.json", [(1, "dog.jpg", 9, 9)])
    assert run("--coco", tmp_path / "all.json", "--annotations", file) == 2
    assert "lists none of the 4 images, such as a.jpg: it lists dog.jpg" in capsys.readouterr().err
    assert not (tmp_path / "all.json").exists() and not (tmp_path / "out").exists()


def test_files_of_one_name_are_told_apart(work, tmp_path, monkeypatch, capsys):
    """By the paths they were given by; and they are not two results for one annotated image."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 20), "red").save(tmp_path / folder / "x.png")
    same = ["one/x.png", "two/x.png", "--run", str(work / "runs" / "untrained"), "--no-labels", "--no-overlay"]
    assert segment.main([*same, "--coco", "all.json"]) == 0
    images = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["one/x.png", "two/x.png"]
    file = annotations(tmp_path / "val.json", [(1, "x.png", 30, 20)])
    assert segment.main([*same, "--coco", "val_segments.json", "--annotations", str(file)]) == 2
    assert "one/x.png and two/x.png are both x.png of --annotations" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"images": [], "annotations": []}', "no JSON", '{"info": {"contributor": "me"}}'])
def test_someone_elses_file_is_not_overwritten(run, tmp_path, text, capsys):
    file = tmp_path / "all.json"
    file.write_text(text)
    assert run("--coco", file) == 2
    assert file.read_text() == text and "choose another file, or add --overwrite" in capsys.readouterr().err
    assert run("--coco", file, "--overwrite") == 0
    assert run("--coco", file) == 0  # now it is its own
    with pytest.raises(UserError, match="no segments of the same model"):
        coco.check_target(file, "another model")


def test_from_python(work, tmp_path, monkeypatch):
    """`to_coco` is the file that the command writes, and its annotations are what `loadRes` takes."""
    monkeypatch.chdir(work)
    model = spot_fast.load("runs/untrained")
    paths = [work / "images" / name for name in ("a.jpg", "b.png")]
    result = model.segment_images([Image.open(path) for path in paths])
    made = result.to_coco(file_names=["a.jpg", "b.png"])
    assert segment.main([*map(str, paths), "--out", str(tmp_path), "--coco", str(tmp_path / "all.json"),
                         "--precision", "float32", "--no-labels", "--no-overlay"]) == 0  # fmt: skip
    written = json.loads((tmp_path / "all.json").read_text())
    scores = [[each.pop("score") for each in data["annotations"]] for data in (made, written)]
    assert json.loads(json.dumps(made)) == written and scores[0] == pytest.approx(scores[1], abs=2e-6)
    with quiet(io.StringIO()):
        truth = COCO()
        truth.dataset = made | {"images": [image | {"id": 10 * image["id"]} for image in made["images"]]}
        truth.createIndex()
        truth.loadRes(model.segment_images([Image.open(p) for p in paths]).to_coco([10, 20])["annotations"])
    with pytest.raises(ValueError, match="image_ids has 3 entries: give one for each of the 2 images"):
        result.to_coco([1, 2, 3])


def test_regions_of_slots_with_pixels_and_their_scores():
    """A slot without a pixel is no region, also the last; one that wins pixels between patches alone has a score."""
    masks = torch.tensor([[0.5, 0.45, 0.05, 0], [0.05, 0.45, 0.5, 0]])
    labels = labels_at(masks, 4, 40, (1, 2))
    found = coco.regions(labels, masks)
    assert [region["slot"] for region in found] == [0, 1, 2]
    assert [region["score"] for region in found] == pytest.approx(mask_scores(masks)[:3].tolist(), abs=1e-6)
    assert sum(rle.area(region["segmentation"]) for region in found) == labels.size
