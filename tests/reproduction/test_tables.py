"""Every row of every table is a run that spot_fast.train accepts, with the paper's settings on COCO."""

import pytest

from spot_fast.config import preset
from spot_fast.published import METRICS, figures
from spot_fast.recipes import DATA_SETS
from spot_fast.reproduction.plan import chosen, make_plan
from spot_fast.reproduction.runs import Planner, is_same, steps
from spot_fast.reproduction.tables import OURS, PAPER, TABLES, Recipe

MOCO = {"moco_vitb16": "vit-b-300ep.pth.tar"}


@pytest.fixture(scope="module")
def coco():
    """All rows of the paper and of ours on COCO, one seed."""
    return make_plan([*chosen(["all"]), "options"], Planner("coco", weights=MOCO), [0])


def config_of(plan, table: str, title: str):
    (config,) = {
        run.name: run.config for row in plan.tables[table] if row.row.title == title for run in row.runs
    }.values()
    return config


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_row_can_be_trained_on_every_data_set(name, tmp_path):
    """Also those that a data set lacks say so, and no row is lost without a word."""
    plan = make_plan(list(TABLES), Planner(name, str(tmp_path), weights=MOCO), [0, 1])
    rows = sum(len(rows) for rows in plan.tables.values())
    missing = sum(len(TABLES[table].rows) for table in TABLES) - rows
    lost = {"scenes": len(PAPER["10"].rows)}.get(name, len(OURS["ablations"].rows))
    if name == "folder":  # nobody knows its steps before it is opened
        lost += sum("steps1" in row.recipe.options for row in OURS["options"].rows)
    assert missing == lost and plan.left_out
    for run in plan.runs:
        taught = run.config.stage == 2 and not run.config.online_teacher
        assert run.config.preset == name and (run.teacher is not None) == taught
        assert run.teacher is None or run.teacher.config.seed == run.config.seed


def test_coco_has_the_papers_settings(coco):
    """λ of Table 2, epochs of Tables 1 and 9, decoders and encoders of Tables 3, 4 and 10."""
    lambdas = [config_of(coco, "2", row.title).att_weight for row in PAPER["2"].rows if row.title.startswith("(a)")]
    assert lambdas == [0, 0.002, 0.005, 0.01, 0.02]
    assert config_of(coco, "2", "(c) no encoder block trains").train_blocks == 0
    assert config_of(coco, "1", "(d) neither, twice the epochs").epochs == 100
    assert is_same(preset("coco+dinosaur"), config_of(coco, "9", "DINOSAUR"))
    assert is_same(preset("coco+bo_qsa"), config_of(coco, "9", "DINOSAUR w/ BO"))
    assert is_same(preset("coco+cappa"), config_of(coco, "3", "Transformer w/ PA (CapPa)"))
    assert is_same(preset("coco+dinosaur_mlp"), config_of(coco, "4", "MLP"))
    assert is_same(preset("coco+spot_mlp", 2), config_of(coco, "4", "MLP, ST"))
    assert is_same(preset("coco+mae_vitb16", 2), config_of(coco, "10", "MAE, SPOT w/ ENS"))
    assert config_of(coco, "1", "(e) ST").orders == "standard"
    neither = config_of(coco, "8", "neither BO-QSA nor ST")
    assert (neither.stage, neither.slot_init, neither.truncation, neither.att_weight) == (2, "gaussian", "none", 0)


def test_runs_are_shared_between_tables(coco):
    """Every run of `all` and `options` is trained once: twelve of stage 1, sixteen of stage 2."""
    stages = [run.config.stage for run in coco.runs]
    assert (stages.count(1), stages.count(2)) == (12, 16)
    spot = {row.runs[0] for table, title in (
        ("1", "(f) SP, ST"), ("2", "(a) λ as the preset's"), ("2", "(c) the last blocks train"), ("6", "SPOT w/ ENS"),
        ("8", "BO-QSA, ST"), ("9", "SPOT w/o ENS"), ("10", "DINO, SPOT w/o ENS"), ("options", "SPOT"),
    ) for row in coco.tables[table] if row.row.title == title}  # fmt: skip
    assert len(spot) == 1
    three = make_plan(chosen(["all", "options"]), Planner("coco", weights=MOCO), [0, 1, 2])
    assert len(three.runs) == 3 * len(coco.runs) and len({run.name for run in three.runs}) == len(three.runs)


def test_published_rows_are_found_exactly():
    """A row of the paper that is misnamed is an error when the package is imported, not an empty cell."""
    assert figures("1 (f)")["coco"][0] == "34.7±0.1"
    with pytest.raises(ValueError, match="0 rows of table 1 .z."):
        figures("1 (z)")
    with pytest.raises(ValueError, match="name one a data set"):
        figures("10")
    for table in PAPER.values():
        assert all(len(cells) == len(METRICS) for row in table.rows for cells in row.paper.values())


def test_relative_numbers():
    """2x is of the preset as the command line changes it; sum and steps1 are of both stages and of the first."""
    planner = Planner("scenes", options=["--epochs", "5", "--train-images", "64"])
    assert planner.run(Recipe(1, "--epochs 2x"), 0).config.epochs == 10
    assert planner.run(Recipe(1, "--epochs sum --warmup-steps steps1"), 0).config.warmup_steps == 5 * 64 // 16
    assert planner.run(Recipe(1, "--lr 0.5x --image-size 2x"), 0).config.image_size == 192
    assert Planner("scenes").run(Recipe(1, "--epochs sum"), 0).config.epochs == 11
    assert steps(preset("coco")) == 92_400 and steps(preset("folder")) is None
