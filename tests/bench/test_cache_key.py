"""The bench of a cache's key: what it prints, and what it refuses."""

import re

import cache_key
import pytest


def test_a_row_for_each_way_to_know_files(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"a")
    cache_key.main(["--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| 1 files |" in out
    # seconds, which are next to none except on a busy machine
    assert all(re.search(rf"^\| {name} \| \d\.\d\d \|", out, re.MULTILINE) for name in cache_key.METHODS)


@pytest.mark.parametrize("words", [["--files", "0"], ["--folder", "nowhere"], ["--folder", "."]])
def test_nothing_to_measure_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cache_key.main(words)
    assert stop.value.code == 2 and f"error: {' '.join(words)}" in capsys.readouterr().err
