"""The report command: the file it writes, numbers equal to evaluate's, one sentence for each error."""

import csv
import json
import re
import shlex
from html import unescape

import pytest

from report_runs import QUICK, make_run
from spot_fast import evaluate, report
from spot_fast.checkpoints.runs import MODEL
from spot_fast.reporting import images


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "PANEL", 32)
    return tmp_path


@pytest.fixture
def call(here, capsys):
    def run(*argv):
        code = report.main([*map(str, argv), *QUICK])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def cells_of(page):
    """The cells of every table row, header first, as text."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page)]
    return [[unescape(cell) for cell in row] for row in rows]


def test_the_newest_run_becomes_a_file_whose_images_have_the_scores_of_the_csv(here, call):
    make_run(here / "runs" / "scenes-stage1-001")
    code, out, err = call("--protocol", "spot")
    assert code == 0 and err == ""  # bars are for terminals
    file = here / "report.html"
    assert out == f"{file.resolve()}  {file.stat().st_size / 1e6:.1f} MB, open it in a browser\n"
    assert sorted(path.name for path in here.iterdir()) == ["report.html", "runs"]
    page = unescape(file.read_text(encoding="utf-8"))
    facts = (
        "python -m spot_fast.report --protocol spot --device cpu",
        "the first 4 of 10 images of scenes",
        "stage 1 on scenes, seed 0, 4 epochs, 24 steps of 4 in 75 s (114 images/s)",
        "cpu, 1 thread",
    )
    assert [fact for fact in facts if fact not in page] == []

    assert evaluate.main(["--csv", "s.csv", "--limit", "4", "--device", "cpu"]) == 0
    scores: dict = {}
    with open("s.csv", newline="") as lines:
        for line in csv.DictReader(lines):
            scores.setdefault((line["masks"], line["orders"]), {})[line["image"]] = float(line["mbo_i"])
    decoder, slots = scores["decoder", "9"], scores["slots", ""]
    for why, choose in (("best", max), ("worst", min)):
        image = choose(decoder, key=decoder.get)
        score = f"{100 * decoder[image]:.1f}"
        assert f"<strong>{why}, mBO_i {score}</strong> · {image}" in page
        assert f"<strong>average</strong> · {score}" in page and f"iteration 3 · {100 * slots[image]:.1f}" in page


def test_numbers_are_those_that_the_named_command_prints(here, capsys):
    for seed in range(2):
        make_run(here / "runs" / f"one-{seed}", seed=seed)
    make_run(here / "runs" / "two", 2)
    options = ("--protocol", "ocbench", "--seed", "3", "--gradient-images", "0")
    assert report.main(["one-0", "two", "one-1", *QUICK, *options]) == 0
    page = (here / "report.html").read_text(encoding="utf-8")
    (command,) = [c for c in re.findall(r"<code[^>]*>(.*?)</code>", page) if "spot_fast.evaluate" in c]
    words = shlex.split(unescape(command))
    assert words[:3] == ["python", "-m", "spot_fast.evaluate"] and "spot,ocbench" in words
    capsys.readouterr()
    assert evaluate.main([*words[3:], "--device", "cpu"]) == 0
    printed = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in printed if len(row) > 4 and re.fullmatch(r"–|-?[\d.]+( ± [\d.]+)?", row[-1])]
    # A row has seven scores, of which P-ARI is none here, or eight sizes.
    scores, sizes = [r for r in rows if len(r) == 8], [r for r in rows if len(r) == 9 and r[0] != "instances"]
    # six kinds of masks, of three runs and of the mean of two, under two protocols
    assert len(scores) == len(sizes) == 6 * 4 * 2
    shown = cells_of(page)
    trained = [row for row in scores if not re.search("k-means|block", row[0])]
    assert len(trained) == 24 and [row for row in trained if row not in shown] == []
    # Baselines that are equal for every run come once, and not again as a mean.
    baselines = [row for row in scores if re.search("k-means|1 block", row[0]) and "±" not in row[1]]
    assert all(shown.count(row) == 1 for row in baselines) and len(baselines) == 12
    by_size = {row[0].removeprefix("two, "): row[1:] for row in shown if len(row) == 9 and row[0].startswith("two, ")}
    assert list(by_size) == ["decoder masks, all 9 orders", "slot masks [1]"]
    mean = next(row for row in shown if len(row) == 9 and row[0] == "one-0 and 1 more seed, slot masks [1]")
    assert all([title, *cells] in sizes for title, cells in by_size.items())
    assert ["slot masks [1]", *mean[1:]] in sizes and any("±" in cell for cell in mean)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder with a whole run and runs that lack something."""
    root = tmp_path_factory.mktemp("wrong")
    make_run(root / "made" / "whole")
    (make_run(root / "made" / "half") / MODEL).unlink()
    coco = make_run(root / "made" / "coco") / "config.json"
    coco.write_text(json.dumps(json.loads(coco.read_text()) | {"preset": "coco"}))
    return root


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "there is no finished run in runs: train one"),
        (["nothing"], "run nothing is not a folder"),
        (["made/half"], "run made/half is not finished"),
        (["made/whole", "made/half"], "run made/half is not finished"),
        (["made/whole", "whole", "--runs", "made"], "a run is named twice"),
        (["made/coco"], "--preset coco needs --data PATH"),
        (["made/coco", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["made/whole", "--out", "made"], "--out made is a folder"),
        (["made/whole", "--out", "no/such/report.html"], "--out no/such/report.html lies in no/such"),
        (["made/whole", "--images", "0"], "--images is 0: use 1 or more"),
        (["made/whole", "--gradient-images", "-1"], "--gradient-images is -1: use 0 or more"),
        (["made/whole", "--limit", "-1"], "--limit is -1"),
        (["made/whole", "--seed", "-1"], "--seed is -1"),
        (["made/whole", "--protocol", "dino"], "--protocol dino is unknown: use all"),
        (["made/whole", "--device", "gpu"], "--device gpu cannot be used"),
    ],
)
def test_one_sentence_for_what_is_wrong_and_nothing_is_written(wrong, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(wrong)
    assert report.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert [path.name for path in wrong.iterdir()] == ["made"]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_at_the_end_leaves_the_old_report(here, call, monkeypatch, stop):
    make_run(here / "runs" / "a", orders="standard")
    (here / "report.html").write_text("old")

    def fail(*_):
        raise stop

    monkeypatch.setattr("os.replace", fail)
    code, out, err = call("--protocol", "spot")
    assert code == (2 if isinstance(stop, OSError) else 130) and out == "" and "error: " in err
    assert (here / "report.html").read_text() == "old"
    assert [path.name for path in here.iterdir() if path.is_file()] == ["report.html"]


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(default: the newest finished run)" in text and "(default: report.html)" in text
