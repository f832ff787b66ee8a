"""Masks of windows become segments of the image, whatever the windows call their slots."""

import pytest
import torch
import torch.nn.functional as F

from spot_fast.segmentation.layouts import Layout
from spot_fast.segmentation.stitching import stitch

CORNERS = tuple((top, left) for top in (0, 4) for left in (0, 4, 8))
LAYOUT = Layout((12, 16), (8, 8), CORNERS, tiled=True)


def windows(truth, slots, *, seed=0, sharpness=20.0):
    """Soft masks [W, 64, slots] that windows of LAYOUT see of a label map [12, 16], each with its own numbering."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for top, left in CORNERS:
        part = truth[top : top + 8, left : left + 8].reshape(-1)
        renamed = torch.randperm(slots, generator=generator)[part]
        noise = torch.randn(64, slots, generator=generator)
        parts.append((sharpness * F.one_hot(renamed, slots) + noise).softmax(-1))
    return torch.stack(parts)


def same_partition(a, b):
    pairs = set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return len(pairs) == len(set(a.flatten().tolist())) == len(set(b.flatten().tolist()))


def things():
    truth = torch.zeros(12, 16, dtype=torch.int64)
    truth[2:7, 3:13] = 1  # wider than a window
    truth[8:11, 1:4] = 2
    truth[9:12, 12:15] = 3
    return truth


@pytest.mark.parametrize("seed", range(4))
def test_things_larger_than_a_window_are_one_segment(seed):
    masks = windows(things(), 5, seed=seed)
    found = stitch({"decoder": masks, "slots": masks}, LAYOUT)
    assert same_partition(found.masks["decoder"].argmax(-1), things())
    assert torch.equal(found.masks["decoder"], found.masks["slots"])


def test_segments_are_numbered_by_size_and_sum_to_one():
    found = stitch({"decoder": windows(things(), 4)}, LAYOUT)
    soft = found.masks["decoder"]
    sizes = soft.argmax(-1).bincount()
    assert len(sizes) == soft.shape[1] == 4 and sizes[0] == sizes.max()
    assert soft.min() >= 0 and (soft.sum(-1) <= 1 + 1e-5).all()
    assert found.segments.shape == (6, 4) and found.segments.max() == 3


def test_numbering_of_slots_and_order_of_windows_do_not_matter():
    masks = windows(things(), 5)
    first = stitch({"decoder": masks}, LAYOUT).masks["decoder"]
    order = [3, 5, 0, 1, 4, 2]
    layout = Layout(LAYOUT.grid, LAYOUT.window, tuple(CORNERS[i] for i in order), tiled=True)
    renamed = torch.stack([masks[i][:, torch.randperm(5, generator=torch.Generator().manual_seed(i))] for i in order])
    torch.testing.assert_close(stitch({"decoder": renamed}, layout).masks["decoder"], first)


def test_two_slots_of_a_window_never_become_one():
    """Windows that see one thing whole and in halves: the halves stay apart where a window tells them apart."""
    masks = windows(things(), 5, sharpness=2.0, seed=7)  # nearly noise: matches of all kinds
    segments = stitch({"decoder": masks}, LAYOUT).segments
    for window in segments:
        kept = window[window >= 0]
        assert len(kept.unique()) == len(kept)


def test_one_window_keeps_its_masks():
    masks = windows(things(), 3 + 1)[:1]
    layout = Layout((8, 8), (8, 8), tiled=True)
    found = stitch({"decoder": masks}, layout)
    numbers = found.segments[0]
    kept = numbers >= 0
    torch.testing.assert_close(found.masks["decoder"][:, numbers[kept]], masks[0][:, kept])
