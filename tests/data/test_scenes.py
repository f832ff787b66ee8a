"""Protects the generated data set: same images for a seed and index, exact masks, disjoint splits, speed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from spot_fast.config import preset
from spot_fast.data import open_sets
from spot_fast.data.datasets.scenes import CLASSES, MAX_HIDDEN, MAX_OBJECTS, MIN_AREA, MIN_OBJECTS, Scenes, draw_scenes


def test_an_image_depends_on_seed_and_index_only():
    together = draw_scenes(0, np.arange(150), 64)
    for one in (3, 64, 149):
        alone = draw_scenes(0, np.array([one]), 64)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[one], b[0])
    other = draw_scenes(1, np.arange(3), 64)
    assert not np.array_equal(together[0][:3], other[0])


def test_counts_sizes_and_classes_are_as_promised():
    _, instances, classes = draw_scenes(0, np.arange(400), 64)
    counts = [len(np.unique(m)) - 1 for m in instances]
    assert min(counts) >= MIN_OBJECTS and max(counts) == MAX_OBJECTS
    assert all(m.max() == count for m, count in zip(instances, counts, strict=True)), "identifiers have gaps"
    areas = [np.bincount(m.ravel())[1:] / m.size for m in instances]
    assert min(a.min() for a in areas) >= MIN_AREA
    assert set(np.unique(classes)) == set(range(len(CLASSES) + 1))
    for m, c in zip(instances, classes, strict=True):
        assert ((m > 0) == (c > 0)).all()
        for k in range(1, m.max() + 1):
            assert len(np.unique(c[m == k])) == 1, "one object has one class"


def test_no_object_is_mostly_hidden():
    """Checked on the outlines themselves: an object's visible part against its area drawn alone."""
    from spot_fast.data.datasets import scenes

    instances, layers, _ = scenes._place_objects(0, np.arange(60), 64)
    axis = (np.arange(64, dtype=np.float32) + 0.5) / 64
    x, y = np.tile(axis, 64), np.repeat(axis, 64)
    for image, draws in zip(instances, layers, strict=True):
        for k in range(1, image.max() + 1):
            d = draws[k]
            radius = scenes.RADIUS[0] + (scenes.RADIUS[1] - scenes.RADIUS[0]) * d[2]
            centre = radius * 0.6 + d[:2] * (1 - 1.2 * radius)
            turn = (np.arctan2(y - centre[1], x - centre[0]) / (2 * np.pi) + d[4]) % 1.0
            table = scenes._OUTLINES[int(d[3] * len(CLASSES))]
            whole = (np.hypot(x - centre[0], y - centre[1]) < radius * table[(turn * 512).astype(int)]).sum()
            assert (image == k).sum() >= (1 - MAX_HIDDEN) * whole - 3  # a few pixels of float rounding on the rim


def test_half_of_the_objects_look_like_the_one_before():
    """Of one class then, by chance an eighth of the others too; and objects are darker at their outline than inside."""
    images, instances, classes = draw_scenes(0, np.arange(600), 64)
    same, inside, rim = [], [], []
    for image, m, c in zip(images.astype(float), instances, classes, strict=True):
        kinds = [c[m == k][0] for k in range(1, m.max() + 1)]
        same += [one == other for one, other in itertools.pairwise(kinds)]
        front = m == m.max()  # nothing hides it
        edge = front & ~(np.roll(front, 1, 0) & np.roll(front, -1, 0) & np.roll(front, 1, 1) & np.roll(front, -1, 1))
        inside.append(image[front & ~edge].mean())
        rim.append(image[edge].mean())
    # a half, and an eighth of the rest
    assert 0.5 < np.mean(same) < 0.65
    assert np.mean(rim) < 0.85 * np.mean(inside)


def test_train_and_val_share_no_image():
    train, val = Scenes(500, "train"), Scenes(500, "val")
    seen = {bytes(image.numpy().tobytes()) for image in train.images}
    assert len(seen) == 500
    assert not any(bytes(image.numpy().tobytes()) in seen for image in val.images)


def test_objects_differ_from_what_is_around_them():
    """Every object must be visible: its colours differ from the ground's by more than the image's rounding."""
    images, instances, _ = draw_scenes(0, np.arange(200), 64)
    distance = [
        np.abs(image[m == k].mean(0) - image[m == 0].mean(0)).max()
        for image, m in zip(images.astype(float), instances, strict=True)
        for k in range(1, m.max() + 1)
    ]
    assert np.median(distance) > 40 and np.mean(np.array(distance) < 5) < 0.02


def test_interface_of_the_data_set():
    config = preset("scenes", train_images=5, val_images=7)
    train, val = open_sets(config)
    assert (len(train), len(val)) == (5, 7) and not train.flip and not train.random_crop
    assert val.has_masks and val.has_classes
    masks = val.val_masks(2)
    assert val.val_image(2).shape == (3, config.image_size, config.image_size)
    assert masks.instances.shape == masks.classes.shape == (config.mask_size, config.mask_size)
    assert masks.instances.dtype == torch.int64 and val.label(2) == "val scene 2"
    assert len(Scenes(0, "val")) == 0


@pytest.mark.parametrize("arguments", [dict(split="test"), dict(split="val", mask_size=320)])
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(k for k in ("mask_size", "split") if k in arguments)):
        Scenes(1, **arguments)


def test_speed_is_at_least_300_images_a_second_on_one_core():
    draw_scenes(0, np.arange(64), 64)
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        draw_scenes(0, np.arange(256), 64)
        best = max(best, 256 / (time.process_time() - start))
    assert best >= 300, f"{best:.0f} images/s"
