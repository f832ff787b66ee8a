"""The tables of the first minutes on a GPU: of which rows they are, and what their last line says."""

from __future__ import annotations

from pathlib import Path

import record
import table
from record import GO, NO_GO, Recorder, Row


def write_rows(folder: Path, monkeypatch, run: str, card: str, *rows: tuple[str, str, float]) -> None:
    """CSV files as of one call of the script on a card; rows: part, subject, and ms of a step."""
    about = {"run": run, "date": run[:10], "card": card, "driver": "", "torch": "2.11", "triton": "3.6"}
    about |= {"cuda": "13", "commit": "abc1234"}
    monkeypatch.setattr(record, "facts", lambda: about)
    for part, subject, ms in rows:
        Recorder(part, folder).add(subject, "graph", figure="ms a step", value=ms, verdict=GO)


def tabled(folder: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert table.main([*words, *map(str, sorted(folder.glob("*.csv")))]) == 0
    return capsys.readouterr().out


def test_of_two_runs_on_one_day_the_newest_rows_count(tmp_path, monkeypatch, capsys):
    """Part by part: a second run may have had fewer."""
    first, second = "2026-12-01 09:00:00", "2026-12-01 11:30:00"
    rows = ("steps", "stage 1", 5.0), ("steps", "stage 2", 10.0), ("layouts", "decoder", 1.0)
    write_rows(tmp_path, monkeypatch, first, "H200", *rows)
    write_rows(tmp_path, monkeypatch, second, "H200", ("steps", "stage 1", 7.0))
    assert len(list(tmp_path.iterdir())) == 2  # a file for each part
    text = tabled(tmp_path, capsys)
    assert "stage 1: 7.00 ms" in text and "stage 2: no time" in text and "| decoder |" in text
    assert "5.00 ms" not in text and text.count("| stage 1 |") == 1
    text = tabled(tmp_path, capsys, "--run", first)
    assert "stage 1: 5.00 ms" in text and "stage 2: 10.00 ms" in text and "7.00 ms" not in text
    text = tabled(tmp_path, capsys, "--run", second, "--last")
    assert text.startswith("H200: stage 1: 7.00 ms") and text.count("\n") == 1
    assert table.main(["--run", "yesterday", *map(str, tmp_path.glob("*.csv"))]) == 2
    assert capsys.readouterr().err == f"error: no rows of the run yesterday: there are {first}, {second}\n"


def test_two_cards_are_not_mixed(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, monkeypatch, "2026-12-01 09:00:00", "H100", ("steps", "stage 1", 8.0))
    write_rows(tmp_path, monkeypatch, "2026-12-01 09:30:00", "H200", ("steps", "stage 2", 11.0))
    lines = tabled(tmp_path, capsys, "--last").splitlines()
    assert [line.partition(", aim")[0] for line in lines] == [
        "H100: stage 1: 8.00 ms a step (graph)",
        "H200: stage 1: no time",
    ]
    assert "stage 2: no time" in lines[0] and "stage 2: 11.00 ms" in lines[1]
    assert tabled(tmp_path, capsys).count("| what | of | figure |") == 2


def test_a_file_without_rows_is_named(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, monkeypatch, "2026-12-01 09:00:00", "H100", ("steps", "stage 1", 8.0))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert table.main([str(path)]) == 2
    assert f"no rows in {path}: run bench/first_light.sh first" in capsys.readouterr().err


def test_another_csv_is_named(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert table.main([str(tmp_path / "other.csv")]) == 2
    assert "other.csv is not a result of first_light" in capsys.readouterr().err


def test_the_last_line():
    about = {"rehearsal": "", "date": "d", "card": "c", "torch": "t", "triton": "t"}

    def row(stage, variant, ms, verdict=GO):
        return about, Row("steps", f"stage {stage}", variant, "ms a step", ms, error=1e-3, verdict=verdict)

    rows = [
        row(1, "eager", 20.0),
        row(1, "graph", 6.5),
        row(1, "wrong", 3.0, NO_GO),
        row(1, "aim", 6.0),
        row(2, "graph", 11.0),
    ]
    line = table.last_line(rows)
    assert "stage 1: 6.50 ms a step (graph), aim 6: missed by 0.50 ms" in line
    assert "stage 2: 11.00 ms a step (graph), aim 12: met by 1.00 ms" in line
    assert "COCO, 92,400 steps a stage: 26.9 minutes, aim 30: met by 3.1" in line  # 92,400 × 17.5 ms
    assert line.endswith("NO GO in 1: steps: stage 1") and "rehearsal" not in line
    assert "stage 2: no time" in table.last_line(rows[:1])
