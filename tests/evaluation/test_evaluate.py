"""The evaluate command on run folders: its output, the files it writes, one sentence for each error."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from spot_fast import evaluate as command
from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, save_tensors, write_config
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.protocols import PROTOCOLS
from spot_fast.evaluation.tables import percent
from spot_fast.model.spot import Spot

SIZES = dict(
    image_size=32,
    mask_size=32,
    num_slots=4,
    slot_dim=16,
    slot_mlp=16,
    dec_blocks=1,
    val_images=6,
    train_images=8,
    encoder_weights="none",
)


def make_run(folder, *, finished=True, stage=1, seed=0, **changes):
    """A run folder as the trainer leaves it, with an untrained model."""
    config = preset("scenes", stage, **(SIZES | changes), seed=seed)
    folder.mkdir(parents=True)
    write_config(folder, config)
    if finished:
        torch.manual_seed(seed)
        encoder = frozen_encoder(config)
        metadata = encoder_metadata(encoder, config)
        save_tensors(folder / MODEL, Spot(config, encoder).learned_state_dict(), metadata)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here, capsys):
    def run(*argv):
        code = command.main([*map(str, argv), "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_newest_finished_run_without_arguments(here, call):
    make_run(here / "runs" / "scenes-stage1-001")
    make_run(here / "runs" / "scenes-stage2-001", stage=2)
    make_run(here / "runs" / "scenes-stage2-002", stage=2, finished=False)
    code, out, _ = call()
    assert code == 0
    heading, _, columns, *rows = out.splitlines()
    assert heading.startswith("scenes-stage2-001 · preset scenes · stage 2 · 6 images of scenes, masks 32 × 32")
    assert "protocol spot" in heading
    assert columns.split() == ["masks", "mBO_i", "mBO_c", "mIoU", "FG-ARI", "ARI", "P-ARI", "PQ"]
    titles = ["decoder masks, order 0", "decoder masks, all 9 orders", "slot masks [1]", "block masks, ", "k-means, "]
    for title, row in zip(titles, rows[:5], strict=True):
        assert row.startswith(title)
        cells = row.split()[-7:]
        assert cells.pop(5) == "–" and all(-100 <= float(cell) <= 100 for cell in cells)
    assert "[1] the slot-attention map" in out and "mean ± std" not in out


def test_json_is_the_table(here, call):
    make_run(here / "runs" / "a", seed=3)
    code, out, _ = call("runs/a", "--json", "table.json", "--limit", 4, "--seed", 2, "--batch-size", 3)
    assert code == 0 and "wrote table.json" in out
    content = json.loads((here / "table.json").read_text(encoding="utf-8"))
    assert content["protocol"] == "spot" and content["unit"] == "fraction" and content["summary"] == []
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"] == {"seed": 2, "batch_size": 3, "limit": 4, "device": "cpu", "precision": "float32"}
    (run,) = content["runs"]
    assert (run["run"], run["preset"], run["stage"], run["seed"]) == ("a", "scenes", 1, 3)
    assert run["images"] == 4 and run["skipped"] == {} and run["seconds_per_image"] > 0
    assert [loss["orders"] for loss in run["reconstruction_loss"]] == [1, 9]
    assert [row["masks"] for row in run["rows"]] == ["decoder", "decoder", "slots", "blocks", "kmeans", "layout"]
    lines = out.splitlines()[3:9]
    for row, line in zip(run["rows"], lines, strict=True):
        assert [percent(row[name]) for name in METRICS] == line.split()[-7:]
        assert row["counted"] == dict.fromkeys(METRICS, 4) | {"p_ari": 0} and row["p_ari"] is None
        assert row["num_masks"] == (1 if row["masks"] == "layout" else 4)
    assert [path.name for path in here.iterdir() if path.is_file()] == ["table.json"]


def test_runs_alike_but_for_their_seed_are_averaged(here, call):
    for seed in range(2):
        make_run(here / "runs" / f"one-{seed}", seed=seed)
    make_run(here / "runs" / "two-0", stage=2)
    make_run(here / "runs" / "plain-0", orders="standard")
    names = ["one-0", "two-0", "one-1", "plain-0"]
    code, out, _ = call(*names, "--json", "t.json", "--limit", 3)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "· preset scenes ·" in line] == [*names, "mean"]
    assert "mean ± std of 2 runs · preset scenes · stage 1 · one-0, one-1" in out
    content = json.loads((here / "t.json").read_text(encoding="utf-8"))
    (group,) = content["summary"]
    assert group["runs"] == ["one-0", "one-1"] and group["stage"] == 1
    one, other = (content["runs"][i]["rows"][0]["mbo_i"] for i in (0, 2))
    assert group["rows"][0]["mbo_i"]["mean"] == pytest.approx((one + other) / 2)
    assert group["rows"][0]["mbo_i"]["std"] == pytest.approx(abs(one - other) / 2**0.5)


def coco_folder(root):
    """Two validation images in COCO layout; the second is no image."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    Image.new("RGB", (48, 40), (200, 30, 60)).save(root / "val2017" / "good.jpg")
    (root / "val2017" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    square = {"segmentation": [[5, 5, 30, 5, 30, 30, 5, 30]], "iscrowd": 0, "category_id": 1, "area": 625}
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "height": 40, "width": 48} for i, name in enumerate(("good", "bad"))
        ],
        "annotations": [{"id": i, "image_id": i, "bbox": [5, 5, 25, 25], **square} for i in range(2)],
        "categories": [{"id": 1, "name": "person"}],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def coco_run(folder, **changes):
    make_run(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"preset": "coco", "val_images": 0} | changes))
    return folder


def test_corrupt_image_is_named(here, call):
    coco_folder(here / "coco")
    run = coco_run(here / "runs" / "c")
    code, out, _ = call(run, "--data", "coco", "--json", "t.json")
    assert code == 0 and "1 image of COCO val2017" in out and "skipped 1 that cannot be read:\n  bad.jpg: " in out
    content = json.loads((here / "t.json").read_text(encoding="utf-8"))
    assert list(content["runs"][0]["skipped"]) == ["bad.jpg"]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder with a whole run and runs that lack something."""
    root = tmp_path_factory.mktemp("wrong")
    whole = make_run(root / "made" / "whole")
    make_run(root / "made" / "half", finished=False)
    coco_run(root / "made" / "coco")
    (root / "made" / "empty").mkdir()
    torn = make_run(root / "made" / "torn") / MODEL
    torn.write_bytes(torn.read_bytes()[:100])
    other = make_run(root / "made" / "other") / "config.json"
    other.write_text((whole / "config.json").read_text().replace('"slot_dim": 16', '"slot_dim": 24'))
    return root


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "there is no finished run in runs: train one"),
        (["--runs", "elsewhere"], "there is no finished run in elsewhere"),
        (["nothing"], "run nothing is not a folder"),
        (["made/half"], "run made/half is not finished"),
        (["made/empty"], "made/empty has no config.json"),
        (["made/torn"], "made/torn/model.safetensors cannot be read"),
        (["made/other"], "model.safetensors does not fit its config.json"),
        (["made/coco"], "--preset coco needs --data PATH"),
        (["made/coco", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["made/whole", "--limit", "-1"], "--limit is -1: use 0 or more"),
        (["made/whole", "--batch-size", "0"], "--batch-size is 0: use 1 or more"),
        (["made/whole", "--seed", "-4"], "--seed is -4: use 0 or more"),
        (["made/whole", "--json", "no/such/folder.json"], "--json no/such/folder.json lies in no/such"),
        (["made/whole", "--json", "made"], "--json made is a folder"),
        (["made/whole", "--protocol", "dino"], "--protocol dino is unknown: use all"),
        (["made/whole", "--csv", "made"], "--csv made is a folder"),
        (["made/whole", "--size-plot", "made/plot.pdf"], "--size-plot made/plot.pdf does not end in .png or .svg"),
        (["made/whole", "--workers", "-1"], "--workers is -1: use 0 or more"),
        (["made/whole", "--device", "gpu"], "--device gpu cannot be used"),
        (["made/whole", "nothing"], "run nothing is not a folder"),
    ],
)
def test_one_sentence_for_what_is_wrong(wrong, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(wrong)
    assert command.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_set_without_masks(here, call, monkeypatch):
    make_run(here / "runs" / "a")
    monkeypatch.setattr("spot_fast.data.datasets.scenes.Scenes.has_masks", False)
    code, _, err = call()
    assert code == 2 and "scenes has no masks to compare with: evaluate on" in err


def test_json_that_cannot_be_written_leaves_the_old_one(here, call, monkeypatch):
    make_run(here / "runs" / "a")
    (here / "t.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, out, err = call("--json", "t.json", "--limit", 2)
    assert code == 2 and "slot masks" in out and "No space left on device" in err
    assert (here / "t.json").read_text() == "old" and [p.name for p in here.iterdir() if p.is_file()] == ["t.json"]


def test_files_are_written_before_anything_is_printed(here, call, monkeypatch):
    """Whatever is wrong with the terminal; of several runs as soon as one is scored."""
    make_run(here / "runs" / "a")
    make_run(here / "runs" / "b", seed=1)

    def broken(*_, **__):
        raise UnicodeEncodeError("latin-1", "–", 0, 1, "ordinal not in range(256)")

    monkeypatch.setattr(command, "print", broken, raising=False)
    with pytest.raises(UnicodeEncodeError):  # even the error cannot be printed
        call("a", "b", "--limit", 2, "--json", "t.json", "--csv", "t.csv")
    found = json.loads((here / "t.json").read_text())
    assert [run["run"] for run in found["runs"]] == ["a"] and found["summary"] == []
    assert len((here / "t.csv").read_text().splitlines()) > 2


def test_scores_are_printed_where_a_file_cannot_be_written(here, call, monkeypatch):
    """And the other files are written."""
    make_run(here / "runs" / "a")

    def full(*_):
        raise UserError("t.json cannot be written (No space left on device): free some space")

    monkeypatch.setattr(command, "write_json", full)
    code, out, err = call("--limit", 2, "--json", "t.json", "--csv", "t.csv")
    assert code == 2 and "decoder masks" in out and err.startswith("error: t.json cannot be written (No space")
    assert (here / "t.csv").exists()


def test_a_target_that_cannot_be_written_is_reported_before_anything_is_scored(here, call, monkeypatch):
    make_run(here / "runs" / "a")
    monkeypatch.setattr(command, "open_runs", lambda *_: pytest.fail("a run was opened"))

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    for option in ("json", "csv", "size-plot"):
        code, out, err = call(f"--{option}", "t.png")
        assert code == 2 and out == "" and err.startswith(f"error: --{option} t.png cannot be written (Read-only file")


def test_json_has_no_nan_and_any_name(here, call, monkeypatch):
    """Losses of a model that diverged, names that are not UTF-8: every reader of JSON takes them."""
    make_run(here / "runs" / "a")
    scored = command.score

    def odd(*args, **options):
        return replace(
            scored(*args, **options),
            reconstruction={1: float("nan"), 9: float("inf")},
            skipped={"caf\udce9.jpg": "damaged"},
        )

    monkeypatch.setattr(command, "score", odd)
    assert call("--limit", 2, "--json", "t.json", "--csv", "t.csv")[0] in (0, 2)

    def refuse(word):
        raise AssertionError(word)

    (run,) = json.loads((here / "t.json").read_bytes().decode("utf-8"), parse_constant=refuse)["runs"]
    assert run["reconstruction_loss"] == [{"orders": 1, "loss": None}, {"orders": 9, "loss": None}]
    assert list(run["skipped"]) == ["caf\udce9.jpg"] and "udce9" in (here / "t.csv").read_text(encoding="utf-8")


def test_protocols_get_a_table_each(here, call):
    for seed in range(2):
        make_run(here / "runs" / f"one-{seed}", seed=seed)
    code, out, _ = call("one-0", "one-1", "--protocol", "spot,ocbench", "--json", "t.json", "--limit", 3, "--sizes")
    assert code == 0 and out.count("· protocol spot ·") == out.count("· protocol ocbench ·") == 3
    assert out.count("mBO_i by size of the instance") == 6 and "masks 256 × 256 · protocol ocbench" in out
    content = json.loads((here / "t.json").read_text(encoding="utf-8"))
    assert content["protocol"] == "spot" and list(content["protocols"]) == ["spot", "ocbench"]
    assert content["protocols"]["ocbench"]["source"].startswith("Genera1Z/VQ-VFM-OCL")
    one, other = content["runs"][0]["tables"]
    assert one["rows"] == content["runs"][0]["rows"] and (one["mask_size"], other["mask_size"]) == (32, 256)
    assert other["rows"][0]["mbo_c"] is None and one["without_object"] == []
    sizes = one["rows"][0]["sizes"]
    assert sizes[0]["above"] == 0 and sizes[-1]["to"] == 1 and sum(b["instances"] for b in sizes) > 5
    assert [group["protocol"] for group in content["summary"]] == ["spot", "ocbench"]
    assert len(content["summary"][1]["rows"][0]["sizes"]) == 8


def test_csv_and_plots(here, call):
    for seed in range(2):
        make_run(here / "runs" / f"one-{seed}", seed=seed)
    make_run(here / "runs" / "two", stage=2)
    cases = {
        "one-0": ["k-means, k = 4", "1 block mask"],
        "one-0 one-1": ["mean ± std of 2 runs"],
        "one-0 two": ["one-0, decoder masks, all 9 orders", "two, decoder"],
    }
    for names, words in cases.items():
        names = names.split()
        code, out, _ = call(*names, "--csv", "s.csv", "--size-plot", "p.svg", "--limit", 2)
        assert code == 0 and "wrote s.csv" in out and "wrote p.svg" in out
        lines = (here / "s.csv").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1 + len(names) * 2 * 6 and lines[0].startswith("run,image,protocol,masks")
        plot = (here / "p.svg").read_text(encoding="utf-8")
        assert all(f"<!-- {word}" in plot or word in plot for word in [*words, "80–100 %", "protocol spot"])
    code, out, _ = call("one-0", "--size-plot", "p.png", "--limit", 2)
    assert code == 0 and Image.open(here / "p.png").size[0] > 400
    assert sorted(p.name for p in here.iterdir() if p.is_file()) == ["p.png", "p.svg", "s.csv"]


def test_a_plot_needs_matplotlib(here, call, monkeypatch):
    make_run(here / "runs" / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("--size-plot", "p.png")
    assert code == 2 and err == "error: --size-plot p.png needs matplotlib: pip install matplotlib\n"
    assert call("--limit", 2)[0] == 0


def test_a_broken_matplotlib_is_reported_first_and_costs_no_scores(here, call, monkeypatch):
    """Built for another NumPy it raises when it is imported, without fonts when it draws."""
    make_run(here / "runs" / "a")
    (here / "broken" / "matplotlib").mkdir(parents=True)
    (here / "broken" / "matplotlib" / "__init__.py").write_text("raise AttributeError('_ARRAY_API not found')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(here / "broken")
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        code, out, err = call("--size-plot", "p.png")
    assert code == 2 and out == "" and "which is installed but cannot be imported (AttributeError: _ARRAY_API" in err

    def fail(*_, **__):
        raise RuntimeError("Failed to find font")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    code, out, err = call("--size-plot", "p.png", "--json", "t.json", "--limit", 2)
    assert code == 2 and "decoder masks" in out and "p.png cannot be drawn (RuntimeError: Failed to find font)" in err
    assert json.loads((here / "t.json").read_text())["runs"]


def test_corrupt_and_empty_images_are_in_the_csv(here, call):
    coco_folder(here / "coco")
    run = coco_run(here / "runs" / "c")
    code, out, _ = call(run, "--data", "coco", "--csv", "t.csv", "--protocol", "all")
    assert code == 0 and "7 block masks, 2 columns [4]" in out
    lines = (here / "t.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 5 * 7 + 1 and lines[-1].startswith("c,bad.jpg,") and "cannot be read" in lines[-1]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "default: the newest finished run)" in text
    for protocol in PROTOCOLS.values():
        assert f"{protocol.name}: {protocol.about}" in text and protocol.source in text


def test_precision_is_the_models_and_is_in_the_json(here, call):
    make_run(here / "runs" / "scenes-stage1-001")
    losses = []
    for precision in ("float32", "bf16"):
        assert call("--precision", precision, "--json", "all.json")[0] == 0
        found = json.loads((here / "all.json").read_text())
        assert found["settings"]["precision"] == precision
        losses.append(found["runs"][0]["reconstruction_loss"][0]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
