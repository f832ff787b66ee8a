"""Average recall: the same numbers as pycocotools' COCOeval on the same masks, and mask scores by their definition."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spot_fast.evaluation.metrics import Scores, count_pairs, pair_labels, scores_of_counts
from spot_fast.evaluation.recall import mask_scores

SIDE = 24


def regions(labels, values):
    for value in values:
        mask = np.asfortranarray(labels == value, dtype=np.uint8)
        if mask.any():
            yield value, {**rle.encode(mask)}, int(mask.sum())


def coco_recall(predicted, truth, confidence):
    """AR@1, 10 and 100 of label maps [B, H, W] by COCOeval; truth's objects are its labels above 0."""
    images = [{"id": i, "width": SIDE, "height": SIDE} for i in range(len(truth))]
    objects, found = [], []
    for i, (of_image, of_truth) in enumerate(zip(predicted.numpy(), truth.numpy(), strict=True)):
        for _, segmentation, area in regions(of_truth, range(1, of_truth.max() + 1)):
            box = {"bbox": rle.toBbox(segmentation).tolist(), "area": area, "iscrowd": 0}
            objects.append(
                {"id": len(objects) + 1, "image_id": i, "category_id": 1, "segmentation": segmentation, **box}
            )
        for k, segmentation, _ in regions(of_image, range(confidence.shape[1])):
            score = float(confidence[i, k])
            found.append({"image_id": i, "category_id": 1, "segmentation": segmentation, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "object"}]}
        theirs.createIndex()
        scored = COCOeval(theirs, theirs.loadRes(found), "segm")
        scored.params.useCats = 0
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored.stats[6:9].tolist()


def blurred(labels, share, generator):
    """Label maps of which a share of the pixels got another label: overlaps of every size."""
    other = torch.randint(int(labels.max()) + 1, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, other, labels)


@pytest.mark.parametrize("masks", [1, 7, 24])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_the_same_as_cocoeval(masks, share):
    generator = torch.Generator().manual_seed(masks)
    coarse = torch.randint(masks, (12, 4, 4), generator=generator)
    truth = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)
    truth[0] = 0  # an image without an object
    predicted = blurred((truth + 1) % masks, share, generator)
    confidence = torch.rand(12, masks, generator=generator)
    pairs = pair_labels(truth)
    scores = Scores()
    for part in (slice(0, 5), slice(5, 12)):  # objects are counted over all batches
        of_part = pair_labels(truth[part])
        counts = count_pairs(predicted[part], masks, of_part)
        scores.add_scores(scores_of_counts(counts, of_part, confidence=confidence[part]))
    assert int((pairs.instances > 0).sum()) == 0 or masks > 1
    if masks == 1:  # nothing but background
        assert scores.recall() == [None, None, None]
    else:
        assert scores.recall() == pytest.approx(coco_recall(predicted, truth, confidence), abs=1e-12)


def test_two_objects_that_one_mask_joins_count_once():
    """At an IoU of exactly 0.5 a mask overlaps two objects alike; it finds one."""
    truth = torch.zeros(1, SIDE, SIDE, dtype=torch.int64)
    truth[0, :12], truth[0, 12:] = 1, 2
    predicted, confidence = torch.zeros_like(truth), torch.ones(1, 2)
    pairs = pair_labels(truth)
    scores = Scores()
    scores.add_scores(scores_of_counts(count_pairs(predicted, 2, pairs), pairs, confidence=confidence))
    assert scores.recall() == pytest.approx([0.05] * 3) == coco_recall(predicted, truth, confidence)


def test_masks_without_a_ranking_have_no_recall_where_some_are_cut_off():
    truth = torch.arange(4).repeat_interleave(144).view(1, SIDE, SIDE)
    pairs = pair_labels(truth)
    for predicted, expected in ((truth, [None, 1.0, 1.0]), (torch.ones_like(truth), [0.0, 0.0, 0.0])):
        scores = Scores()
        scores.add_scores(scores_of_counts(count_pairs(predicted, 4, pairs), pairs))
        assert scores.recall() == expected


def test_a_score_is_the_mean_where_the_mask_is_largest():
    masks = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.45, 0.05], [0.05, 0.45, 0.5]])
    assert torch.allclose(mask_scores(masks), torch.tensor([0.6, 0.45, 0.5]))
    assert torch.equal(mask_scores(masks.expand(2, 5, 3, 3)), mask_scores(masks).expand(2, 5, 3))
    assert mask_scores(masks.bfloat16()).dtype == torch.float32
