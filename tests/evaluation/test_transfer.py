"""evaluate --transfer: runs on sets that they were not trained on, one table; what cannot be scored is named first."""

import csv
import json
import shutil

import numpy as np
import pytest

from data_folders import make_labelled_voc
from paths import GOLDEN
from small_models import small_config
from spot_fast import evaluate as command
from spot_fast.checkpoints.runs import load_run
from spot_fast.config import preset
from spot_fast.data import open_set
from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.scoring import evaluate
from spot_fast.evaluation.tables import percent, spread
from spot_fast.evaluation.transfer import Target, targets_of
from untrained_runs import untrained

SETS = ["coco=COCO", "voc=VOC", "movi_c=MOVI", "scenes"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two seeds and a student of scenes, small copies of three other sets, and photos without masks."""
    root = tmp_path_factory.mktemp("place")
    for seed in range(2):
        untrained(root / "runs" / f"one-{seed}", small_config(seed=seed), seed)
    untrained(root / "runs" / "two", small_config(stage=2))
    shutil.copytree(GOLDEN / "coco_mini", root / "COCO")
    shutil.copytree(GOLDEN / "movi_mini", root / "MOVI")
    make_labelled_voc(root / "VOC")
    (root / "PHOTOS").mkdir()
    shutil.copy(root / "COCO" / "val2017" / "000000000007.jpg", root / "PHOTOS")
    return root


@pytest.fixture
def call(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def run(*argv):
        code = command.main([*argv, "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_one_table_over_all_sets(call, place):
    """Its cells are the scores of an evaluation on that set with the set's own masks and the run's input."""
    code, out, _ = call("two", "--transfer", *SETS, "--limit", "2", "--json", "t.json", "--csv", "t.csv")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "transfer · protocol spot · percent" and lines[2].split() == [
        "masks",
        "coco",
        "voc",
        "movi_c",
        "scenes",
    ]
    assert "trained on two: scenes, stage 2" in out and "movi_c: 1 image, masks 128 × 128" in out
    assert "coco: 2 images, masks 320 × 320" in out and "scenes: 2 images, masks 32 × 32" in out
    run = load_run(place / "runs" / "two")
    found = {}
    for name, folder in (("coco", "COCO"), ("voc", "VOC"), ("movi_c", "MOVI"), ("scenes", None)):
        own = preset(name, data=folder, image_size=32, **({"mask_size": 32} if name == "scenes" else {}))
        found[name] = evaluate(run.model, open_set(own, "val"), limit=2, progress=False)
    block = lines[lines.index(next(line for line in lines if line.split() == ["mBO_i"])) :][1:4]
    decoder, slots, kmeans = (
        [found[name].row(masks, orders) for name in found]
        for masks, orders in (("decoder", 9), ("slots", None), ("kmeans", None))
    )
    for line, rows in zip(block, (decoder, slots, kmeans), strict=True):
        assert line.split()[-4:] == [percent(row.scores["mbo_i"]) for row in rows]
        assert line.strip().startswith(rows[0].title)
    content = json.loads((place / "t.json").read_text(encoding="utf-8"))
    (table,) = content["transfer"]
    assert table["sets"] == list(found) and [row["masks"] for row in table["rows"]] == ["decoder", "slots", "kmeans"]
    for row, expected in zip(table["rows"], (decoder, slots, kmeans), strict=True):
        for name, own in zip(found, expected, strict=True):
            for metric in METRICS:
                cell = row["scores"][name][metric]
                assert (cell and cell["mean"]) == own.scores[metric] and (cell is None or cell["std"] is None)
    assert [entry["set"] for entry in content["runs"]] == list(found) and content["summary"] == []
    with open(place / "t.csv", encoding="utf-8", newline="") as file:
        data = [line["data"] for line in csv.DictReader(file)]
    assert list(dict.fromkeys(data)) == [
        "coco: COCO val2017",
        "voc: VOC 2012 val",
        "movi_c: MOVi val",
        "scenes: scenes",
    ]


def test_seeds_are_averaged(call, place):
    code, out, _ = call(
        "one-0", "two", "one-1", "--transfer", "scenes", "movi_c=MOVI", "--limit", "3", "--json", "t.json"
    )
    assert code == 0
    runs = json.loads((place / "t.json").read_text(encoding="utf-8"))["runs"]
    for name in ("scenes", "movi_c"):
        one, other = (
            next(run for run in runs if (run["run"], run["set"]) == (seed, name))["rows"][2]["fg_ari"]
            for seed in ("one-0", "one-1")
        )
        expected = spread((np.mean([one, other]), np.std([one, other], ddof=1)))
        assert sum(expected in line for line in out.splitlines() if "one-0 and 1 more seed, slot masks" in line) >= 1
    assert "two, slot masks [1]" in out and "one-1, " not in out
    (table,) = json.loads((place / "t.json").read_text(encoding="utf-8"))["transfer"]
    assert [row["runs"] for row in table["rows"]] == [["one-0", "one-1"]] * 3 + [["two"]] * 3


def test_a_table_for_each_protocol(call):
    code, out, _ = call("two", "--transfer", "movi_c=MOVI", "--protocol", "spot,ocbench")
    assert code == 0 and out.count("transfer · protocol") == 2 and "masks 256 × 256" in out


def test_a_set_keeps_its_own_protocol_and_the_run_its_input():
    """Mask size and crop of the set's preset; input size, slots and encoder of the run."""
    run = preset("coco", image_size=448, num_slots=9, val_images=5)
    found = Target("movi_e", "MOVI_E").config(run)
    assert (found.mask_size, found.crop, found.val_images) == (128, "stretch", 0)
    assert (found.image_size, found.num_slots, found.data, found.preset) == (448, 9, "MOVI_E", "movi_e")
    back = Target("scenes", None).config(found)
    assert (back.mask_size, back.crop, back.val_images, back.data) == (448, "center", 500, None)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--transfer", "coc=COCO"], "--transfer coc=COCO names no data set: use scenes, coco=PATH"),
        (["--transfer", "coc=COCO"], "did you mean coco?"),
        (["--transfer", "scenes", "two"], "--transfer two names no data set"),
        (["--transfer", "coco"], "--transfer coco has no folder: use coco=PATH, a folder with annotations/"),
        (["--transfer", "coco="], "--transfer coco= has no folder"),
        (["--transfer", "coco=nowhere"], "--transfer coco=nowhere: nowhere is not a folder, use coco=PATH"),
        (["--transfer", "coco=MOVI"], "--transfer coco=MOVI has neither val2017/ nor images/val2017/"),
        (["--transfer", "scenes", "coco=COCO", "scenes"], "--transfer names scenes twice"),
        (["--transfer", "scenes=COCO"], "--transfer scenes=COCO: scenes needs no folder, use scenes alone"),
        (["--transfer", "folder=PHOTOS"], "--transfer folder=PHOTOS: image folder val has no masks to compare with"),
        (["--transfer", "scenes", "--data", "COCO"], "--data is for one data set: leave it out, or --transfer"),
        (["--transfer", "scenes", "--sizes"], "--sizes is for one data set"),
        (["--transfer", "scenes", "--size-plot", "p.png"], "--size-plot is for one data set"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(call, monkeypatch, argv, message):
    monkeypatch.setattr(command, "score", lambda *_: pytest.fail("a run was scored"))
    code, out, err = call("two", *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_sets_keep_their_order():
    assert [target.name for target in targets_of(["scenes"])] == ["scenes"] and targets_of([]) == []
