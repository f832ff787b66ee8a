"""Block masks against the official ones; k-means against scikit-learn and in the corners."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

import golden_tensors
from spot_fast.evaluation import baselines
from spot_fast.evaluation.baselines import block_mask_candidates, block_masks, kmeans_labels

GOLDEN = ["block_masks.*"]


@pytest.mark.parametrize("columns, masks, size", [(3, 11, 128), (4, 24, 128), (2, 6, 320), (2, 7, 320), (1, 1, 320)])
def test_golden_block_masks(columns, masks, size):
    golden_tensors.assert_close(f"block_masks.{columns}_columns_{masks}_masks", block_masks(columns, masks, size))


def test_block_mask_candidates():
    assert list(block_mask_candidates(2, 64)) == [1, 2]
    candidates = block_mask_candidates(6, 64)
    assert list(candidates) == [1, 2, 3, 4]
    for columns, labels in candidates.items():
        assert torch.equal(labels, block_masks(columns, 6, 64)) and labels.unique().tolist() == list(range(6))


def test_more_blocks_than_pixels():
    labels = block_masks(1, 9, 4)
    assert labels[:, 0].tolist() == [0, 1, 2, 3]


def test_block_mask_errors():
    with pytest.raises(ValueError, match=r"columns is 3: give 1 to num_masks \(2\)"):
        block_masks(3, 2, 8)
    with pytest.raises(ValueError, match="columns is 0"):
        block_masks(0, 2, 8)
    with pytest.raises(ValueError, match="size is 0"):
        block_masks(1, 2, 0)


def blobs(seed, batch, tokens, width, clusters, spread):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((batch, clusters, width))
    labels = rng.integers(0, clusters, (batch, tokens))
    points = np.take_along_axis(centres, labels[..., None], 1) + spread * rng.standard_normal((batch, tokens, width))
    return torch.from_numpy(points).float(), torch.from_numpy(labels)


def inertia(points, labels):
    """Sum of squared distances of one image's points [N, D] to the mean of their cluster."""
    return sum((points[labels == j] - points[labels == j].mean(0)).square().sum().item() for j in labels.unique())


@pytest.mark.parametrize("spread, k", [(0.05, 5), (0.5, 5), (2.0, 6), (0.5, 1)])
def test_kmeans_is_as_good_as_sklearns(spread, k):
    points, _ = blobs(k, 20, 100, 8, 5, spread)
    labels = kmeans_labels(points, k, normalise=False)
    ours, theirs = [], []
    for image, image_labels in zip(points, labels, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.append(KMeans(k, n_init=4, random_state=0, tol=0).fit(image.double().numpy()).inertia_)
        ours.append(inertia(image.double(), image_labels))
    # Neither finds the optimum where clusters overlap: better here, worse there, equal on average.
    assert sum(ours) <= 1.005 * sum(theirs)
    assert all(o <= 1.05 * t for o, t in zip(ours, theirs, strict=True))


def test_kmeans_finds_separate_clusters():
    points, truth = blobs(0, 4, 60, 16, 4, 0.02)
    for labels, expected in zip(kmeans_labels(points, 4), truth, strict=True):
        assert adjusted_rand_score(labels, expected) == 1


def test_kmeans_stops_at_a_fixed_point():
    points, _ = blobs(1, 3, 80, 6, 5, 1.0)
    for image, labels in zip(points, kmeans_labels(points, 5, normalise=False), strict=True):
        means = torch.stack([image[labels == j].mean(0) for j in range(5)])
        assert torch.equal(torch.cdist(image, means).argmin(1), labels)


def test_normalised_means_direction_only():
    points, _ = blobs(2, 2, 50, 8, 3, 0.3)
    scale = torch.rand(2, 50, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(kmeans_labels(points, 3), kmeans_labels(F.normalize(points, dim=-1) * scale, 3))


def test_draws_depend_on_seed_and_image_not_on_the_batch():
    points, _ = blobs(3, 5, 64, 8, 9, 1.5)
    whole = kmeans_labels(points, 5, seed=3)
    assert torch.equal(whole, kmeans_labels(points, 5, seed=3))
    assert torch.equal(whole[2:4], kmeans_labels(points[2:4], 5, seed=3, indices=torch.tensor([2, 3])))
    assert not torch.equal(whole, kmeans_labels(points, 5, seed=4))


def test_a_cluster_that_runs_empty_moves():
    """One far token among many equal ones: whatever the starts, the three distinct points must be three clusters."""
    points = torch.zeros(1, 40, 2)
    points[0, 7], points[0, 23] = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 1e-3])
    for seed in range(10):
        labels = kmeans_labels(points, 3, seed, normalise=False)[0]
        assert labels.unique().numel() == 3 and labels[0] not in (labels[7], labels[23])


def test_fewer_distinct_tokens_than_clusters():
    labels = kmeans_labels(torch.ones(2, 9, 4), 3)
    assert labels.shape == (2, 9) and all(image.unique().numel() == 1 for image in labels)
    assert kmeans_labels(torch.zeros(1, 9, 4), 9).shape == (1, 9)


def test_each_token_its_own_cluster():
    points, _ = blobs(4, 2, 12, 8, 12, 1.0)
    assert all(image.unique().numel() == 12 for image in kmeans_labels(points, 12))


def test_kmeans_of_no_image():
    assert kmeans_labels(torch.empty(0, 9, 4), 3).shape == (0, 9)


def test_kmeans_errors():
    with pytest.raises(ValueError, match=r"shape \[9, 4\]: expected \[B, N, D\]"):
        kmeans_labels(torch.ones(9, 4), 3)
    with pytest.raises(ValueError, match=r"k is 10: give 1 to the number of tokens \(9\)"):
        kmeans_labels(torch.ones(1, 9, 4), 10)
    with pytest.raises(ValueError, match="k is 0"):
        kmeans_labels(torch.ones(1, 9, 4), 0)
    with pytest.raises(ValueError, match="indices has 2 entries: expected one for each of the 1 images"):
        kmeans_labels(torch.ones(1, 9, 4), 2, indices=torch.tensor([1, 2]))


@pytest.mark.parametrize("tokens, k", [(64, 6), (9, 7), (40, 11)])
def test_checking_convergence_less_often_changes_no_label(tokens, k, monkeypatch):
    """As on a GPU, where reading the labels waits: iterations beyond convergence change nothing."""
    generator = torch.Generator().manual_seed(tokens)
    features = torch.randn(3, tokens, 8, generator=generator)
    features[1, tokens // 2 :] = features[1, :1]  # many equal tokens: clusters run empty
    expected = baselines.kmeans_labels(features, k, seed=2)
    checks = []
    monkeypatch.setattr(baselines, "_reading_waits", lambda device: True)
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: checks.append(1) or equal(a, b))
    labels = baselines.kmeans_labels(features, k, seed=2)
    monkeypatch.undo()
    assert torch.equal(labels, expected) and len(checks) <= 13
