"""python -m spot_fast.reproduce with stand-ins for training and scoring; one test has the real ones."""

import csv
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import stand_in_commands
from paths import ROOT
from spot_fast import reproduce
from spot_fast.checkpoints.runs import STATE
from spot_fast.reproduction import execution, results
from spot_fast.reproduction.execution import evaluation
from spot_fast.reproduction.results import cell
from spot_fast.training.run_folder import is_free

SHORT = "-- --epochs 1 --train-images 32 --batch-size 8".split()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.sys, "executable", str(stand_in_commands.python(tmp_path / "python")))
    return tmp_path / "runs"


def call(*words, runs, short=SHORT) -> int:
    return reproduce.main([*map(str, words), "--runs", str(runs), *short])


def names(capsys, *words, runs) -> list[str]:
    assert call(*words, "--list", runs=runs) == 0
    return capsys.readouterr().out.split()


def lines(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_table_it_lists_them(capsys):
    assert reproduce.main([]) == 0
    out = capsys.readouterr().out
    assert "\n  1          Table 1: patch orders" in out and "\n  ablations " in out


def test_a_table_from_nothing_to_the_files(stand_in, capsys):
    """Each run is trained and scored once; the paper's numbers stand beside mean ± std; Markdown and CSV agree."""
    assert call("1", "--seeds", 0, 1, "--jobs", 3, runs=stand_in) == 0
    out, err = capsys.readouterr()
    assert err.count(": trained in") == err.count(": evaluated in") == 10
    text = (stand_in / "scenes-1.md").read_text()
    assert text.strip() == out.strip()
    assert "| (b) SP | decoder, order 0 | 10.1 ± 0.1 | – | 10.1 ± 0.1 | 10.1 ± 0.1 | – | – | – | 32.7 ± 0.2 |" in text
    assert "| (g) SP, ST, ENS | decoder, mean of orders | 25.1 ± 0.1 |" in text and "paper (COCO): mBO_i" in text
    assert "| (e) ST | decoder, order 0 | 20.1 ± 0.1 |" in text
    assert "| block masks | in 2 columns | 30.0 | – | 30.0 | 30.0 | – | – | – |  |" in text
    assert "- 10 runs, 10 minutes: " in text
    table = lines(stand_in / "scenes-1.csv")
    assert len(table) == 2 * 16 and list(table[0]) == list(results.FIELDS)
    one = next(line for line in table if (line["row"], line["masks"], line["seed"]) == ("(c) SP, ENS", "ensemble", "1"))
    assert (one["mbo_i"], one["mbo_c"], one["minutes"], one["torch"]) == ("0.151000", "", "1.00", "2")
    assert "--seed 1 --epochs 1 --train-images 32" in one["options"] and one["jobs"] == "3"
    # again: nothing is left to do
    assert call("1", "--seeds", 0, 1, runs=stand_in) == 0
    again = capsys.readouterr()
    assert again.out == out and "trained in" not in again.err and "evaluated in" not in again.err


def test_tables_share_runs_and_show_what_is_there(stand_in, capsys):
    assert call("7", "--seeds", 0, runs=stand_in) == 0
    capsys.readouterr()
    assert call("1", "--seeds", 0, 1, "--show", runs=stand_in) == 0
    out = capsys.readouterr().out
    assert "| (b) SP | decoder, order 0 | 10.0 |" in out and "| 1 of 2 |" in out
    assert "| (e) ST | slots | – | – | – | – | – | – | – | 33.2 ± 0.1 |" in out and "| 0 of 2 |" in out
    assert call("1", "7", "--seeds", 0, runs=stand_in) == 0
    assert capsys.readouterr().err.count("trained in") == 2


def test_another_protocol_or_model_is_scored_again(stand_in, capsys):
    assert call("3", "--seeds", 0, runs=stand_in) == 0
    first = next(stand_in.glob("scenes-stage1-*"))
    assert evaluation(first, "spot") and evaluation(first, "spot,oclf") is None
    assert call("3", "--seeds", 0, "--protocol", "spot,oclf", runs=stand_in) == 0
    out, err = capsys.readouterr()
    assert err.count("evaluated in") == 6 and err.count("trained in") == 3
    assert out.count("## Table 3") == 3 and "protocol oclf, percent" in out
    assert call("3", "--seeds", 0, runs=stand_in) == 0  # the scores of both hold one
    assert "evaluated in" not in capsys.readouterr().err
    later = time.time() + 10
    os.utime(first / "model.safetensors", (later, later))
    assert evaluation(first, "spot") is None


def test_one_run_of_a_cluster_array(stand_in, capsys):
    """--list names the runs, --only makes one, and says in a sentence that its teacher is missing."""
    listed = names(capsys, "1", "--seeds", 0, runs=stand_in)
    assert len(listed) == 5 and not stand_in.exists()
    student = next(name for name in listed if name.startswith("scenes-stage2"))
    teacher = next(name for name in listed if name.startswith("scenes-stage1"))
    assert listed.index(teacher) < listed.index(student)
    assert call("1", "--seeds", 0, "--only", student, runs=stand_in) == 2
    assert f"error: --only {student} needs {teacher} as --teacher, which is not finished" in capsys.readouterr().err
    assert call("1", "--seeds", 0, "--only", "other", runs=stand_in) == 2
    assert "error: --only other is no run of these tables: --list prints their names" in capsys.readouterr().err
    for name in (teacher, student):
        assert call("1", "--seeds", 0, "--only", name, runs=stand_in) == 0
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("evaluated in") == 2 and not list(stand_in.glob("*.md"))
    assert evaluation(stand_in / student, "spot")


def test_a_run_that_fails_costs_only_its_own(stand_in, capsys, monkeypatch):
    """The others go on, its students are left out, and a sentence says why; a first one that fails ends all."""
    monkeypatch.setenv("STAND_IN_FAILS", "scenes-")
    assert call("2", "--seeds", 0, runs=stand_in) == 2
    err = capsys.readouterr().err
    assert "failed (train, exit code 1): the loss is not finite (see " in err and err.count("failed") == 2
    monkeypatch.setenv("STAND_IN_FAILS", "scenes-one_order-stage1")
    assert call("8", "7", "--seeds", 0, runs=stand_in) == 2
    out, err = capsys.readouterr()
    assert "error: 1 of 5 runs failed: scenes-one_order-stage1-seed0-" in err.splitlines()[-1]
    assert err.count("trained in") == 4
    assert "| BO-QSA, ST | decoder, order 0 | 20.0 |" in out and "| (a) neither | slots | – |" in out
    monkeypatch.delenv("STAND_IN_FAILS")
    assert call("8", "7", "--seeds", 0, runs=stand_in) == 0
    assert capsys.readouterr().err.count("trained in") == 1


def once_written(file, since: float, number: int) -> None:
    """Sends this process a signal when `file` has been written since then: the run has begun, on a busy machine too."""
    while file.stat().st_mtime <= since:
        time.sleep(0.05)
    os.kill(os.getpid(), number)


@pytest.fixture
def interruptible():
    """Python ignores Ctrl-C where the shell started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_time_is_up_and_ctrl_c(stand_in, capsys, monkeypatch, interruptible):
    """Both end the runs with a signal, so that they save, and say that the same line goes on."""
    monkeypatch.setenv("STAND_IN_LASTS", "stage1")
    assert call("4", "--seeds", 0, "--minutes", 0.08, runs=stand_in) == 3
    assert "out of time: every run is saved, the same command line goes on" in capsys.readouterr().err
    assert "stopped at step 1" in next((stand_in / "logs").glob("*stage1*.log")).read_text()
    assert call("4", "--seeds", 0, "--plan", runs=stand_in) == 0
    assert "at step 1 of 4" in capsys.readouterr().out
    folder = next(stand_in.glob("scenes-mlp-stage1-*"))
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        sender = threading.Thread(target=once_written, args=(folder / STATE, time.time(), number))
        sender.start()
        assert call("4", "--seeds", 0, runs=stand_in) == 130
        sender.join()
        assert "interrupted; every run is saved, the same command line goes on" in capsys.readouterr().err
    assert time.monotonic() - begun < 30 and is_free(folder)


def test_a_run_that_another_process_trains_is_waited_for(stand_in, capsys):
    """Two commands in one folder share the work; after a kill the orphans finish theirs."""
    planned = names(capsys, "3", "--seeds", 0, runs=stand_in)
    folder = stand_in / planned[0]
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(2, os.close, (lock,))
    timer.start()
    assert call("3", "--seeds", 0, runs=stand_in) == 0
    timer.join()
    err = capsys.readouterr().err
    assert err.count(f"{planned[0]}: another process trains it, waiting") == 1
    assert err.index(f"{planned[1]}: trained in") < err.index(f"{planned[0]}: trained in")


def test_what_a_kill_left_before_the_first_step(stand_in, capsys):
    """A folder without config.json is begun anew."""
    folder = stand_in / names(capsys, "3", "--seeds", 0, runs=stand_in)[0]
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", ".config.json.tmp"):
        (folder / name).touch()
    assert call("3", "--seeds", 0, runs=stand_in) == 0
    assert not (folder / ".config.json.tmp").exists() and not (folder / "metrics.jsonl").exists()


def test_figures(stand_in, capsys):
    """Figure 7 from the scores by size; Figure 3 needs real models (below)."""
    assert call("figure7", "--seeds", 0, 1, "--out", stand_in / "out", runs=stand_in) == 0
    assert "![Figure 7: mBO_i by size of the instance](scenes-figure7.png)" in capsys.readouterr().out
    assert (stand_in / "out" / "scenes-figure7.png").stat().st_size > 5000
    table = lines(stand_in / "out" / "scenes-figure7.csv")
    assert len(table) == 3 * 8 and {line["mbo_i"] for line in table} == {"0.200500", "0.250500", "0.190500"}


@pytest.mark.slow
def test_real_runs_survive_a_kill(tmp_path):
    """A table of real trainings: killed in the middle, its orphan waited for or resumed, then all is there."""
    tiny = (
        "--epochs 1 --train-images 64 --val-images 4 --batch-size 8 --eval-images 0 --warmup-steps 0 --no-tensorboard"
    )
    command = [sys.executable, "-m", "spot_fast.reproduce", "7", "figure3", "--seeds", "0", "--runs", str(tmp_path)]
    command += ["--threads", "1", "--jobs", "2", "--", *tiny.split()]
    process = subprocess.Popen(command, cwd=ROOT, env=execution._environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("scenes-*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=ROOT, env=execution._environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("scenes-*/model.safetensors"))) == 3
    assert "| (c) SP, ST | slots |" in done.stdout and "0 of 1" not in done.stdout
    assert (tmp_path / "scenes-figure3.png").stat().st_size > 5000
    again = subprocess.run(command, cwd=ROOT, env=execution._environment(), capture_output=True, text=True)
    assert again.stdout == done.stdout and "trained in" not in again.stderr and "evaluated in" not in again.stderr


def test_wrong_words_are_one_sentence(stand_in, capsys):
    for words, says in (
        (["0"], "table 0 is unknown: use all, or some of 1, 2"),
        (["1", "--preset", "coco"], "--preset coco needs --data: the folder of COCO"),
        (["10"], "table 10, rows with dino_vitb16: left out, generated scenes have an encoder of their own"),
        (["1", "--weights", "moco_vitb16"], "--weights moco_vitb16= names no file: write ENCODER=FILE"),
        (["1", "--protocol", "x"], "--protocol x is unknown"),
        (["1", "--jobs", "0"], "--jobs is 0: use 1 or more"),
    ):
        assert call(*words, runs=stand_in) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1
    assert reproduce.main(["1", "--", "--seed", "3"]) == 2
    assert "--seed after -- is set for each run by its table: drop it, or use --seeds N" in capsys.readouterr().err


def test_several_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 2)
    assert reproduce._devices(None, 4) == ["cuda:0", "cuda:1"]
    assert reproduce._devices(None, 1) == [None] and reproduce._devices("cpu", 4) == ["cpu"]


def test_cells():
    """Percent, n - 1 in the deviation, no deviation where all seeds agree, a dash where one has nothing to count."""
    assert cell([0.2, 0.4, 0.6]) == "40.0 ± 20.0" and cell([0.333]) == "33.3" and cell([0.3, 0.3]) == "30.0"
    assert cell([]) == cell([0.1, None]) == "–"
