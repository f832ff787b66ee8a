"""Colours of segments: distinct, and the same for about the same segments."""

import numpy as np

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data import Scenes
from spot_fast.evaluation.baselines import kmeans_labels
from spot_fast.model.encoder import normalise
from spot_fast.segmentation.colours import GREY, anchors, palette, segment_colours


def test_colours_are_distinct_and_stable():
    colours = palette(256)
    assert len({tuple(c) for c in colours.tolist()}) == 256
    assert np.array_equal(palette(7), colours[:7])
    near = np.linalg.norm(colours[:12, None].astype(float) - colours[None, :12], axis=-1)
    assert near[~np.eye(12, dtype=bool)].min() > 60


def test_slot_numbers_do_not_change_colours():
    rng = np.random.default_rng(0)
    for _ in range(5):
        labels = rng.integers(0, 5, (3, 4), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        renamed = rng.permutation(256).astype(np.uint8)[labels]
        assert np.array_equal(segment_colours(labels)[labels], segment_colours(renamed)[renamed])


def test_the_rows_are_the_palette_for_one_label_and_for_256():
    for labels in (np.zeros((1, 1), np.uint8), np.arange(256, dtype=np.uint8).reshape(16, 16)):
        assert {tuple(c) for c in segment_colours(labels).tolist()} == {tuple(c) for c in palette().tolist()}


def test_the_surrounding_segment_is_grey():
    labels = np.zeros((10, 10), np.uint8)
    labels[3:6, 3:6], labels[:, 8:] = 1, 2
    colours = segment_colours(labels)
    assert tuple(colours[0]) == GREY and tuple(colours[1]) != GREY != tuple(colours[2])


def test_anchors_are_distinct_and_inside_the_image():
    for count in (7, 12, 255):
        assert len(np.unique(anchors(count).round(4), axis=0)) == count
        assert anchors(count).min() > 0 and anchors(count).max() < 1


def test_two_seeds_agree_nearly_as_far_as_their_segments_do():
    """Of the patches whose cluster recurs with another seed most keep their colour, unlike their label."""
    encoder = frozen_encoder(preset("scenes"))
    features = encoder(normalise(Scenes(60, "val", size=96).images))
    one, other = (kmeans_labels(features, 6, seed).view(-1, 12, 12).numpy().astype(np.uint8) for seed in (0, 1))
    coloured = [np.stack([segment_colours(labels)[labels] for labels in maps]) for maps in (one, other)]
    kept = (coloured[0] == coloured[1]).all(-1).mean()
    could = np.mean([_matched(a, b) for a, b in zip(one, other, strict=True)])
    assert kept > 0.7 * could and (one == other).mean() < 0.4 * could


def _matched(one, other):
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((6, 6))
    np.add.at(counts, (one.ravel(), other.ravel()), 1)
    return counts[linear_sum_assignment(-counts)].sum() / one.size
