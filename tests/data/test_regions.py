"""COCO's regions: what pycocotools draws is drawn the same, and nothing that would take its memory reaches it."""

import math
import resource

import numpy as np
import pytest
from pycocotools import mask as rle

from spot_fast.data.masks.regions import decode_segmentation

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 3, 12, 3, 12, 9, 2, 9]


@pytest.fixture(autouse=True)
def little_memory():
    """A polygon that slips through ends its test and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def of_size(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


def test_run_lengths_are_drawn_as_pycocotools_draws_them():
    """Both forms, of masks with few and with many runs, from one pixel on."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 70, 2))
        mask = (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
        mask[: height // 2] |= mask[: height // 2, ::-1] & 1
        compressed = rle.encode(np.asfortranarray(mask))["counts"].decode()
        flat = mask.flatten(order="F")
        starts = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
        counts = [0] * int(flat[0]) + np.diff(starts).tolist()
        for form in (compressed, compressed.encode(), counts, [float(count) for count in counts]):
            assert np.array_equal(decode_segmentation(of_size(form, (height, width)), height, width), mask)


def test_large_run_lengths():
    """Runs of six digits, as in a photo of 24 megapixels."""
    mask = np.zeros((4000, 6000), np.uint8)
    mask[100:3900, 2000:5900] = 1
    compressed = rle.encode(np.asfortranarray(mask))["counts"].decode()
    assert np.array_equal(decode_segmentation(of_size(compressed, mask.shape), *mask.shape), mask)


@pytest.mark.parametrize(
    "polygons",
    [
        [SQUARE],
        [[float(c) for c in SQUARE]],
        [SQUARE, [20, 1, 28, 1, 28, 15]],
        [[-3.5, -2, 40, -2, 40, 9, -3.5, 9]],
        [[str(c) for c in SQUARE]],
        [[5, 5, 5, 5, 5, 5]],
    ],
)
def test_polygons_are_drawn_as_pycocotools_draws_them(polygons):
    """Slightly outside too, as some of COCO's are; numbers may be written as text."""
    expected = rle.decode(rle.merge(rle.frPyObjects(polygons, HEIGHT, WIDTH)))
    assert np.array_equal(decode_segmentation(polygons, HEIGHT, WIDTH), expected)


@pytest.mark.parametrize("nothing", [None, [], [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[math.nan] * 4]])
def test_fewer_than_three_points_draw_nothing(nothing):
    """Neither alone nor beside a whole polygon, whichever is first."""
    assert not decode_segmentation(nothing, HEIGHT, WIDTH).any()
    alone = decode_segmentation([SQUARE], HEIGHT, WIDTH)
    for together in ([SQUARE, *(nothing or [])], [*(nothing or []), SQUARE]):
        assert np.array_equal(decode_segmentation(together, HEIGHT, WIDTH), alone)


FAR = 10**7
BAD_POLYGONS = [
    ([2, 3, math.nan, 3, 12, 9, 2, 9], "the coordinate nan"),
    ([2, 3, math.inf, 3, 12, 9, 2, 9], "the coordinate inf"),
    ([2, 3, -math.inf, 3, 12, 9, 2, 9], "the coordinate -inf"),
    ([2, 3, 1e300, 3, 12, 9, 2, 9], r"the coordinate 1e\+300"),
    ([1e300] * 8, r"the coordinate 1e\+300"),
    ([2, 3, FAR, 3, 12, 9, 2, 9], r"the coordinate 1e\+07"),
    ([2, 3, -FAR, 3, 12, 9, 2, 9], r"the coordinate -1e\+07"),
    ([2, 3, 10**400, 3, 12, 9], "expected a list of x, y"),
    ([4000, 0, -4000, 0] * 50, "outline is longer"),
    ([2, 3, 12, 3, 12, 9, 2], "7 coordinates"),
    ([2, 3, 12, 3, 12, "x"], "expected a list of x, y"),
    ([2, 3, 12, 3, 12, None], "expected a list of x, y"),
    ([2, 3, 12, 3, 12, {}], "expected a list of x, y"),
    ([[2, 3], [12, 3], [12, 9], [2, 9], [2, 9], [2, 9]], "expected a list of x, y"),
    ([True] * 6, "expected a list of x, y"),
    ({"x": 1}, "expected a list of x, y"),
    (5, "expected a list of x, y"),
    ("1 2 3 4 5 6", "expected a list of x, y"),
]


@pytest.mark.parametrize("polygon, message", BAD_POLYGONS)
def test_polygons_that_cannot_be_drawn(polygon, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation([SQUARE, polygon], HEIGHT, WIDTH)


PIXELS = HEIGHT * WIDTH


@pytest.mark.parametrize(
    "region, message",
    [
        (of_size([0, 500]), "add up to 500 of 600 pixels"),
        (of_size([0, 601]), "a run length is 601"),
        (of_size([300, 301]), "add up to 601 of 600"),
        (of_size([]), "add up to 0 of 600"),
        (of_size([700, -100]), "a run length is -100"),
        (of_size([1 << 32, PIXELS]), "a run length is 4294967296"),
        (of_size([10**30, PIXELS]), "expected whole numbers"),
        (of_size([599.5, 0.5]), "expected whole numbers"),
        (of_size([math.nan, PIXELS]), "expected whole numbers"),
        (of_size(["600"]), "expected whole numbers"),
        (of_size([[600]]), "expected whole numbers"),
        (of_size([True, 599]), None),
        (of_size([False] * 3), "expected whole numbers"),
        (of_size(""), "not COCO's compressed form"),
        (of_size("é"), "not COCO's compressed form"),
        (of_size("\u0660\u0661"), "not COCO's compressed form"),
        (of_size("a b"), "not COCO's compressed form"),
        (of_size("hT"), "not COCO's compressed form"),
        (of_size("o" * 40 + "0"), "larger than any image"),
        (of_size("0"), "add up to 0 of 600"),
        (of_size("O"), "a run length is -1"),
        (of_size(None), "expected a list or a string"),
        (of_size(7), "expected a list or a string"),
        ({"size": [HEIGHT, WIDTH]}, "expected a list or a string"),
        ({"counts": [PIXELS]}, "the size of the run lengths is None"),
        (of_size([PIXELS], (WIDTH, HEIGHT)), "is 20 x 30, the image is 30 x 20"),
        (of_size([PIXELS], (str(HEIGHT), str(WIDTH))), "the image is 30 x 20"),
        (of_size([PIXELS], (10**9, 10**9)), "the image is 30 x 20"),
        ("some text", "expected polygons or run lengths"),
        (3, "expected polygons or run lengths"),
        (True, "expected polygons or run lengths"),
    ],
)
def test_run_lengths_that_do_not_fill_the_image(region, message):
    """They would leave the rest of the mask to whatever lies in memory."""
    if message is None:
        assert decode_segmentation(region, HEIGHT, WIDTH).sum() == 599
        return
    with pytest.raises(ValueError, match=message):
        decode_segmentation(region, HEIGHT, WIDTH)


def test_garbage_is_refused_or_fills_the_image():
    """Any text at all, and a valid one with a character changed."""
    rng = np.random.default_rng(1)
    valid = rle.encode(np.asfortranarray(rng.integers(0, 2, (HEIGHT, WIDTH)).astype(np.uint8)))["counts"].decode()
    for _ in range(300):
        text = "".join(map(chr, rng.integers(32, 130, rng.integers(1, 30))))
        place = rng.integers(len(valid))
        for counts in (text, valid[:place] + text[0] + valid[place + 1 :], valid[:place]):
            try:
                assert decode_segmentation(of_size(counts), HEIGHT, WIDTH).shape == (HEIGHT, WIDTH)
            except ValueError:
                pass
