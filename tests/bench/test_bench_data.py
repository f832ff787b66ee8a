"""The data benchmark: its rows, its verdict and its CSV, on a few images."""

import csv

import bench_data
import cache_speed
import evaluation_speed
import loader_speed
import pytest
import torch


@pytest.fixture
def in_small(monkeypatch):
    """Loaders are not measured in processes of their own, metrics on few images, and a busy machine may be slow."""
    monkeypatch.setattr(bench_data, "METRICS_MS", 1e6)
    loaded = [
        dict(name="Pillow, threads", cores=1, images_s=250.0, max=0, mean=0.0),
        dict(name="DALI, GPU", cores=1, images_s=5818.0, max=5, mean=0.2),
    ]
    monkeypatch.setattr(loader_speed, "run", lambda *arguments: loaded)
    measured = evaluation_speed.measure
    monkeypatch.setattr(evaluation_speed, "measure", lambda given, rounds: measured(given, 1))
    generated = evaluation_speed.generated
    monkeypatch.setattr(evaluation_speed, "generated", lambda images, **options: generated(2, **options))
    cached = cache_speed.run
    monkeypatch.setattr(cache_speed, "run", lambda images, *arguments: cached(32, *arguments))
    make = loader_speed.make_photos
    monkeypatch.setattr(cache_speed, "make_photos", lambda folder, count: make(folder, count, 64, 48))
    return loaded


@pytest.mark.slow
def test_rows_verdict_and_csv(in_small, tmp_path, capsys):
    assert bench_data.main(["--tiny", "--csv", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| Pillow, threads | 1 | 250 | 250 | 0 | 0.000 |" in printed and "nothing differs" in printed
    assert "1.00 times what stage 1 without caches asks for at its aim (5,818 images/s)" in printed
    (file,) = tmp_path.iterdir()
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [row["part"] for row in rows] == ["loader"] * 2 + ["cache"] * 5 + ["metrics"]
    assert all(float(row["value"]) > 0 and row["torch"] == torch.__version__ for row in rows)
    assert {row["difference"] for row in rows if row["part"] == "cache" and row["reference"]} == {"0"}


def test_a_difference_is_reported(in_small, monkeypatch, capsys):
    in_small[1]["max"] = 40
    stale = dict(name="pixel cache", images_s=1.0, reference="files", times=1.0, difference=3.0)
    monkeypatch.setattr(cache_speed, "run", lambda *arguments: [stale])
    broken = evaluation_speed.ours
    monkeypatch.setattr(evaluation_speed, "ours", lambda given: broken(given) + 1e-3)
    monkeypatch.setattr(bench_data, "METRICS_MS", 0.0)
    assert bench_data.main(["--tiny", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG  DALI, GPU: pixels differ by 40 levels" in printed
    assert "WRONG  pixel cache: differs from files by 3" in printed
    assert "WRONG  metrics: scores differ by 1.0e-03" in printed and "ms an image, more than 0" in printed
