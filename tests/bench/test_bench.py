"""The arithmetic of the benchmark tables, the engine that runs them (with stand-ins for training), the shell script."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import photo_table
import pytest
import scenes_ablations
import scenes_table
import torch
from harness import runs, tables
from harness.runs import Plan, Runner
from harness.tables import BenchError, Result, Row, Scores, spread
from harness.token_ceiling import rounded, token_ceiling

from paths import BENCH
from spot_fast.config import flag, preset
from spot_fast.data.base import ImageSet, Masks
from spot_fast.training.arguments import parse


def result(stage: int, seed: int, *, variant: str = "scenes", settings: str = "one", **mbo_i: float) -> Result:
    """Scores of every kind of masks; keywords such as slots=0.5, decoder_1=0.4 set mBO_i."""
    about = dict.fromkeys(tables.ABOUT, "1") | {"variant": variant, "stage": str(stage), "seed": str(seed)}
    about |= {"settings": settings, "train_seconds": "90.0"}
    scores = {}
    for name, value in mbo_i.items():
        masks, _, orders = name.partition("_")
        scores[masks, int(orders or 0)] = Scores({"mbo_i": value, "mbo_c": None, "miou": 0.25, "fg_ari": -0.01})
    return Result(about, scores)


def three_seeds(*, gain: float = 0.02, decoder: float = 0.45, plain: float = 0.4) -> list[Result]:
    first = [result(1, s, variant="plain", decoder_1=plain, slots=0.4) for s in range(3)]
    first += [
        result(1, s, blocks=0.33, kmeans=0.4, decoder_1=decoder + s / 100, decoder_9=decoder + 0.05, slots=0.5)
        for s in range(3)
    ]
    return first + [result(2, s, decoder_1=0.5, decoder_9=0.6, slots=0.5 + gain * (s + 1)) for s in range(3)]


def test_mean_and_standard_deviation():
    assert spread([0.2, 0.4, 0.6]) == pytest.approx((0.4, 0.2))
    assert spread([0.3]) == (0.3, None)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.2, 0.4, 0.6], "40.0 ± 20.0"), ([0.333], "33.3"), ([0.3, 0.3], "30.0"), ([], "–"), ([0.1, None], "–")],
)
def test_cells(values, text):
    assert tables.cell(values) == text


def test_table_of_scenes():
    lines = tables.markdown(scenes_table.ROWS, three_seeds()).splitlines()
    assert len(lines) == 2 + len(scenes_table.ROWS)
    assert lines[2] == "| block masks (best of 1 to 4 columns) | 33.0 | – | 25.0 | -1.0 |"
    assert lines[4] == "| plain: stage 1 in one order, decoder | 40.0 | – | 25.0 | -1.0 |"
    assert lines[8] == "| stage 1, decoder, order 0 | 46.0 ± 1.0 | – | 25.0 | -1.0 |"
    assert lines[-1].startswith("| stage 2, slots | 54.0 ± 2.0 |")
    assert {line.count("|") for line in lines} == {6}


def test_targets():
    def passed(results):
        return [target.passed for target in scenes_table.targets(results)]

    assert passed(three_seeds(gain=0.04, decoder=0.53)) == [True] * 8
    # one seed is enough to miss one: 11.5 points above k-means, 1.5 above slots
    assert passed(three_seeds(gain=0.04, decoder=0.515)) == [True, False, False, True, True, True, True, True]
    assert passed(three_seeds(gain=0.0, decoder=0.56)) == [True, True, True, True, True, False, True, False]
    assert passed(three_seeds(gain=0.04, decoder=0.53, plain=0.6))[6:] == [False, True]
    assert passed(three_seeds(decoder=0.53)[:6]) == [True, True, True, True, None, None, True, None]
    detail = scenes_table.targets(three_seeds())[0].detail
    assert "+13.0 points on average; +12.0 (seed 0), +13.0 (seed 1), +14.0 (seed 2)" in detail


def test_ablations_share_the_recipe_and_differ_in_what_they_say():
    made = {(plan.variant, plan.stage): plan for plan in scenes_ablations.plans([0])}
    assert made.keys() == {(each.variant, each.stage) for each in scenes_ablations.ABLATIONS}
    table = {(plan.variant, plan.stage): plan for plan in scenes_table.plans([0])}
    assert made["scenes", 1] == table["scenes", 1] and made["scenes", 2] == table["scenes", 2]
    settings = {(each.variant, each.stage): each.options[::2] for each in scenes_ablations.ABLATIONS}
    for key, plan in made.items():
        assert plan.teacher == (table["scenes", 1] if plan.stage == 2 else None)
        recipe, config = preset("scenes", plan.stage), parse(["--stage", str(plan.stage), *plan.options]).config()
        changed = {flag(name) for name, value in vars(config).items() if value != getattr(recipe, name)}
        assert changed == set(settings[key]), key


def test_runs_of_different_settings_are_not_averaged():
    row = [Row("slots", "scenes", 1, "slots")]
    with pytest.raises(BenchError, match="different settings"):
        tables.markdown(row, [result(1, 0, slots=0.1), result(1, 1, settings="other", slots=0.2)])
    with pytest.raises(BenchError, match="seed 3 twice"):
        tables.markdown(row, [result(1, 3, slots=0.1), result(1, 3, slots=0.2)])


def test_csv_there_and_back(tmp_path, capsys):
    path = tmp_path / "results" / "scenes.csv"
    good = three_seeds(gain=0.04, decoder=0.53)
    tables.write_csv(path, good)
    assert [p.name for p in path.parent.iterdir()] == ["scenes.csv"]
    back = tables.read_csv([path])
    assert tables.markdown(scenes_table.ROWS, back) == tables.markdown(scenes_table.ROWS, good)
    assert scenes_table.main(["--plain-table", str(path)]) == 0
    assert capsys.readouterr().out.count("PASS") == 8
    tables.write_csv(path, three_seeds(gain=-0.1))
    assert scenes_table.main(["--plain-table", str(path)]) == 1
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("other.csv", "missing.csv"):
        with pytest.raises(BenchError, match=name):
            tables.read_csv([tmp_path / name])


def test_photo_table_has_the_four_methods():
    masks = {"ceiling": 0.7, "blocks": 0.2, "kmeans": 0.4, "decoder_1": 0.3, "slots": 0.3}
    variants = {"standard": masks, "spot9": masks | {"decoder_9": 0.35}}
    results = [result(stage, 0, variant=name, **scores) for name, scores in variants.items() for stage in (1, 2)]
    text = photo_table.report(results)
    for title in ("plain, decoder |", "+ orders, decoder, nine orders |", "+ self-training, slots |", "both, slots |"):
        assert title in text
    table = text.split("\n\n")[0]
    assert table.count("\n") == 14 and "| – | – | – | – |" not in table
    # --cpu trains two of them: baselines come from those, and no line is empty
    few = photo_table.report([r for r in results if r.about["variant"] == "spot9"])
    assert (
        "ceiling: the ground truth on the token grid | 70.0" in few and "k-means per image, same features | 40.0" in few
    )
    assert few.split("\n\n")[0].count("\n") == 10 and "| – | – | – | – |" not in few and "plain" not in few
    assert photo_table.epochs(10_000, 8000, 64) == 80 and photo_table.epochs(1, 64, 64) == 1
    with pytest.raises(BenchError, match="do not fill a batch"):
        photo_table.epochs(10, 63, 64)


def test_photo_plans_teach_their_own_kind(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "instances_train2017.json").write_text(json.dumps({"images": [{}] * 100}))
    args = SimpleNamespace(photos=tmp_path, encoder_weights="f", seeds=[0, 1], steps=50, batch_size=10, size=224)
    args.train_images, args.val_images, args.student_steps, args.cpu = 40, 0, None, False
    made = photo_table.plans(args, ["--lr", "1e-3"])
    assert len(made) == 8 and [p.stage for p in made] == [1] * 4 + [2] * 4
    for plan in made:
        assert plan.options[plan.options.index("--epochs") + 1] == "13"
        assert plan.options[plan.options.index("--lr") + 1] == "1e-3"
        if plan.teacher:
            assert (plan.teacher.variant, plan.teacher.seed) == (plan.variant, plan.seed)
    args.cpu, args.student_steps = True, 20
    made = photo_table.plans(args, [])
    assert [(p.variant, p.stage, p.options[p.options.index("--epochs") + 1]) for p in made] == [
        ("spot9", 1, "13"),
        ("spot9", 1, "13"),
        ("spot9", 2, "5"),
        ("spot9", 2, "5"),
    ]
    # Rounded down to whole epochs, of 4 steps here, two steps would be no warm-up at all.
    assert [p.options[p.options.index("--warmup-steps") + 1] for p in made] == ["5", "5", "4", "4"]
    args.size = 230
    with pytest.raises(BenchError, match="--size 230 is not a whole number of patches: use a multiple of 14"):
        photo_table.plans(args, [])


def test_scores_of_no_run_stand_in_each_run(stand_in, tmp_path):
    """Such as the ceiling of the token grid; computed once, and not where nothing is finished."""
    made = [Plan("photos", 1, seed, ("--lr", "0.5")) for seed in (0, 1)]
    calls = []

    def more():
        calls.append(1)
        return {("ceiling", 0): Scores(dict.fromkeys(tables.METRICS, 0.7))}

    args = SimpleNamespace(out=stand_in, device=None, threads=2, jobs=1, minutes=None, plain_table=None)
    args.csv = tmp_path / "photos.csv"
    runs.results_of("photos", made, args, [], more=more)
    for results in (tables.read_csv([args.csv]), runs.results_of("photos", made, args, [], more=more)):
        assert [r.scores["ceiling", 0].values["mbo_i"] for r in results] == [0.7, 0.7]
        assert all(r.scores["slots", 0].values["mbo_i"] == 0.5 for r in results)
    assert len(calls) == 2
    # --threads holds for a run's evaluation as for its training
    assert (stand_in / "photos-stage1-seed0.log").read_text().count("--threads 2") == 2


class Halves(ImageSet):
    """Three images of 8 x 8 pixels: object 3 on the left up to column 3, 4 or 5; object 7 right of it, and void."""

    has_masks = True

    def __len__(self):
        return 3

    def label(self, index):
        return str(index)

    def prepared(self, index):
        pytest.fail("a ceiling reads masks alone")

    val_image = prepared

    def val_masks(self, index):
        labels = torch.full((8, 8), 7)
        labels[:, : 3 + index] = 3
        labels[7, 7] = -1
        return Masks(labels, labels)


def test_ceiling_of_a_token_grid():
    maps = [Halves().val_masks(index).instances for index in range(3)]
    assert [r.tolist() for r in rounded(maps, 2)] == [[0, 1, 0, 1]] * 3
    exact = token_ceiling(Halves(), 8)
    assert exact["mbo_i"] == exact["miou"] == exact["fg_ari"] == 1
    # columns 3 to 5 of 8: two of three images have a column, of 8 pixels, on the wrong side
    wrong = (24 / 32 + 31 / 39) / 2
    other = (32 / 40 + 23 / 31) / 2
    coarse = token_ceiling(Halves(), 2, batch_size=2)
    assert coarse["mbo_i"] == pytest.approx((wrong + 1 + other) / 3)
    assert coarse["fg_ari"] < 1


# Trains and evaluates in no time: makes the files that the engine looks for.
STAND_IN = """
import json, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
words = sys.argv[1:]
def after(name): return words[words.index(name) + 1]
if words[0] == "train":
    config = {"lr": float(after("--lr")), "seed": int(after("--seed")), "batch_size": 4}
    config["loader"] = "auto" if "--print-config" in words else "torch"  # a run keeps what auto became
    if "--print-config" in words:
        print(json.dumps(config)); sys.exit()
    folder = Path(after("--out")); folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if config["lr"] > 1: sys.exit("error: the loss is not finite")
    if config["lr"] == 1: time.sleep(60)
    about = {"step": "8", "seconds": "60", "torch": "2", "threads": "1", "device": "cpu", "images": "32"}
    save_file({"a": np.zeros(1)}, folder / "training_state.safetensors", about)
    save_file({"a": np.zeros(1)}, folder / "model.safetensors", about)
else:
    row = {"masks": "slots", "orders": None, "columns": None, "mbo_i": 0.5, "mbo_c": 0.5, "miou": 0.5, "fg_ari": 0.5}
    Path(after("--json")).write_text(json.dumps({"runs": [{"images": 3, "rows": [row]}]}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nname=${{2#spot_fast.}}\nshift 2\nexec {sys.executable} {script} "$name" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(python))
    return tmp_path / "out"


def test_engine_trains_once_and_knows_a_recipe_by_its_settings(stand_in, capsys):
    made = [Plan("scenes", 1, seed, ("--lr", "0.5")) for seed in (0, 1)]
    for jobs in (2, 1):
        Runner(stand_in, {"bench": "scenes", "date": "d"}, jobs=jobs).run(made)
    assert capsys.readouterr().err.count("trained already") == 2
    results = Runner(stand_in, {}).collect(made)
    assert [r.seed for r in results] == [0, 1] and len({r.about["settings"] for r in results}) == 1
    assert results[0].about["date"] == "d" and results[0].minutes == 1
    with pytest.raises(BenchError, match="trained with lr 0.5 and now it is 0.25"):
        Runner(stand_in, {}).run([Plan("scenes", 1, 0, ("--lr", "0.25"))])


def test_engine_reports_a_failure_and_keeps_to_its_time(stand_in):
    with pytest.raises(BenchError, match="exit code 1: error: the loss is not finite"):
        Runner(stand_in, {}).run([Plan("bad", 1, 0, ("--lr", "2"))])
    assert not Runner(stand_in, {}, minutes=0.005).run([Plan("slow", 1, 0, ("--lr", "1"))])


def test_packed_weights_are_float16(tmp_path):
    prepare = pytest.importorskip("prepare_gpu")
    source = tmp_path / "weights.safetensors"
    values = {"w": torch.linspace(-3, 3, 50), "count": torch.tensor([3])}
    prepare.save_file(values, source)
    assert prepare.pack_weights(source, tmp_path / "base" / "encoder.safetensors") < 2**-10
    packed = prepare.load_file(tmp_path / "base" / "encoder.safetensors")
    assert packed["w"].dtype == torch.float16 and packed["count"].dtype == torch.int64
    prepare.save_file({"w": torch.tensor([1e6])}, source)
    with pytest.raises(BenchError, match="does not fit float16"):
        prepare.pack_weights(source, tmp_path / "again.safetensors")


def test_gpu_script():
    script = str(BENCH / "gpu_check.sh")
    subprocess.run(["bash", "-n", script], check=True)
