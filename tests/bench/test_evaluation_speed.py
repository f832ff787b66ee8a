"""The benchmark of the metrics: both implementations agree, so its times are of the same work."""

import evaluation_speed
import pytest
import torch


@pytest.mark.parametrize("size, masks, grid", [(96, 7, 14), (40, 3, 5)])
def test_both_implementations_agree(size, masks, grid):
    given = evaluation_speed.generated(5, size=size, masks=masks, grid=grid)
    ours, expected = evaluation_speed.ours(given, batch_size=2), evaluation_speed.per_mask(given)
    assert ours.shape == (2, 5, 4) and torch.allclose(ours, expected, atol=1e-12, rtol=0, equal_nan=True)


def test_what_it_prints(capsys):
    assert evaluation_speed.main(["--images", "2", "--size", "72", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 images, 14 × 14 tokens, 7 masks, label maps 72 × 72" in out and "ratio" in out


def test_a_difference_fails(monkeypatch):
    monkeypatch.setattr(evaluation_speed, "per_mask", lambda given: evaluation_speed.ours(given) + 1e-3)
    assert evaluation_speed.main(["--images", "2", "--size", "24", "--rounds", "1"]) == 1
