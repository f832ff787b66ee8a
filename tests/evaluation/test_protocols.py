"""Protocols: each one's counting against boolean masks, its label maps from annotations, and all of them in one pass.

The slow definitions below say in loops what each code base computes; protocols.py names where.
"""

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from data_folders import make_labelled_voc
from paths import GOLDEN
from small_models import SIZE, Images, small_model
from spot_fast.config import preset
from spot_fast.data import open_set
from spot_fast.data.base import FullLabels, Masks
from spot_fast.data.datasets.coco import Coco
from spot_fast.data.datasets.movi import Movi
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import METRICS, OVERLAP, VOID, Scores, image_scores, labels_from_soft
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth, _crop_first, _nearest_corner, chosen
from spot_fast.evaluation.scoring import evaluate

MINI, MOVI = GOLDEN / "coco_mini", GOLDEN / "movi_mini"
S = 24


def maps(seed, num_pred, objects, batch=3):
    """Predictions, instances and classes made of blobs, and a fifth of the pixels marked; some have no foreground."""
    rng = np.random.default_rng(seed)
    pred = labels_from_soft(torch.from_numpy(rng.random((batch, 16, num_pred))), S).long()
    instances = labels_from_soft(torch.from_numpy(rng.random((batch, 25, objects + 1))), S).long()
    classes = torch.tensor([0, *rng.integers(1, 6, objects)])[instances]
    if seed % 2:
        instances[0], classes[0] = 0, 0
    return pred, instances, classes, torch.from_numpy(rng.random((batch, S, S)) < 0.2)


def iou(a, b):
    return int((a & b).sum()) / max(1, int((a | b).sum()))


def masks_of(labels, background):
    return [labels == j for j in labels.unique().tolist() if j > 0 or (background and j == 0)]


def mean_best(objects, preds):
    return sum(max(iou(p, o) for p in preds) for o in objects) / len(objects) if objects else math.nan


def best_pairs(objects, preds, score):
    """The one-to-one pairs (object, prediction) with the largest sum of score, by brute force."""
    few, many = sorted((range(len(objects)), range(len(preds))), key=len)
    swap = few == range(len(preds)) and len(preds) < len(objects)
    orders = permutations(many, len(few))
    pairs = (list(zip(few, order, strict=True)) for order in orders)
    options = ([(j, i) for i, j in p] if swap else p for p in pairs)
    return max(options, key=lambda pairs: sum(score(objects[o], preds[p]) for o, p in pairs))


def matched(objects, preds):
    pairs = best_pairs(objects, preds, iou)
    return sum(iou(objects[o], preds[p]) for o, p in pairs) / len(objects) if objects else math.nan


def assert_scores(found, b, **expected):
    got = {name: found[name][b].item() for name in expected}
    assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(6))
def test_oclf_ignores_pixels_of_several_instances_for_instances_only(seed):
    pred, instances, classes, several = maps(seed, 4, 3)
    found = image_scores(pred, 4, instances.masked_fill(several, VOID), classes, rules=PROTOCOLS["oclf"].rules)
    for b in range(3):
        keep = ~several[b]
        preds = masks_of(pred[b], True)
        objects = [o & keep for o in masks_of(instances[b], False)]
        kept = [p & keep for p in preds]
        fg = keep & (instances[b] > 0)
        of_class, ari = masks_of(classes[b], False), adjusted_rand_score(instances[b][fg], pred[b][fg])
        assert_scores(
            found,
            b,
            mbo_i=mean_best(objects, kept),
            mbo_c=mean_best(of_class, preds),
            miou=matched(objects, kept),
            fg_ari=ari,
        )


@pytest.mark.parametrize("seed", range(6))
def test_slotdiffusion_sets_overlaps_to_background_and_to_a_mask_of_their_own(seed):
    pred, instances, classes, several = maps(seed, 3, 4)
    maps_of = (labels.masked_fill(several, OVERLAP) for labels in (instances, classes))
    found = image_scores(pred, 3, *maps_of, rules=PROTOCOLS["slotdiffusion"].rules)
    for b in range(3):
        truth, of_class = (labels[b].masked_fill(several[b], 0) for labels in (instances, classes))
        preds = masks_of(pred[b].masked_fill(several[b], 3), True)
        fg = truth > 0
        assert_scores(
            found,
            b,
            mbo_i=mean_best(masks_of(truth, False), preds),
            mbo_c=mean_best(masks_of(of_class, False), preds),
            miou=matched(masks_of(truth, True), preds),
            fg_ari=adjusted_rand_score(truth[fg], pred[b][fg]),
        )


@pytest.mark.parametrize("seed", range(6))
def test_ocbench_counts_the_background_as_a_mask(seed):
    pred, instances, _, _ = maps(seed, 4, 3)
    found = image_scores(pred, 4, instances, rules=PROTOCOLS["ocbench"].rules)
    for b in range(3):
        preds, objects = masks_of(pred[b], True), masks_of(instances[b], True)
        fg = instances[b] > 0
        ari = adjusted_rand_score(instances[b][fg], pred[b][fg]) if fg.any() else math.nan
        assert_scores(
            found, b, mbo_i=mean_best(objects, preds), mbo_c=math.nan, miou=matched(objects, preds), fg_ari=ari
        )


@pytest.mark.parametrize("num_pred, objects", [(5, 3), (2, 4), (3, 3)])
def test_lsd_is_a_mean_over_matched_objects(num_pred, objects):
    pred, instances, _, _ = maps(num_pred, num_pred, objects)
    scores = Scores(PROTOCOLS["lsd"].rules)
    for part in (slice(0, 1), slice(1, 3)):
        scores.add(pred[part], num_pred, instances[part])

    def cosine(a, b):
        return int((a & b).sum()) / math.sqrt(int(a.sum()) * int(b.sum()))

    best, paired = [], []
    for b in range(3):
        preds, found = masks_of(pred[b], True), masks_of(instances[b], False)
        for o, p in best_pairs(found, preds, cosine) if found else ():
            best.append(max(iou(found[o], q) for q in preds))
            paired.append(iou(found[o], preds[p]))
    result = scores.result()
    assert result["mbo_i"] == pytest.approx(np.mean(best)) and result["miou"] == pytest.approx(np.mean(paired))
    assert scores.objects().sum() == len(best) and result["mbo_c"] is None and scores.counted()["fg_ari"] == 3


@pytest.mark.parametrize("height, width", [(37, 53), (60, 41), (32, 32), (500, 333)])
def test_squares_are_those_of_the_libraries(height, width):
    """PyTorch has both nearest-neighbour rules: pixel centres (OCBench) and corners (OpenCV's, SlotDiffusion)."""
    labels = np.random.default_rng(0).integers(0, 99, (height, width), dtype=np.int32)
    tensor, side, size = torch.from_numpy(labels)[None, None].float(), min(height, width), 32
    top, left = (height - side) // 2, (width - side) // 2
    square = tensor[..., top : top + side, left : left + side]
    assert torch.equal(_crop_first(labels, size), F.interpolate(square, size=size, mode="nearest-exact")[0, 0].int())
    factor = size / side
    resized = F.interpolate(tensor, size=(round(height * factor), round(width * factor)), mode="nearest")[0, 0].int()
    top, left = ((length - size) // 2 for length in resized.shape)
    assert torch.equal(_nearest_corner(labels, size), resized[top : top + size, left : left + size])


def labelled(instances, classes, *, top=None, covered=None, undecided=None):
    """FullLabels of small maps."""
    nothing = np.zeros(np.shape(instances), bool)
    arrays = [np.array(m, np.int32) for m in (instances, classes, classes if top is None else top)]
    return FullLabels(*arrays, *(nothing if m is None else np.array(m, bool) for m in (covered, undecided)))


def test_what_becomes_of_overlaps_and_of_the_rim():
    full = labelled(
        [[0, 1, 1], [2, 2, 0], [3, 0, 0]],
        [[0, 5, 5], [7, 7, 0], [0, 0, 4]],
        top=[[0, 5, 9], [7, 7, 0], [0, 0, 4]],
        covered=[[0, 0, 1], [0, 0, 0], [0, 0, 0]],
        undecided=[[0, 0, 0], [0, 0, 1], [0, 0, 0]],
    )

    def truth(name):
        masks = PROTOCOLS[name].truth(full, 3)
        return masks.instances.tolist(), masks.classes if masks.classes is None else masks.classes.tolist()

    # Instance 3 has no class and class 4 no instance: for OCLF they are background.
    assert truth("oclf") == ([[0, 1, -1], [2, 2, -1], [0, 0, 0]], [[0, 5, 9], [7, 7, -1], [0, 0, 0]])
    assert truth("slotdiffusion") == ([[0, 1, -2], [2, 2, -2], [3, 0, 0]], [[0, 5, -2], [7, 7, -2], [0, 0, 4]])
    assert truth("ocbench") == truth("lsd") == ([[0, 1, 1], [2, 2, 0], [3, 0, 0]], None)


def test_coco_without_crowd_regions_and_with_the_highest_class():
    coco = Coco(MINI, "val")
    for index in range(len(coco)):
        instances, classes, several = coco.full_masks(index)
        full = coco.full_labels(index, crowd=True)
        assert np.array_equal(full.instances, instances) and np.array_equal(full.classes, classes)
        assert np.array_equal(full.covered, several) and not full.undecided.any()
        assert (full.top_classes >= classes).all() and (full.top_classes == classes)[several == 0].all()
        annotations = coco.instances._annotations[coco.listed[index].id]
        crowds = sum(a.get("iscrowd", 0) for a in annotations)
        without = coco.full_labels(index, crowd=False)
        assert np.array_equal(without.instances, instances) == (not crowds)
    first = coco.instances._annotations[coco.listed[0].id]
    assert any(a.get("iscrowd") for a in first), "the mini set should have a crowd region in its first image"


def test_annotations_read_once_serve_every_protocol():
    coco, calls = Coco(MINI, "val"), []
    full_labels = Coco.full_labels

    def counted(self, index, *, crowd):
        calls.append(crowd)
        return full_labels(self, index, crowd=crowd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coco, "full_labels", counted)
        read = {}
        shared = [GroundTruth(protocol, coco).masks(0, read) for protocol in PROTOCOLS.values()]
    assert sorted(calls) == [False, True]
    for protocol, masks in zip(PROTOCOLS.values(), shared, strict=True):
        alone = GroundTruth(protocol, coco).masks(0)
        assert torch.equal(masks.instances, alone.instances)
        assert masks.classes is alone.classes is None or torch.equal(masks.classes, alone.classes)


def test_voc_has_a_rim(tmp_path):
    val = open_set(preset("voc", data=str(make_labelled_voc(tmp_path))), "val")
    full = val.full_labels(0, crowd=False)
    assert full.undecided.sum() == 2 * 40 and full.undecided[20:22].all() and not full.covered.any()
    assert (GroundTruth(PROTOCOLS["spot"], val).masks(0).instances >= 0).all()
    assert (GroundTruth(PROTOCOLS["oclf"], val).masks(0).instances == VOID).any()
    assert (GroundTruth(PROTOCOLS["slotdiffusion"], val).masks(0).classes == OVERLAP).any()
    assert (GroundTruth(PROTOCOLS["ocbench"], val).masks(0).instances >= 0).all()


@pytest.mark.parametrize(
    "name, photo, frame",
    [
        ("spot", 320, 128),
        ("oclf", 320, 128),
        ("ocbench", 256, 256),
        ("slotdiffusion", 224, 128),
        ("lsd", 256, 256),
    ],
)
def test_sizes(name, photo, frame):
    coco, movi = Coco(MINI, "val"), Movi(MOVI, "val")
    for image_set, size in ((coco, photo), (movi, frame), (Scenes(1, "val", size=SIZE), None)):
        masks = GroundTruth(PROTOCOLS[name], image_set).masks(0)
        size = size or PROTOCOLS[name].size or SIZE
        assert masks.instances.shape == (size, size) and masks.ignore is None
        has_classes = image_set.has_classes and PROTOCOLS[name].rules.classes
        assert (masks.classes is not None) == has_classes


def test_frames_are_read_at_their_own_size():
    """Not enlarged from the 128 of the run."""
    movi = Movi(MOVI, "val")
    found = GroundTruth(PROTOCOLS["lsd"], movi).masks(0).instances
    assert torch.equal(found, Movi(MOVI, "val", mask_size=256).val_masks(0).instances)
    assert movi.mask_size == 128


@pytest.mark.parametrize(
    "name, label", [("spot", VOID), ("oclf", VOID), ("slotdiffusion", OVERLAP), ("ocbench", 1), ("lsd", 1)]
)
def test_ignored_pixels_of_any_other_set(name, label):
    images = Images(1, ignore=(0,))
    found = GroundTruth(PROTOCOLS[name], images).masks(0).instances
    hidden = _crop_first(images.val_masks(0).ignore.numpy(), len(found)) != 0
    assert hidden.any() and (found[hidden] == label).all() and (found[~hidden] != label).all()


def test_all_in_one_pass_equal_each_alone():
    model, images = small_model(), Images(5, ignore=(1,), broken=(3,))
    together = evaluate(model, images, protocols="all", batch_size=2, progress=False)
    assert [t.protocol for t in together.tables] == list(PROTOCOLS)
    for name in PROTOCOLS:
        alone = evaluate(model, images, protocols=[name], batch_size=2, progress=False)
        assert alone.tables == [together.table(name)] and alone.labels == together.labels
    scores = [tuple(t.row("slots").scores[m] for m in METRICS) for t in together.tables]
    assert len(set(scores)) >= 4, "protocols that count differently should give different numbers"


@pytest.mark.parametrize(
    "names, expected",
    [
        ("spot", ["spot"]),
        ("all", list(PROTOCOLS)),
        ("lsd, spot,lsd", ["lsd", "spot"]),
        (["oclf"], ["oclf"]),
    ],
)
def test_chosen(names, expected):
    assert [p.name for p in chosen(names)] == expected


@pytest.mark.parametrize("names", ["", "spot,dinosaur", "all,spot", "SPOT"])
def test_unknown_protocols(names):
    with pytest.raises(UserError, match="--protocol .*is unknown: use all, or some of spot, oclf, ocbench"):
        chosen(names)


def test_every_protocol_says_what_it_does_in_a_line():
    for protocol in PROTOCOLS.values():
        assert "\n" not in protocol.about and "\n" not in protocol.source and "/" in protocol.source


def test_a_coco_image_with_a_crowd_scores_as_told(tmp_path):
    """A crowd over half of the image: an instance for SPOT and OCBench, nothing for the others."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "val2017" / "a.jpg")
    crowd = {"counts": [0, 512, 512], "size": [32, 32]}
    box = [[20, 4, 28, 4, 28, 12, 20, 12]]
    annotations = [
        {"id": i, "image_id": 1, "segmentation": s, "iscrowd": c, "category_id": 1}
        for i, (s, c) in enumerate(((box, 0), (crowd, 1)))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 32, "width": 32}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    coco = Coco(tmp_path, "val", mask_size=32)
    for name, labels in (("spot", {0, 1, 2}), ("ocbench", {0, 1, 2}), ("oclf", {0, 1}), ("slotdiffusion", {0, 1})):
        masks = GroundTruth(PROTOCOLS[name], coco).masks(0)
        assert isinstance(masks, Masks) and set(masks.instances.unique().tolist()) == labels
