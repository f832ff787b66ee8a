"""The table of a small untrained model: every row against the same numbers computed the long way."""

import csv
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from small_models import SIZE, Images, small_model
from spot_fast.config import preset
from spot_fast.data.base import Masks
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.errors import UserError
from spot_fast.evaluation import scoring as evaluation
from spot_fast.evaluation.baselines import block_masks, kmeans_labels, published_layouts
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS, Scores, image_scores, labels_from_soft
from spot_fast.evaluation.scoring import Evaluation, Row, Table, evaluate, read_images, slot_noise
from spot_fast.evaluation.tables import (
    evaluation_table,
    mean_rows,
    mean_size_table,
    mean_sizes,
    mean_table,
    seed_groups,
    size_table,
    unlabelled_line,
    used_by_objects,
    used_line,
    write_csv,
)
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import reconstruction_loss
from thread_count import threads


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def scenes():
    return Scenes(10, "val", size=SIZE)


LABELLED = [name for name in METRICS if name != "p_ari"]  # no panoptic annotations here


def scores_of(row):
    return [row.scores[name] for name in LABELLED]


def test_rows_are_what_the_parts_give(model, scenes):
    result = evaluate(model, scenes, batch_size=10, seed=5, progress=False)
    assert [(r.masks, r.orders) for r in result.tables[0].rows] == [
        ("decoder", 1),
        ("decoder", 9),
        ("slots", None),
        ("blocks", None),
        ("kmeans", None),
    ]
    images, instances, classes = normalise(scenes.images), scenes.instances, scenes.classes
    noise = slot_noise(5, range(10), 4, 16)
    first, every = (model.segment(images, orders=orders, noise=noise) for orders in ("0", "all"))
    target = model.encode(images)[1]
    kmeans = F.one_hot(kmeans_labels(target, 4, 5), 4)
    block = block_masks(result.row("blocks").columns, 4, SIZE).expand(10, -1, -1)
    expected = [labels_from_soft(m, SIZE) for m in (first.masks, every.masks, first.slot_attn, kmeans)]
    for row, labels in zip(result.tables[0].rows, [*expected[:3], block, expected[3]], strict=True):
        scores = image_scores(labels, 4, instances, classes)
        assert scores_of(row) == pytest.approx([scores[name].mean().item() for name in LABELLED], abs=1e-12)
        assert row.counted == dict.fromkeys(METRICS, 10) | {"p_ari": 0}
    assert result.images == 10 and result.tables[0].mask_size == SIZE and not result.skipped
    assert result.reconstruction[1] == pytest.approx(reconstruction_loss(first.prediction, target).item(), rel=1e-5)
    assert result.reconstruction[9] == pytest.approx(reconstruction_loss(every.prediction, target).item(), rel=1e-5)
    assert 0 < result.metric_seconds_per_image < result.seconds_per_image


def test_block_masks_are_the_best_columns(model, scenes):
    result = evaluate(model, scenes, progress=False)
    by_columns = {}
    for columns in (1, 2, 3, 4):
        labels = block_masks(columns, 4, SIZE).expand(10, -1, -1)
        by_columns[columns] = image_scores(labels, 4, scenes.instances)["mbo_i"].mean().item()
    row = result.row("blocks")
    assert row.columns == max(by_columns, key=by_columns.get)
    assert row.scores["mbo_i"] == pytest.approx(max(by_columns.values()), abs=1e-12)


def test_noise_belongs_to_the_image():
    noise = slot_noise(1, range(6), 3, 8)
    assert torch.equal(noise[[4, 2]], slot_noise(1, [4, 2], 3, 8))
    assert not torch.equal(noise, slot_noise(2, range(6), 3, 8))
    assert noise.flatten().unique().numel() == noise.numel()
    many = slot_noise(0, range(200), 7, 64)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_batch_size_does_not_matter_and_seed_does(model, scenes):
    # Features of another batch size may differ in the last bit, so near ties may fall the other way.
    one, other = (evaluate(model, scenes, batch_size=n, progress=False) for n in (3, 10))
    for a, b in zip(one.tables[0].rows, other.tables[0].rows, strict=True):
        assert scores_of(a) == pytest.approx(scores_of(b), abs=5e-3)
    again = evaluate(model, scenes, batch_size=3, progress=False)
    assert [r.scores for r in again.tables[0].rows] == [r.scores for r in one.tables[0].rows]
    reseeded = evaluate(model, scenes, batch_size=3, seed=1, progress=False)
    assert reseeded.row("slots").scores != one.row("slots").scores
    assert reseeded.row("blocks").scores == one.row("blocks").scores


def test_global_random_state_is_left_alone(model, scenes):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evaluate(model, scenes, progress=False, limit=2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("changes", [dict(orders="standard"), dict(decoder="mlp", orders="standard")])
def test_one_order_has_one_decoder_row(scenes, changes):
    result = evaluate(small_model(**changes), scenes, progress=False, limit=3)
    assert [r.title for r in result.tables[0].rows][:2] == ["decoder masks, order 0", "slot masks [1]"]
    assert list(result.reconstruction) == [1]


def test_student_of_stage_2(scenes):
    student = small_model(stage=2)
    with torch.no_grad():
        for parameter in student.last_blocks.parameters():
            parameter.mul_(1.1)
    result = evaluate(student, scenes, progress=False)
    images = normalise(scenes.images)
    features, target = student.encode(images)
    assert not torch.equal(features, target)
    labels = labels_from_soft(student.segment(images).slot_attn, SIZE)
    expected = image_scores(labels, 4, scenes.instances)["mbo_i"].mean().item()
    assert result.row("slots").scores["mbo_i"] == pytest.approx(expected, abs=1e-12)
    kmeans = labels_from_soft(F.one_hot(kmeans_labels(target, 4), 4), SIZE)
    expected = image_scores(kmeans, 4, scenes.instances)["mbo_i"].mean().item()
    assert result.row("kmeans").scores["mbo_i"] == pytest.approx(expected, abs=1e-12)


def test_unreadable_images_are_named_and_the_rest_is_scored(model, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_CORRUPT", 1.0)
    result = evaluate(model, Images(8, broken=(0, 3, 7)), batch_size=2, progress=False)
    assert result.images == 5 and result.indices == [1, 2, 4, 5, 6]
    assert result.labels == [f"{i}.jpg" for i in result.indices]
    assert result.skipped == {f"{i}.jpg": f"image {i}.jpg cannot be read: truncated" for i in (0, 3, 7)}
    assert result.row("slots").counted["fg_ari"] == 5
    # The others keep their own noise: the mean over all is the mean over both parts.
    whole = evaluate(model, Images(8), batch_size=2, progress=False)
    rest = evaluate(model, Images(8, broken=(1, 2, 4, 5, 6)), batch_size=2, progress=False)
    mean = (5 * result.row("slots").scores["mbo_i"] + 3 * rest.row("slots").scores["mbo_i"]) / 8
    assert whole.row("slots").scores["mbo_i"] == pytest.approx(mean, abs=5e-3)


def test_few_images_may_be_unreadable(model):
    """Scores of a part of the set must not pass for the set's: one image or 1 %, as in training."""
    assert evaluate(model, Images(8, broken=(3,)), progress=False).images == 7
    with pytest.raises(UserError, match="2 of the 8 images of images cannot be scored, more than 1%: 3.jpg: image"):
        evaluate(model, Images(8, broken=(3, 7)), progress=False)


class Odd(Images):
    """Instances far beyond 255 in the first image, which odd files may have; the second has an error of its own."""

    def label(self, index):
        return "same.jpg"

    def val_masks(self, index):
        if index == 1:
            raise ValueError("of some library")
        masks = super().val_masks(index)
        return Masks(masks.instances * 40_000, masks.classes) if index == 0 else masks


def test_one_odd_image_does_not_end_an_evaluation(model):
    """Large labels are renumbered, not wrapped; an error of NumPy or Pillow skips the image that it is of."""
    result, plain = (evaluate(model, s, progress=False) for s in (Odd(4), Images(4, broken=(1,))))
    assert result.skipped == {"same.jpg": "ValueError: of some library"}
    assert [r.scores for r in result.tables[0].rows] == [r.scores for r in plain.tables[0].rows]
    skipped = {}
    list(read_images(lambda i: Odd(4).val_masks(1), Odd(4), range(3), 0, skipped))
    assert len(skipped) == 3  # images of one name are counted each


def test_limit(model):
    limited, short = (evaluate(model, s, limit=n, progress=False) for s, n in ((Images(6), 3), (Images(3), 99)))
    assert limited.images == short.images == 3
    assert [r.scores for r in limited.tables[0].rows] == [r.scores for r in short.tables[0].rows]


def test_without_classes(model):
    result = evaluate(model, Images(4, classes=False), progress=False)
    assert all(r.scores["mbo_c"] is None and r.counted["mbo_c"] == 0 for r in result.tables[0].rows)
    assert all(line.split()[-6] == "–" for line in evaluation_table(result.tables[0]).splitlines()[1:])


def test_ignore_of_some_images(model):
    plain, partly = (evaluate(model, Images(4, ignore=i), batch_size=4, progress=False) for i in ((), (1, 2)))
    masks = [Images(4, ignore=(1, 2)).val_masks(i) for i in range(4)]
    ignore = torch.stack([torch.zeros(SIZE, SIZE) if m.ignore is None else m.ignore for m in masks]).long()
    labels = block_masks(partly.row("blocks").columns, 4, SIZE).expand(4, -1, -1)
    expected = image_scores(labels, 4, torch.stack([m.instances for m in masks]), None, ignore)["mbo_i"].mean().item()
    assert partly.row("blocks").scores["mbo_i"] == pytest.approx(expected, abs=1e-12)
    assert partly.row("blocks").scores != plain.row("blocks").scores


class Unmasked(Images):
    has_masks = False


@pytest.mark.parametrize(
    "images, settings, message",
    [
        (lambda: Unmasked(2), {}, "images has no masks to compare with: evaluate on"),
        (lambda: Images(0), {}, "no validation images"),
        (lambda: Images(2, broken=(0, 1)), {}, "none of the 2 images of images can be read; the first: image 0"),
        (lambda: Images(2), {"batch_size": 0}, "batch size 0"),
        (lambda: Images(2), {"limit": -1}, "limit -1"),
        (lambda: Images(2), {"seed": -1}, "seed -1"),
        (lambda: Images(2), {"workers": -1}, "workers -1"),
        (lambda: Images(2), {"protocols": "mine"}, "--protocol mine is unknown"),
    ],
)
def test_bad_input(model, images, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, images(), progress=False, **settings)


def fixed(mbo_i, columns=2):
    def row(masks, value, **extra):
        scores = dict.fromkeys(METRICS) | {"mbo_i": value, "miou": 0.25, "fg_ari": 1.0}
        return Row(masks, scores, {}, 6, **extra)

    rows = [row("decoder", mbo_i, orders=1), row("slots", 0.5), row("blocks", 0.3, columns=columns)]
    return Table("spot", 64, rows)


def test_table_is_aligned():
    lines = evaluation_table(fixed(0.456)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["masks", "mBO_i", "mBO_c", "mIoU", "FG-ARI", "ARI", "P-ARI", "PQ"]
    assert lines[1].split() == ["decoder", "masks,", "order", "0", "45.6", "–", "25.0", "100.0", *"–––"]
    assert lines[3].startswith("block masks, 2 columns [2]")


def test_mean_and_sample_deviation_over_runs():
    means = dict(mean_rows([fixed(0.4), fixed(0.5), fixed(0.6, columns=3)]))
    assert means["decoder masks, order 0"]["mbo_i"] == pytest.approx((0.5, 0.1))
    assert means["decoder masks, order 0"]["mbo_c"] is None
    assert means["block masks, best columns [2]"]["mbo_i"] == pytest.approx((0.3, 0))
    text = mean_table([fixed(0.4), fixed(0.5), fixed(0.6)])
    assert "50.0 ± 10.0" in text and "block masks, 2 columns [2]" in text


def test_slots_of_another_size_are_scored_at_their_masks_size(model):
    """Masks larger than the image: the soft masks are resized to them."""

    class Large(Images):
        def val_masks(self, index):
            masks = super().val_masks(index)
            return replace(
                masks,
                **{
                    k: getattr(masks, k).repeat_interleave(2, 0).repeat_interleave(2, 1)
                    for k in ("instances", "classes")
                },
            )

    result = evaluate(model, Large(2), progress=False)
    assert result.tables[0].mask_size == 2 * SIZE


def test_published_layouts_are_scored_beside_the_best_columns(model, scenes):
    result = evaluate(model, scenes, layouts=[(2, 7), (1, 1)], progress=False)
    seven, one = result.tables[0].rows[-2:]
    assert (seven.masks, seven.columns, seven.num_masks, one.num_masks) == ("layout", 2, 7, 1)
    assert [seven.title, one.title] == ["7 block masks, 2 columns [4]", "1 block mask [4]"]
    for row, labels in ((seven, block_masks(2, 7, SIZE)), (one, block_masks(1, 1, SIZE))):
        scores = image_scores(labels.expand(10, -1, -1), row.num_masks, scenes.instances, scenes.classes)
        assert scores_of(row) == pytest.approx([scores[name].mean().item() for name in LABELLED], abs=1e-12)
    assert published_layouts("movi_e") == [(4, 24), (1, 1)] and published_layouts("scenes") == [(1, 1)]


class Slow(Images):
    """The first image of every four is the last to be read."""

    def val_image(self, index):
        time.sleep(0.02 if index % 4 == 0 else 0)
        self.threads = getattr(self, "threads", set()) | {threading.current_thread().name}
        return super().val_image(index)


def test_threads_read_ahead_in_order(model, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_CORRUPT", 1.0)
    images = Slow(9, broken=(0, 5))
    skipped, finished = {}, []
    found = list(
        read_images(
            lambda i: (i, images.val_image(i)), images, range(9), 3, skipped, lambda: finished.append(len(finished))
        )
    )
    assert [index for index, _ in found] == [1, 2, 3, 4, 6, 7, 8] and list(skipped) == ["0.jpg", "5.jpg"]
    assert len(finished) == 9 and len(images.threads) > 1 and "MainThread" not in images.threads
    alone, together = (evaluate(model, Slow(9, broken=(0, 5)), workers=n, progress=False) for n in (0, 3))
    assert alone.tables == together.tables and alone.skipped == together.skipped and alone.labels == together.labels


def test_other_errors_of_a_thread_are_raised(model):
    class Wrong(Images):
        def val_image(self, index):
            raise RuntimeError("a bug")

    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="a bug"):
            evaluate(model, Wrong(3), workers=workers, progress=False)


class Empty(Images):
    """The first image has no object."""

    def val_masks(self, index):
        masks = super().val_masks(index)
        return Masks(masks.instances * (index > 0), masks.classes * (index > 0))


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def test_each_thread_scores_batches_of_its_own(model, scenes, monkeypatch, two_threads):
    names, encode, both = set(), model.encode, threading.Barrier(2, timeout=60)

    def recorded(images):
        if threading.current_thread().name not in names:
            names.add(threading.current_thread().name)
            both.wait()  # breaks unless two batches are on their way at once
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return encode(images)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", recorded)
        together = evaluate(model, scenes, batch_size=2, progress=False)
    assert len(names) == 2 and "MainThread" not in names and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = evaluate(model, scenes, batch_size=2, progress=False)
    assert alone.tables == together.tables and alone.indices == together.indices == list(range(10))
    assert alone.reconstruction == together.reconstruction


def test_few_images_are_divided_among_the_threads(model, scenes, monkeypatch, two_threads):
    sizes, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: sizes.append(len(images)) or encode(images))
    evaluate(model, scenes, progress=False)
    assert sizes == [5, 5]


def test_an_error_of_a_batch_ends_the_evaluation(model, scenes, monkeypatch, two_threads):
    def fail(images):
        raise RuntimeError("out of order")

    monkeypatch.setattr(model, "encode", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        evaluate(model, scenes, batch_size=2, progress=False)
    assert torch.get_num_threads() == 2


def test_many_tokens_go_through_the_model_in_parts(model, scenes, monkeypatch, two_threads):
    sizes, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: sizes.append(len(images)) or encode(images))
    monkeypatch.setattr(evaluation, "_TOKENS_AT_ONCE", 4 * 16)
    torch.set_num_threads(1)
    evaluate(model, scenes, batch_size=6, progress=False)
    assert sizes == [4, 2, 4]


def test_images_without_an_object_are_named(model):
    result = evaluate(model, Empty(4), progress=False)
    assert result.tables[0].unlabelled == ["0.jpg"] and result.row("slots").counted["mbo_i"] == 3
    assert unlabelled_line(result.tables[0]) == "1 without an object, which no mBO counts: 0.jpg"
    many = replace(result.tables[0], unlabelled=[str(i) for i in range(12)])
    assert unlabelled_line(many).startswith("12 without") and unlabelled_line(many).endswith(" 9, …")


def test_csv_has_every_image(model, tmp_path):
    result = evaluate(model, Empty(5, broken=(3,)), protocols="spot,ocbench", layouts=[(1, 1)], progress=False)
    write_csv(tmp_path / "scores.csv", [("a", result), ("b", result)])
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (2 * 6 * 4 + 1)  # runs · (protocols · kinds of masks · images + the broken one)
    for protocol in ("spot", "ocbench"):
        for row in result.table(protocol).rows:
            key = {"run": "a", "protocol": protocol, "masks": row.masks, "orders": str(row.orders or "")}
            own = [line for line in lines if all(line[name] == value for name, value in key.items())]
            assert [line["image"] for line in own] == ["0.jpg", "1.jpg", "2.jpg", "4.jpg"]
            for name in METRICS:
                values = [float(line[name]) for line in own if line[name]]
                assert len(values) == row.counted[name]
                if values:
                    assert sum(values) / len(values) == pytest.approx(row.scores[name], abs=1e-6)
            objects = [int(Images(5).val_masks(i).instances.unique().numel()) for i in (1, 2, 4)]
            extra = protocol == "ocbench"  # counts the background
            assert [int(line["objects"]) for line in own] == [extra, *(n - 1 + extra for n in objects)]
            assert [line["note"] for line in own] == ["no object", "", "", ""]
    broken = [line for line in lines if line["image"] == "3.jpg"]
    assert len(broken) == 2 and broken[0]["note"] == "image 3.jpg cannot be read: truncated" and not broken[0]["mbo_i"]


def sized(*means):
    bins = [(None, 0)] * (len(SIZE_BINS) - 1 - len(means)) + [(mean, 4) for mean in means]
    return Table("spot", 64, [replace(row, sizes=bins) for row in fixed(0.4).rows])


def test_size_tables():
    lines = size_table(sized(0.25, 0.5)).splitlines()
    assert lines[0].split() == ["masks", "0–0.5", "0.5–1", "1–5", "5–10", "10–20", "20–50", "50–80", "80–100"]
    assert lines[1].split()[-3:] == ["–", "25.0", "50.0"] and lines[-1].split() == ["instances", *"000000", "4", "4"]
    runs = [sized(0.4), sized(0.5), sized(0.6)]
    (title, bins), *_ = mean_sizes(runs)
    assert title == "decoder masks, order 0" and bins[:7] == [None] * 7 and bins[7] == pytest.approx((0.5, 0.1))
    assert mean_size_table(runs).splitlines()[1].endswith("–  50.0 ± 10.0")


def test_sizes_hold_every_object(model, scenes):
    result = evaluate(model, scenes, progress=False)
    objects = result.row("slots").per_image["objects"].sum()
    for row in result.tables[0].rows:
        assert sum(number for _, number in row.sizes) == objects
        # The mean over objects lies in the bins; scenes have between 2 and 5 each, so that of images is near.
        total = sum(mean * number for mean, number in row.sizes if number) / objects
        assert total == pytest.approx(row.scores["mbo_i"], abs=0.05)


def test_first_table_is_the_evaluations(model, scenes):
    result = evaluate(model, scenes, protocols=["lsd", "spot"], limit=2, progress=False)
    assert isinstance(result, Evaluation) and result.row("slots") == result.table("lsd").row("slots")


def test_masks_in_use_are_counted_beside_the_objects():
    """Three images of one or two objects; one predicted label has no pixel in the first, two in the last."""
    truth = torch.zeros(3, 4, 4, dtype=torch.long)
    truth[:, 0] = 1
    truth[1, 1] = 2
    pred = torch.zeros(3, 4, 4, dtype=torch.long)
    pred[0, 0], pred[1, 0], pred[1, 1] = 1, 1, 2
    scores = Scores()
    scores.add(pred, 3, truth)
    assert scores.used().tolist() == [2, 3, 1]
    per_image = scores.per_image() | {"objects": scores.objects(), "used": scores.used()}
    decoder, slots = (
        Row(masks, scores.result(), scores.counted(), 3, orders=1 if masks == "decoder" else None, per_image=per_image)
        for masks in ("decoder", "slots")
    )
    scored = Table("spot", 4, [decoder, slots])
    title = decoder.title
    assert [(number, images, used[title]) for number, images, used in used_by_objects(scored)] == [
        (1, 2, 1.5),
        (2, 1, 3),
    ]
    assert used_line(scored) == "in use: 2.0 decoder masks, order 0, 2.0 slot masks; 1.3 objects"


def test_seeds_that_began_with_a_run_each_are_a_group():
    """Other folders are no other settings, but a run that began with none is another experiment."""
    first = preset("scenes", 2, init_from="/a")
    runs = [first, replace(first, seed=1, init_from="/b"), replace(first, seed=2, init_from=None)]
    assert seed_groups(runs) == [[0, 1]]
