"""Protects the ceilings of the scenes preset: each bound finds what it is told to find in features that hold it."""

from __future__ import annotations

import pytest
import scenes_ceilings as ceilings
import torch


def coded(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [8, 36, 16] whose first channels name one of three labels, the others noise; and the labels."""
    torch.manual_seed(0)
    truth = torch.arange(36).div(12, rounding_mode="floor").expand(8, -1)
    codes = torch.eye(3)[truth]
    return torch.cat([codes, noise * torch.randn(8, 36, 13)], -1), truth


def test_nearest_mean_and_kmeans_find_clear_objects():
    features, truth = coded(0.05)
    assert torch.equal(ceilings.nearest(features, *ceilings.true_means(features, truth)), truth)
    labels = ceilings.kmeans_true_count(features, truth)
    assert all(len(image[truth[0] == k].unique()) == 1 for image in labels for k in range(3))


def test_the_probe_finds_what_noise_hides():
    features, truth = coded(2.0)
    linear = ceilings.probe(features[:4], truth[:4], width=4, steps=200)

    def errors(tokens: torch.Tensor) -> int:
        return int((ceilings.nearest(tokens, *ceilings.true_means(tokens, truth[4:])) != truth[4:]).sum())

    assert errors(linear(features[4:])) < errors(features[4:])


def test_position_is_measured():
    torch.manual_seed(0)
    line = torch.linspace(-1, 1, 6)
    place = torch.cartesian_prod(line, line).expand(400, -1, -1)
    share, read = ceilings.about_position(torch.cat([place, torch.randn(400, 36, 4)], -1))
    assert read > 0.99 and share == pytest.approx(
        2 * float(line.var(correction=0)) / (2 * float(line.var(correction=0)) + 4), rel=0.1
    )
    assert ceilings.about_position(torch.randn(20, 36, 4))[1] < 0.1


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "probe", lambda features, truth: torch.nn.Identity())
    ceilings.main(["--images", "4"])
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 7 and "position: " in printed
    with pytest.raises(SystemExit):
        ceilings.main(["--images", "1"])
