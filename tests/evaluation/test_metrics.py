"""Metrics against the official implementation, scikit-learn, and slow definitions that are obviously right."""

import math
import time
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import golden_tensors
from spot_fast.evaluation.metrics import (
    METRICS,
    OVERLAP,
    SIZE_BINS,
    SPOT_METRICS,
    VOID,
    Rules,
    Scores,
    count_overlaps,
    count_pairs,
    image_scores,
    labels_from_soft,
    merge_columns,
    pair_labels,
    scores_of_counts,
)

GOLDEN = ["metrics.*"]


def golden_soft():
    """The golden soft masks [10, K, G, G] as the model gives them, [10, N, K]."""
    return golden_tensors.load("metrics.soft_masks").flatten(2).mT


def golden_truth():
    names = ("ground_truth_instances", "ground_truth_classes", "ignore")
    return [golden_tensors.load(f"metrics.{name}") for name in names]


def random_maps(seed, batch, size, num_pred, num_truth, *, ids=None):
    """Label maps made of blobs, so that masks have sizes and overlaps, and an ignore map."""
    rng = np.random.default_rng(seed)
    pred = labels_from_soft(torch.from_numpy(rng.random((batch, 16, num_pred))), size).long()
    truth = labels_from_soft(torch.from_numpy(rng.random((batch, 25, num_truth))), size).long()
    ignore = torch.from_numpy(rng.random((batch, size, size)) < 0.1)
    if ids is not None:
        truth = torch.as_tensor(ids)[truth]
    return pred, truth, ignore


def slow_scores(pred, num_pred, truth, ignore):
    """mBO, mIoU and FG-ARI of one image with a boolean map per mask and brute force over matchings."""
    valid = ~ignore
    preds = [(pred == k) & valid for k in range(num_pred)]
    objects = [m for j in truth.unique().tolist() if j and (m := (truth == j) & valid).any()]
    iou = [[int((p & o).sum()) / int((p | o).sum()) for p in preds] for o in objects]
    foreground = (truth > 0) & valid
    ari = adjusted_rand_score(truth[foreground], pred[foreground])
    if not objects:
        return math.nan, math.nan, ari
    mbo = sum(max(row) for row in iou) / len(objects)
    rows, columns = range(len(objects)), range(num_pred)
    if len(objects) <= num_pred:
        best = max(sum(iou[j][k] for j, k in enumerate(p)) for p in permutations(columns, len(objects)))
    else:
        best = max(sum(iou[j][k] for k, j in enumerate(p)) for p in permutations(rows, num_pred))
    return mbo, best / len(objects), ari


def test_golden_labels():
    labels = labels_from_soft(golden_soft(), 320)
    assert labels.dtype == torch.uint8
    determined = ~golden_tensors.load("metrics.near_tie")
    golden_tensors.assert_close("metrics.predicted_labels", labels.long(), where=determined)


def test_golden_scores():
    instances, classes, ignore = golden_truth()
    pred = golden_tensors.load("metrics.predicted_labels").long()
    scores = Scores()
    for part in (slice(0, 1), slice(1, 6), slice(6, 10)):
        scores.add(pred[part], 7, instances[part], classes[part], ignore[part])
    per_image = torch.stack([scores.per_image()[name] for name in SPOT_METRICS], 1)
    golden_tensors.assert_close("metrics.per_image_counted", (~per_image.isnan()).long())
    golden_tensors.assert_close("metrics.per_image", per_image.nan_to_num(0), atol=1e-14)
    golden_tensors.assert_close("metrics.all_images_counted", torch.tensor([scores.counted()[m] for m in SPOT_METRICS]))
    golden_tensors.assert_close(
        "metrics.all_images", torch.tensor([scores.result()[m] for m in SPOT_METRICS], dtype=torch.float64), atol=1e-14
    )


@pytest.mark.parametrize("num_pred, num_truth", [(1, 2), (2, 6), (5, 4), (6, 6)])
def test_against_boolean_masks(num_pred, num_truth):
    ids = [0, *np.linspace(3, 255, num_truth - 1).astype(int)]
    pred, truth, ignore = random_maps(num_pred, 3, 24, num_pred, num_truth, ids=ids)
    scores = image_scores(pred, num_pred, truth, truth, ignore)
    for b in range(3):
        mbo, miou, ari = slow_scores(pred[b], num_pred, truth[b], ignore[b])
        got = [scores[name][b].item() for name in SPOT_METRICS]
        assert got == pytest.approx([mbo, mbo, miou, ari], abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 40),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_ari_is_sklearns_on_foreground(num_pred, num_truth, pixels, noise, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_truth, pixels)
    pred = np.where(rng.random(pixels) < noise, rng.integers(0, num_pred, pixels), truth % num_pred)
    maps = [torch.from_numpy(x).view(1, 1, pixels) for x in (pred, truth)]
    foreground = truth > 0
    expected = adjusted_rand_score(truth[foreground], pred[foreground])
    assert image_scores(maps[0], num_pred, maps[1])["fg_ari"].item() == pytest.approx(expected, abs=1e-12)


def test_ari_of_one_pixel_and_of_none_is_one():
    pred = torch.zeros(2, 4, 4, dtype=torch.int64)
    truth = pred.clone()
    truth[1, 0, 0] = 1
    assert image_scores(pred, 3, truth)["fg_ari"].tolist() == [1.0, 1.0]


def test_pair_counts_do_not_overflow_at_320():
    """Two halves against two halves: 51,200² / 2 pairs each, whose product needs 62 bits and more."""
    pred = torch.zeros(1, 320, 320, dtype=torch.uint8)
    pred[:, 160:] = 1
    truth = pred + 1
    assert image_scores(pred, 2, truth)["fg_ari"].item() == 1.0
    crossed = truth.mT.contiguous()
    expected = adjusted_rand_score(crossed.flatten(), pred.flatten())
    assert image_scores(pred, 2, crossed)["fg_ari"].item() == pytest.approx(expected, abs=1e-12)
    # The same with numbers that a calculator gives: s = 4 C(25600, 2), a = b = 2 C(51200, 2), t = C(102400, 2).
    s, a, t = 4 * math.comb(25600, 2), 2 * math.comb(51200, 2), math.comb(102400, 2)
    assert expected == pytest.approx((s - a * a / t) / (a - a * a / t), abs=1e-12)


def test_ignored_pixels_leave_both_sides():
    pred, truth, ignore = random_maps(1, 2, 40, 5, 4)
    scores = image_scores(pred, 5, truth, truth, ignore)
    noise = torch.from_numpy(np.random.default_rng(2).integers(0, 4, truth.shape))
    other_pred, other_truth = torch.where(ignore, noise, pred), torch.where(ignore, noise, truth)
    again = image_scores(other_pred, 5, other_truth, truth, ignore.int() * 7)
    assert all(torch.equal(scores[name], again[name]) for name in (*SPOT_METRICS, "ari"))


def test_perfect_prediction():
    truth = random_maps(3, 2, 40, 3, 5)[1]
    scores = image_scores(truth, 5, truth)
    assert scores["mbo_i"].tolist() == scores["miou"].tolist() == scores["fg_ari"].tolist() == [1.0, 1.0]


def test_images_without_masks_are_left_out_of_overlaps_only():
    pred = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth[0, :4], pred[0, :2] = 1, 1
    scores = Scores()
    scores.add(pred, 2, truth)
    assert scores.counted() == {"mbo_i": 1, "mbo_c": 0, "miou": 1, "fg_ari": 2, "ari": 2, "p_ari": 0, "pq": 2}
    result = scores.result()
    assert result["mbo_i"] == result["miou"] == 0.5
    assert result["fg_ari"] == 0.5 and result["mbo_c"] is None


def test_nothing_added():
    assert Scores().result() == dict.fromkeys(METRICS)


def test_batching_changes_nothing():
    pred, truth, ignore = random_maps(4, 5, 32, 6, 5)
    whole = image_scores(pred, 6, truth, truth, ignore)
    for b in range(5):
        part = slice(b, b + 1)
        one = image_scores(pred[part], 6, truth[part], truth[part], ignore[part])
        assert all(torch.equal(one[name].nan_to_num(-1), whole[name][part].nan_to_num(-1)) for name in METRICS)


def test_count_overlaps_are_counts():
    pred, truth, ignore = random_maps(5, 2, 16, 3, 4, ids=[0, 2, 9, 255])
    counts = count_overlaps(pred, 3, truth, ignore)
    assert counts.dtype == torch.int64 and counts.shape == (2, 3, 256)
    for b in range(2):
        for k in range(3):
            for j in (0, 2, 9, 255, 17):
                assert counts[b, k, j] == ((pred[b] == k) & (truth[b] == j) & ~ignore[b]).sum()


@pytest.mark.parametrize("grid, size, num_masks", [(1, 5, 3), (8, 64, 6), (14, 128, 24), (14, 320, 7), (16, 11, 2)])
def test_labels_from_soft_is_interpolate_and_argmax(grid, size, num_masks):
    masks = torch.rand(3, grid * grid, num_masks, generator=torch.Generator().manual_seed(grid))
    maps = masks.mT.reshape(3, num_masks, grid, grid)
    expected = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(labels_from_soft(masks, size).long(), expected)


def test_labels_take_the_first_of_equals():
    assert labels_from_soft(torch.ones(2, 16, 5), 8).unique().tolist() == [0]


def test_labels_of_hard_maps_at_their_own_size():
    labels = torch.arange(16) % 5
    assert labels_from_soft(F.one_hot(labels, 5)[None].bfloat16(), 4).flatten().tolist() == labels.tolist()


def test_empty_batch():
    assert labels_from_soft(torch.empty(0, 16, 3), 8).shape == (0, 8, 8)
    empty = torch.empty(0, 8, 8, dtype=torch.int64)
    assert all(len(values) == 0 for values in image_scores(empty, 3, empty, empty, empty).values())


MAP = torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: labels_from_soft(torch.rand(2, 15, 3), 8), "15 tokens"),
        (lambda: labels_from_soft(torch.rand(2, 16, 257), 8), "K of 1 to 256"),
        (lambda: pair_labels(MAP - 3), "labels -3 to -3: expected 0"),
        (lambda: pair_labels(MAP, MAP[:1]), r"truth has shape \[1, 8, 8\]"),
        (lambda: labels_from_soft(torch.rand(2, 3, 4, 4), 8), r"\[2, 3, 4, 4\]: expected \[B, N, K\]"),
        (lambda: labels_from_soft(torch.rand(2, 16, 3), 0), "size is 0"),
        (lambda: labels_from_soft(torch.full((2, 16, 3), math.nan), 8), "NaN"),
        (lambda: image_scores(MAP, 3, MAP[:, :4]), r"truth has shape \[2, 4, 8\]"),
        (lambda: image_scores(MAP, 3, MAP, MAP[0]), r"truth has shape \[8, 8\]"),
        (lambda: image_scores(MAP, 3, MAP, None, MAP[:1]), r"ignore has shape \[1, 8, 8\]"),
        (lambda: image_scores(MAP.float(), 3, MAP), "pred is torch.float32"),
        (lambda: image_scores(MAP + 3, 3, MAP), "pred has labels 3 to 3, but num_pred is 3"),
        (lambda: image_scores(MAP - 1, 3, MAP), "pred has labels -1 to -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 2, 9, 255], [3, 3, 5, 7]])
def test_pairs_hold_both_maps(dtype, ids):
    _, instances, ignore = random_maps(6, 3, 16, 2, 4, ids=ids)
    classes = random_maps(7, 3, 16, 2, 3, ids=[0, 80, 7])[1]
    pairs = pair_labels(instances.to(dtype), classes.to(dtype), ignore)
    at = pairs.labels.long().flatten(1)
    for found, expected in ((pairs.instances, instances), (pairs.classes, classes)):
        assert torch.equal(found.gather(1, at).view(3, 16, 16), expected.masked_fill(ignore, VOID))
    number = pairs.instances.shape[1]
    assert number == max(
        torch.stack([i, c]).masked_fill(m, VOID).flatten(1).unique(dim=1).shape[1]
        for i, c, m in zip(instances, classes, ignore, strict=True)
    )


def test_more_pairs_than_fit_16_bits():
    """Every pixel of another pair: 256 × 256."""
    instances = torch.arange(256).expand(1, 256, 256)
    pairs = pair_labels(instances, instances.mT)
    assert pairs.labels.dtype == torch.int64 and pairs.labels.unique().numel() == 2**16
    scores = scores_of_counts(count_pairs(torch.zeros(1, 256, 256, dtype=torch.uint8), 1, pairs), pairs)
    assert scores["mbo_i"].item() == scores["mbo_c"].item() == pytest.approx(256 / 2**16)


def test_one_count_gives_the_tables_of_instances_and_of_classes():
    pred, instances, ignore = random_maps(8, 3, 32, 5, 7)
    classes = torch.tensor([0, 4, 4, 9, 1, 9, 4])[instances]
    pairs = pair_labels(instances, classes, ignore)
    counts = count_pairs(pred, 5, pairs)
    for of, labels in ((pairs.instances, instances), (pairs.classes, classes)):
        assert torch.equal(merge_columns(counts, of), count_overlaps(pred, 5, labels, ignore))


def test_merged_overlap_is_a_row_of_its_own():
    counts = torch.tensor([[[3, 2, 4], [1, 0, 5]]])
    merged = merge_columns(counts, torch.tensor([[1, OVERLAP, VOID]]))
    assert merged.tolist() == [[[0, 3], [0, 1], [2, 0]]]
    assert merge_columns(counts, torch.tensor([[1, VOID, 1]])).tolist() == [[[0, 7], [0, 6]]]


def test_sizes_against_loops():
    pred, instances, ignore = random_maps(9, 4, 40, 5, 9)
    scores = Scores()
    for part in (slice(0, 1), slice(1, 4)):
        scores.add(pred[part], 5, instances[part], None, ignore[part])
    bins = [[] for _ in SIZE_BINS[1:]]
    for p, t, ignored in zip(pred, instances, ignore, strict=True):
        for j in t.unique().tolist():
            found = (t == j) & ~ignored
            if j and found.any():
                size = int(found.sum()) / 1600
                (place,) = [i for i in range(8) if SIZE_BINS[i] < size <= SIZE_BINS[i + 1]]
                masks = [(p == k) & ~ignored for k in range(5)]
                bins[place].append(max(int((m & found).sum()) / int((m | found).sum()) for m in masks))
    for (mean, number), expected in zip(scores.by_size(), bins, strict=True):
        assert number == len(expected)
        assert mean is None if not expected else mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert sum(len(b) for b in bins) > 20


@pytest.mark.parametrize(
    "pixels, place",
    [
        (1, 0),
        (8, 0),
        (9, 1),
        (16, 1),
        (17, 2),
        (80, 2),
        (1280, 6),
        (1281, 7),
        (1600, 7),
    ],
)
def test_sizes_at_the_ends_of_the_bins(pixels, place):
    truth = (torch.arange(1600) < pixels).long().view(1, 40, 40)
    counts = image_scores(torch.zeros_like(truth), 1, truth)["size_counts"][0]
    assert counts.nonzero().flatten().tolist() == [place]


def test_speed():
    """Both mask kinds at 320 x 320, from soft masks to all four metrics, in 10 ms an image on one thread."""
    soft = golden_soft()
    instances, classes, ignore = golden_truth()
    seconds = []
    for _ in range(7):
        start = time.process_time()
        truth = pair_labels(instances, classes, ignore)
        for masks in (soft, soft.flip(2)):
            scores_of_counts(count_pairs(labels_from_soft(masks, 320), 7, truth), truth)
        seconds.append((time.process_time() - start) / len(soft))
    assert min(seconds) < 0.010


@pytest.mark.parametrize("scale", [100, 40_000, 2**24])
def test_labels_above_255_are_renumbered(scale):
    """No score depends on the numbers, of instances or of classes; gaps, 0 and ignored pixels stay what they are."""
    pred, truth, ignore = random_maps(8, 3, 24, 4, 6, ids=[0, 1, 2, 3, 4, 5])
    truth[0] += 1  # an image without background
    classes = truth // 2
    large = torch.where(truth > 2, truth * scale, truth)
    for rules in (Rules(), Rules(mbo_background=True, miou_background=True), Rules(cosine=True, per_object=True)):
        for own, others in (
            ((truth, None), (large, None)),
            ((truth, classes), (large, classes * scale)),
            ((truth, classes), (truth, classes * scale)),
        ):
            expected, found = (image_scores(pred, 4, *maps, ignore, rules) for maps in (own, others))
            assert all(torch.equal(found[name].nan_to_num(-1), expected[name].nan_to_num(-1)) for name in expected)


def test_as_many_labels_as_pixels():
    """Noise for masks costs no more memory than its pairs, with classes as many as instances."""
    side = 128
    truth = torch.arange(2 * side * side).view(2, side, side)
    pairs = pair_labels(truth, truth.flip(0) + 7)
    assert pairs.instances.shape == (2, side * side)
    assert torch.equal(pairs.labels.long().flatten(1)[0], torch.arange(side * side))
    scores = image_scores(torch.zeros_like(truth), 1, truth, truth)
    assert scores["objects"].tolist() == [side * side - 1, side * side]


def test_hidden_labels_stay_beside_large_ones():
    truth = torch.tensor([[[VOID, OVERLAP], [0, 70_000]]])
    pairs = pair_labels(truth, truth)
    assert sorted(zip(pairs.instances[0].tolist(), pairs.classes[0].tolist(), strict=True)) == [
        (OVERLAP, OVERLAP),
        (VOID, VOID),
        (0, 0),
        (1, 1),
    ]
