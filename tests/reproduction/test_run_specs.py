"""A run is known by what decides its weights, and found again in whatever folder it lies."""

import re
from dataclasses import replace

import pytest

import stand_in_commands
from spot_fast.checkpoints.runs import CONFIG
from spot_fast.errors import UserError
from spot_fast.reproduction.folders import Folders, pace
from spot_fast.reproduction.plan import chosen, make_plan, state
from spot_fast.reproduction.runs import Planner, check_options, is_same
from spot_fast.reproduction.tables import ORDERS, PLAIN, SPOT, Recipe

FIRST, SECOND = Recipe(1), Recipe(2, teacher=Recipe(1))


def test_the_same_run_under_other_spellings():
    planner = Planner("coco")
    same = [
        planner.run(recipe, 0)
        for recipe in (
            SPOT, Recipe(2, "--att-weight 0.005", teacher=ORDERS), Recipe(2, "--att-weight 1x", teacher=FIRST),
            Recipe(2, parts="dino_vitb16", teacher=Recipe(1, "--epochs 50")),
        )
    ]  # fmt: skip
    assert len(set(same)) == 1 and len(planner.runs) == 2
    assert re.fullmatch(r"coco-stage2-seed0-[0-9a-f]{8}", same[0].name)
    others = [
        planner.run(SPOT, 1),
        planner.run(Recipe(2, teacher=PLAIN), 0),
        planner.run(Recipe(2, "--lr 1e-4", teacher=FIRST), 0),
    ]
    assert len({run.name for run in [same[0], *others]}) == 4


def test_names_do_not_depend_on_folders_devices_or_the_other_tables():
    names = Planner("coco", "/one", ["--workers", "3"]).run(SPOT, 0).name
    planner = Planner("coco", "/other", ["--cache", "none"])
    planner.run(Recipe(1, parts="dino_vitb16"), 0)
    assert planner.run(SPOT, 0).name == names
    assert Planner("coco", options=["--lr", "1e-4"]).run(SPOT, 0).name != names
    assert Planner("coco", options=["--encoder-weights", "none"]).run(SPOT, 0).name != names


def test_a_second_kind_of_parent():
    """--init-from is passed to spot_fast.train with that run's folder, and makes another run."""
    planner = Planner("scenes")
    tuned = planner.run(Recipe(1, init_from=Recipe(1, "--epochs 20")), 0)
    assert tuned.parents == {"--init-from": tuned.init_from} and tuned.init_from.config.epochs == 20
    assert tuned.config.epochs == 2 and tuned.name != planner.run(FIRST, 0).name
    online = planner.run(Recipe(2, "--teacher ema", init_from=FIRST), 0)
    assert online.parents == {"--init-from": planner.run(FIRST, 0)} and online.config.online_teacher


def test_options_that_the_plan_sets_are_refused():
    for option in ("--seed", "--stage", "--teacher=x", "--data", "--out"):
        with pytest.raises(UserError, match=f"{option.split('=')[0]} after -- is set for each run"):
            check_options([option, "1"])
    with pytest.raises(UserError, match="--preset photos is no data set: use one of scenes"):
        Planner("photos")


def write(folder, run, teacher=None, init_from=None, **changes):
    """A finished run by the stand-in, with other settings than `run` wants."""
    words = [*run.words, "--out", str(folder)]
    words += ["--teacher", str(teacher)] if teacher else []
    words += ["--init-from", str(init_from)] if init_from else []
    for name, value in changes.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    stand_in_commands.train(words)
    return folder


def test_finished_runs_are_adopted_whatever_their_name(tmp_path):
    """If their settings and their teacher are those wanted; what auto became is no difference."""
    planner = Planner("scenes", options=["--epochs", "1"])
    first, second = planner.run(FIRST, 0), planner.run(SECOND, 0)
    assert first.config.precision == "auto" and not Folders(tmp_path).find(first).begun
    write(tmp_path / "other", first, lr=0.5)
    assert not Folders(tmp_path).find(first).finished
    mine = write(tmp_path / "mine", first)
    student = write(tmp_path / "student", second, teacher=mine)
    folders = Folders(tmp_path)
    assert folders.find(first).path == mine and folders.find(second).path == student
    assert folders.find(second).facts["seconds"] == "60.0" and pace(folders.all_found, second.config) == 15
    # its teacher is trained anew, so it is another's student
    (mine / "model.safetensors").write_bytes(b"other")
    assert not Folders(tmp_path).find(second).finished


def test_a_run_that_began_with_another_is_found_by_what_it_began_with(tmp_path):
    planner = Planner("scenes", options=["--epochs", "1"])
    first, plain = planner.run(FIRST, 0), planner.run(Recipe(2, "--teacher ema", init_from=FIRST), 0)
    alone = planner.run(Recipe(2, "--teacher ema"), 0)
    mine = write(tmp_path / "mine", first)
    begun = write(tmp_path / "begun", plain, init_from=mine)
    assert Folders(tmp_path).find(plain).path == begun
    # of the same settings, but from nothing
    assert not Folders(tmp_path).find(alone).finished
    (mine / "model.safetensors").write_bytes(b"other")
    assert not Folders(tmp_path).find(plain).finished


def test_a_folder_of_another_run_under_the_name_is_refused(tmp_path):
    planner = Planner("scenes")
    first, second = planner.run(FIRST, 0), planner.run(SECOND, 0)
    own = write(tmp_path / first.name, first, lr=0.5)
    with pytest.raises(UserError, match=f"{own} holds a run of other settings than its name says: remove it"):
        Folders(tmp_path).find(first)
    write(own, first)
    write(tmp_path / second.name, second, teacher=own)
    (own / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=f"{second.name} began with another {first.name} than the present one"):
        Folders(tmp_path).find(second)


def test_settings_of_older_versions(tmp_path):
    """A config.json without newer fields has their defaults, so it is found."""
    run = Planner("scenes").run(FIRST, 0)
    folder = write(tmp_path / "old", run)
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text("\n".join(line for line in text.splitlines() if '"slot_heads"' not in line))
    assert Folders(tmp_path).find(run).path == folder
    assert not is_same(run.config, replace(run.config, slot_heads=2))


def test_the_plan_says_what_is_there_and_what_the_rest_costs(tmp_path):
    planner = Planner("scenes", options=["--epochs", "1", "--train-images", "32"])
    plan = make_plan(["1", "2"], planner, [0])
    assert "minutes are known when the first has begun" in state(plan, Folders(tmp_path))
    first = planner.run(ORDERS, 0)
    write(tmp_path / "mine", first)
    text = state(plan, Folders(tmp_path))
    lines = {line.split()[0]: line for line in text.splitlines()[1:-2]}
    assert len(lines) == len(plan.runs) == 10
    assert re.search(r"\(in mine\) +finished +4 +1.0 +1: block masks;.* 1: \(b\) SP", lines[first.name])
    plain = planner.run(PLAIN, 0)
    assert re.search(r" missing +2 +0.5 more +1: \(a\) neither$", lines[plain.name])
    student = planner.run(SPOT, 0)
    assert re.search(r" missing +2 +not measured yet +1: \(f\) SP, ST.*; 2: \(a\) λ as", lines[student.name])
    assert text.splitlines()[-1].startswith("9 of 10 runs are left, 20 steps, about 90 s and 7 runs of a kind")


def test_unknown_tables():
    assert chosen(["7", "1", "7"]) == ["7", "1"] and "figure3" in chosen(["all"]) and "options" not in chosen(["all"])
    with pytest.raises(UserError, match="table 5x is unknown: use all, or some of 1, 2, 3"):
        chosen(["5x"])
    with pytest.raises(UserError, match="table ablations is about scenes: left out on coco"):
        make_plan(["ablations"], Planner("coco"), [0])
