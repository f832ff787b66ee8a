"""Where benches write: a place that cannot be written to is said at once, not after what was measured."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import pytest
from harness.targets import target_csv, target_file


def test_a_place_that_can_be_written_to_is_left_as_it_is(tmp_path):
    (tmp_path / "old.csv").write_text("old")
    for name in ("old.csv", "new.csv", "a/b/new.csv"):
        assert target_file(str(tmp_path / name)) == tmp_path / name
    assert target_file("x.csv") == Path("x.csv")
    assert target_csv(str(tmp_path / "a")) == tmp_path / "a" and target_csv(str(tmp_path)) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "old"


@pytest.mark.parametrize(
    "name, says",
    [
        (".", "is a folder: name a file in it"),
        ("file/x.csv", "cannot be written: .*file is not a folder"),
        ("file/a/x.csv", "file/a/x.csv cannot be written: .*file is not a folder"),
        ("pipe", "is not a regular file"),
        (f"{'x' * 300}.csv", "cannot be written: File name too long"),
    ],
)
def test_a_place_that_cannot_is_named(name, says, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        target_file(str(tmp_path / name))


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for kind, name in ((target_file, "x.csv"), (target_csv, "x.csv"), (target_csv, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match="choose a folder that you may write to"):
            kind(str(tmp_path / name))


@pytest.mark.parametrize(
    "bench",
    ["exchange_speed", "ladder", "growth", "native_table", "bench_data"],
)
def test_every_bench_looks_before_it_measures(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [bench, "--csv", str(tmp_path / "file" / "x.csv")])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(bench).main()
    assert ended.value.code == 2 and "argument --csv: " in capsys.readouterr().err.splitlines()[-1]
