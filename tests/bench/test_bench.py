"""The arithmetic of the benchmark tables, the runs of photos (with stand-ins for training), the shell script."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import photo_table
import pytest
import torch
from harness import runs, tables
from harness.runs import Plan
from harness.tables import BenchError, Result, Row, Scores, spread
from harness.token_ceiling import rounded, token_ceiling

import stand_in_commands
from paths import BENCH
from spot_fast.data.base import ImageSet, Masks
from spot_fast.errors import UserError
from spot_fast.reproduction import execution


def result(stage: int, seed: int, *, variant: str = "scenes", settings: str = "one", **mbo_i: float) -> Result:
    """Scores of every kind of masks; keywords such as slots=0.5, decoder_1=0.4 set mBO_i."""
    about = dict.fromkeys(tables.ABOUT, "1") | {"variant": variant, "stage": str(stage), "seed": str(seed)}
    about |= {"settings": settings, "train_seconds": "90.0"}
    scores = {}
    for name, value in mbo_i.items():
        masks, _, orders = name.partition("_")
        scores[masks, int(orders or 0)] = Scores({"mbo_i": value, "mbo_c": None, "miou": 0.25, "fg_ari": -0.01})
    return Result(about, scores)


def three_seeds() -> list[Result]:
    first = [result(1, s, variant="plain", decoder_1=0.4, slots=0.4) for s in range(3)]
    first += [result(1, s, blocks=0.33, kmeans=0.4, decoder_1=0.45 + s / 100, slots=0.5) for s in range(3)]
    return first + [result(2, s, decoder_1=0.5, slots=0.52 + 0.02 * s) for s in range(3)]


def test_mean_and_standard_deviation():
    assert spread([0.2, 0.4, 0.6]) == pytest.approx((0.4, 0.2))
    assert spread([0.3]) == (0.3, None)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


ROWS = (
    Row("block masks", "scenes", 1, "blocks"),
    Row("plain, decoder", "plain", 1, "decoder", 1),
    Row("stage 1, order 0", "scenes", 1, "decoder", 1),
    Row("stage 2, slots", "scenes", 2, "slots"),
)


def test_table():
    lines = tables.markdown(ROWS, three_seeds()).splitlines()
    assert lines[2] == "| block masks | 33.0 | – | 25.0 | -1.0 |"
    assert lines[3] == "| plain, decoder | 40.0 | – | 25.0 | -1.0 |"
    assert lines[4] == "| stage 1, order 0 | 46.0 ± 1.0 | – | 25.0 | -1.0 |"
    assert lines[5].startswith("| stage 2, slots | 54.0 ± 2.0 |") and len(lines) == 6
    assert {line.count("|") for line in lines} == {6}


def test_runs_of_different_settings_are_not_averaged():
    row = [Row("slots", "scenes", 1, "slots")]
    with pytest.raises(BenchError, match="different settings"):
        tables.markdown(row, [result(1, 0, slots=0.1), result(1, 1, settings="other", slots=0.2)])
    with pytest.raises(BenchError, match="seed 3 twice"):
        tables.markdown(row, [result(1, 3, slots=0.1), result(1, 3, slots=0.2)])


def test_csv_there_and_back(tmp_path):
    path = tmp_path / "results" / "scenes.csv"
    good = three_seeds()
    tables.write_csv(path, good)
    assert [p.name for p in path.parent.iterdir()] == ["scenes.csv"]
    back = tables.read_csv([path])
    assert tables.markdown(ROWS, back) == tables.markdown(ROWS, good)
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


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.sys, "executable", str(stand_in_commands.python(tmp_path / "python")))
    return tmp_path / "out"


def test_runs_are_trained_once_and_scores_of_no_run_stand_in_each(stand_in, tmp_path):
    """Such as the ceiling of the token grid; computed once, and not where nothing is finished."""
    options = ("--preset", "scenes", "--epochs", "1")
    made = [Plan("photos", 1, seed, options) for seed in (0, 1)]
    made.append(Plan("photos", 2, 0, options, made[0]))
    calls = []

    def more():
        calls.append(1)
        return {("ceiling", 0): Scores(dict.fromkeys(tables.METRICS, 0.7))}

    args = SimpleNamespace(out=stand_in, device=None, threads=2, jobs=1, minutes=None, plain_table=[])
    args.csv = tmp_path / "photos.csv"
    with pytest.raises(BenchError, match="nothing is finished"):
        runs.results_of("photos", made, args, [], more=more)
    args.plain_table = None
    runs.results_of("photos", made, args, [], more=more)
    for results in (tables.read_csv([args.csv]), runs.results_of("photos", made, args, [], more=more)):
        assert sorted(r.key for r in results) == [("photos", 1, 0), ("photos", 1, 1), ("photos", 2, 0)]
        assert [r.scores["ceiling", 0].values["mbo_i"] for r in results] == [0.7] * 3
        slots = sorted(r.scores["slots", 0].values["mbo_i"] for r in results)
        assert slots == pytest.approx([0.09, 0.091, 0.19])
        assert results[0].about["cores"] and results[0].minutes == 1
    assert len(calls) == 2
    # --threads holds for a run's evaluation as for its training, of which there is one
    assert (stand_in / "logs" / "photos-stage1-seed0.log").read_text().count("--threads 2") == 2
    with pytest.raises(UserError, match="photos-stage1-seed0 holds a run of other settings"):
        runs.results_of("photos", [Plan("photos", 1, 0, (*options, "--lr", "1e-4"))], args, [])


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
