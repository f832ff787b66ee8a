"""Data of a report: logs cut by a crash, the choice of images, pace."""

import json
import math

import pytest
import torch

from spot_fast.checkpoints.runs import METRICS
from spot_fast.evaluation.scoring import Evaluation, Row, Table
from spot_fast.reporting.records import RunRecord, SetRecord, choose_images, read_log, state_metadata, values_of


class Images:
    """An image set with a length and labels alone."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def label(self, index):
        return f"image {index}"


def evaluation(scores, indices=None):
    values = torch.tensor(scores, dtype=torch.float64)
    worse = Row("decoder", {}, {}, 3, orders=1, per_image={"mbo_i": -values})
    row = Row("decoder", {}, {}, 3, orders=9, per_image={"mbo_i": values})
    indices = list(range(len(scores))) if indices is None else indices
    return Evaluation([Table("spot", 32, [worse, row])], len(scores), "images", {}, indices=indices)


def by_reason(chosen):
    return {why: [c.index for c in chosen if c.why == why] for why in ("best", "median", "worst", "random")}


def test_best_median_worst_and_random_by_the_decoder_masks_of_all_orders():
    scores = [math.nan, *(i / 20 for i in range(20))]
    chosen = choose_images(Images(21), [evaluation(scores)], each=3, seed=0)
    indices = by_reason(chosen)
    assert indices["best"] == [20, 19, 18] and indices["worst"] == [1, 2, 3]
    assert sorted(indices["median"]) == [10, 11, 12]
    assert len(indices["random"]) == 3 and len({c.index for c in chosen}) == 12 and 0 not in {c.index for c in chosen}
    assert chosen[0].score == pytest.approx(0.95) and chosen[0].label == "image 20"
    assert by_reason(choose_images(Images(21), [evaluation(scores)], each=3, seed=1))["random"] != indices["random"]


def test_several_runs_choose_by_their_mean():
    one, other = [0.9, 0.0, 0.5, 0.1], [0.0, 0.0, 0.6, 0.1]
    chosen = choose_images(Images(4), [evaluation(one), evaluation(other)], each=1, seed=0)
    assert by_reason(chosen) == {"best": [2], "median": [0], "worst": [1], "random": [3]}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_image_is_shown_twice_in_a_small_set(count):
    chosen = choose_images(Images(count), [evaluation([i / 10 for i in range(count)])], each=3, seed=0)
    assert len(chosen) == len({c.index for c in chosen}) == min(count, 4)


def test_unreadable_images_shift_no_score():
    chosen = choose_images(Images(6), [evaluation([0.1, 0.9, 0.5], indices=[1, 3, 5])], each=1, seed=0)
    assert by_reason(chosen)["best"] == [3] and by_reason(chosen)["worst"] == [1]


def test_without_scores_images_are_drawn():
    chosen = choose_images(Images(50), [], each=2, seed=0, limit=10)
    assert len(chosen) == 4 and all(c.why == "random" and c.score is None and c.index < 10 for c in chosen)
    assert len(choose_images(Images(3), [], each=2, seed=0)) == 3


def test_a_log_cut_by_a_crash_is_read_as_far_as_it_goes(tmp_path):
    lines = [
        {"kind": "train", "step": 4, "loss": 0.5},
        {"kind": "epoch", "step": 6, "images_per_s": 90.0},
        {"kind": "train", "step": 8, "loss": None},
        {"kind": "validation", "step": 8, "val_loss": 0.1},
        {"kind": "skipped", "step": 8, "steps": [5, 7]},
        {"kind": "else", "step": 8},
        {"kind": "train"},
        3,
    ]
    (tmp_path / METRICS).write_bytes("\n".join(map(json.dumps, lines)).encode() + b'\n{"kind": "train", "st\xff')
    log = read_log(tmp_path)
    assert values_of(log.train, "loss") == [0.5, None] and values_of(log.train, "lr") == [None, None]
    assert len(log.epoch) == len(log.validation) == 1 and log.skipped == [5, 7] and log
    assert not read_log(tmp_path / "nowhere") and state_metadata(tmp_path) == {}


def test_pace_is_the_median_of_the_log(tmp_path):
    lines = [{"kind": "train", "step": i, "images_per_s": pace} for i, pace in enumerate((10.0, 300.0, 310.0))]
    (tmp_path / METRICS).write_text("\n".join(map(json.dumps, lines)))
    assert RunRecord("a", None, read_log(tmp_path), {}).pace == 300
    assert RunRecord("a", None, read_log(tmp_path / "nowhere"), {}).pace is None


def test_of_runs_that_differ_only_in_their_seed_one_is_distinct():
    assert SetRecord(None, [0, 1, 2, 4, 5], [[0, 2], [1, 5]]).distinct == [0, 1, 4]
