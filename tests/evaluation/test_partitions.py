"""ARI, P-ARI and PQ against scikit-learn and loops over pixels: void, overlaps, empty masks, nothing to compare."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from spot_fast.evaluation.metrics import (
    METRICS,
    OVERLAP,
    VOID,
    Scores,
    count_pairs,
    image_scores,
    pair_labels,
    scores_of_counts,
)

NEW = ("ari", "p_ari", "pq")


def loop_ari(pred, truth):
    """Pairs of pixels that both partitions join, counted one by one; the pixels that count are given."""
    pixels = range(len(pred))
    same_pred = same_truth = same_both = total = 0
    for i in pixels:
        for j in range(i):
            total += 1
            same_pred += pred[i] == pred[j]
            same_truth += truth[i] == truth[j]
            same_both += pred[i] == pred[j] and truth[i] == truth[j]
    expected = same_pred * same_truth / total if total else 0
    most = (same_pred + same_truth) / 2
    return (same_both - expected) / (most - expected) if most != expected else 1.0


def loop_pq(pred, truth):
    """Kirillov et al.'s rules with one class, mask by mask; label -1 of the truth is void."""
    pixels = range(len(pred))
    masks = {k: {i for i in pixels if pred[i] == k} for k in set(pred)}
    segments = {g: {i for i in pixels if truth[i] == g} for g in set(truth) if g >= 0}
    void = {i for i in pixels if truth[i] < 0}
    if not segments:
        return math.nan
    quality, found, right = 0.0, set(), set()
    for k, mask in masks.items():
        for g, segment in segments.items():
            both, either = len(mask & segment), len((mask - void) | segment)
            if both / either > 0.5:
                quality += both / either
                right.add(k)
                found.add(g)
    wrong = [k for k, mask in masks.items() if k not in right and len(mask & void) / len(mask) <= 0.5]
    return quality / (len(found) + len(wrong) / 2 + (len(segments) - len(found)) / 2)


def partitions(seed, pixels, num_pred, num_truth, noise, void):
    """Predicted labels, of which some have no pixel, and true ones near them, some void."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_truth, pixels)
    pred = np.where(rng.random(pixels) < noise, rng.integers(0, num_pred, pixels), truth % num_pred)
    return pred, np.where(rng.random(pixels) < void, VOID, truth)


def shaped(*maps):
    return [torch.from_numpy(np.asarray(m)).view(1, 1, -1) for m in maps]


def approx(value):
    return pytest.approx(value, abs=1e-12, nan_ok=True)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_all_three_are_loops_over_pixels(seed, pixels, num_pred, num_truth, noise, void):
    """Instances with the background a segment (0), panoptic segments of their own, void where either says so."""
    pred, instances = partitions(seed, pixels, num_pred, num_truth, noise, void / 3)
    segments = partitions(seed + 1, pixels, num_pred, num_truth + 2, noise, void)[1]
    maps = shaped(pred, instances, segments)
    found = image_scores(maps[0], num_pred + 2, maps[1], panoptic=maps[2])
    counts, labelled = instances >= 0, segments >= 0
    assert found["ari"].item() == approx(loop_ari(pred[counts], instances[counts]) if counts.any() else math.nan)
    assert found["p_ari"].item() == approx(loop_ari(pred[labelled], segments[labelled]) if labelled.any() else math.nan)
    assert found["pq"].item() == approx(loop_pq(pred.tolist(), segments.tolist()))
    without = image_scores(maps[0], num_pred + 2, maps[1])
    assert without["pq"].item() == approx(loop_pq(pred.tolist(), instances.tolist())) and without["p_ari"].isnan()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_both_ari_are_sklearns(num_pred, num_truth, pixels, noise, seed):
    pred, instances = partitions(seed, pixels, num_pred, num_truth, noise, 0)
    maps = shaped(pred, instances, instances + 1)
    found = image_scores(maps[0], num_pred, maps[1], panoptic=maps[2])
    expected = adjusted_rand_score(instances, pred)
    assert found["ari"].item() == approx(expected) and found["p_ari"].item() == approx(expected)


@pytest.mark.parametrize("offset", [0, 300, 2**24])
def test_panoptic_segments_change_no_other_score(offset):
    """Triples are counted instead of pairs, whatever the segments' numbers; the other scores stay in every bit."""
    rng = np.random.default_rng(3)
    pred, instances, segments = (torch.from_numpy(rng.integers(0, n, (4, 16, 16))) for n in (5, 6, 9))
    classes = instances // 2
    ignore = torch.from_numpy(rng.random((4, 16, 16)) < 0.1)
    segments = torch.where(segments > 0, segments + offset, VOID)
    plain = image_scores(pred, 5, instances, classes, ignore)
    found = image_scores(pred, 5, instances, classes, ignore, panoptic=segments)
    for name in plain:
        if name not in ("p_ari", "pq"):
            assert torch.equal(found[name], plain[name]), name
    for b in range(4):
        labelled = segments[b] >= 0
        assert found["p_ari"][b].item() == approx(adjusted_rand_score(segments[b][labelled], pred[b][labelled]))
    pairs = pair_labels(instances, classes, ignore, segments)
    at = pairs.labels.long().flatten(1)
    for of, expected in (
        (pairs.instances, instances.masked_fill(ignore, VOID)),
        (pairs.classes, classes.masked_fill(ignore, VOID)),
    ):
        assert torch.equal(of.gather(1, at), expected.flatten(1))
    back = pairs.panoptic.gather(1, at)
    assert torch.equal(back < 0, segments.flatten(1) < 0)
    # One number for each segment, in every image.
    assert torch.stack([back.flatten(), segments.flatten()]).unique(dim=1).shape[1] == len(segments.unique())


def test_pixels_of_several_instances_are_no_ones_in_pq():
    """In SlotDiffusion's rules they are a predicted mask of their own: one of ours, it would count as a wrong one."""
    pred = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    truth = torch.tensor([[[0, 0, OVERLAP, OVERLAP, 3, 3]]])
    found = image_scores(pred, 2, truth)
    assert found["pq"].item() == 1.0
    # ARI has them as background and as a third mask, as FG-ARI's table does.
    assert found["ari"].item() == approx(adjusted_rand_score([0, 0, 0, 0, 3, 3], [0, 0, 2, 2, 1, 1]))


@pytest.mark.parametrize(
    "pred, truth, ari, pq",
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0, 1.0),  # one segment, found
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0, 0.0),  # cut in halves: IoU is 1/2, which is no match
        ([0, 0, 1, 1], [VOID] * 4, math.nan, math.nan),  # nothing to compare with
        ([0, 0, 1, 1], [0, 0, VOID, VOID], 1.0, 1.0),  # the second mask is void and not wrong
        ([0, 0, 1, 1, 1], [0, 0, 0, VOID, VOID], 0.0, 2 / 3),  # two thirds of the second mask are void
        ([0, 0, 1, 1], [0, 0, 0, VOID], 0.0, (2 / 3) / 1.5),  # half of it: it counts as wrong
        ([6, 6, 6, 6], [0, 0, 0, 2], 0.0, 0.75 / 1.5),  # masks 0 to 5 are empty, which is not wrong
    ],
)
def test_small_cases(pred, truth, ari, pq):
    found = image_scores(*shaped(pred)[:1], 7, *shaped(truth))
    assert found["ari"].item() == approx(ari) and found["pq"].item() == approx(pq)


def test_products_of_pair_counts_do_not_overflow():
    """At 320 x 320 they exceed 64 bits; panoptic segments across the masks give the value that sklearn gives."""
    pred = torch.zeros(1, 320, 320, dtype=torch.uint8)
    pred[:, 100:] = 1
    segments = (pred + 1).mT.contiguous()
    found = image_scores(pred, 2, pred, panoptic=segments)
    assert found["ari"].item() == 1.0 and found["pq"].item() < 1
    assert found["p_ari"].item() == approx(adjusted_rand_score(segments.flatten(), pred.flatten()))


def test_an_image_without_segments_counts_in_no_mean():
    """Panoptic annotations may lack an image: its other scores stay, and the means are of the other images."""
    pred = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 1]]])
    truth = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 1]]])
    segments = torch.tensor([[[1, 1, 2, 2]], [[VOID] * 4]])
    scores = Scores()
    pairs = pair_labels(truth, panoptic=segments)
    scores.add_scores(scores_of_counts(count_pairs(pred, 2, pairs).cpu(), pairs))
    assert scores.counted() == {"mbo_i": 2, "mbo_c": 0, "miou": 2, "fg_ari": 2, "ari": 2, "p_ari": 1, "pq": 1}
    assert scores.result()["p_ari"] == scores.result()["pq"] == 1.0


def test_no_image_and_no_pixel():
    empty = torch.zeros(0, 8, 8, dtype=torch.int64)
    assert all(len(image_scores(empty, 3, empty, panoptic=empty)[name]) == 0 for name in METRICS)
    nothing = torch.zeros(2, 0, 0, dtype=torch.int64)
    assert all(image_scores(nothing, 3, nothing)[name].isnan().all() for name in NEW)


def test_a_panoptic_map_that_does_not_fit():
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"truth has shape \[1, 4, 3\]"):
        pair_labels(truth, panoptic=truth[..., :3])
    with pytest.raises(ValueError, match="labels -3 to 0: expected"):
        pair_labels(truth, panoptic=truth.index_fill(1, torch.tensor([0]), -3))
