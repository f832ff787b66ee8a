"""COCO's panoptic annotations: ids in colours, crowds, what is missing or damaged, and that one has to ask for them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_folders import make_coco
from small_models import small_model
from spot_fast.data.datasets.coco import Coco
from spot_fast.errors import UserError
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth
from spot_fast.evaluation.scoring import evaluate

IDS = (7, 70_000, 1_000_000)  # ids need one, two and three of the colours


def panoptic_map():
    ids = np.full((20, 30), IDS[0])
    ids[:, 10:] = IDS[1]
    ids[15:, 5:25] = IDS[2]
    ids[:4, 20:] = 0
    return ids


def add_panoptic(root, *, crowd=(), images=("i0", "i1"), ids=None):
    """Panoptic annotations beside `make_coco`'s."""
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir()
    ids = panoptic_map() if ids is None else ids
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    for name in images:
        Image.fromarray(colours).save(folder / f"{name}.png")
    segments = [{"id": each, "category_id": 1, "iscrowd": int(each in crowd)} for each in IDS]
    annotations = [{"image_id": name, "file_name": f"{name}.png", "segments_info": segments} for name in images]
    folder.with_suffix(".json").write_text(json.dumps({"annotations": annotations}))
    return folder


@pytest.fixture
def root(tmp_path):
    make_coco(tmp_path)
    return tmp_path


def test_colours_are_ids(root):
    add_panoptic(root)
    coco = Coco(root, "val")
    assert coco.has_panoptic and not Coco(root, "train").has_panoptic
    found, ids = coco.panoptic_segments(0), panoptic_map()
    assert found.dtype == np.int32 and found.shape == (20, 30)
    for number, each in enumerate((0, *IDS)):
        assert np.array_equal(found == number, ids == each)


def test_crowds_are_unlabelled(root):
    add_panoptic(root, crowd=IDS[1:2])
    found, ids = Coco(root, "val").panoptic_segments(1), panoptic_map()
    assert sorted(np.unique(found)) == [0, 1, 2]
    assert np.array_equal(found == 0, (ids == 0) | (ids == IDS[1]))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_crops_them_as_its_instances(root, name):
    """Panoptic segments that equal the instances become the same map; nobody reads them who did not ask."""
    coco = Coco(root, "val", mask_size=12)
    add_panoptic(root, ids=np.array(IDS)[coco.full_masks(0)[0] - 1])  # two instances cover the image
    coco = Coco(root, "val", mask_size=12)
    assert GroundTruth(PROTOCOLS[name], coco).masks(0).panoptic is None
    found = GroundTruth(PROTOCOLS[name], coco, panoptic=True).masks(0)
    counted = found.instances >= 0
    assert torch.equal(found.panoptic[counted], found.instances[counted].to(found.panoptic))
    assert sorted(found.panoptic.unique().tolist()) == [1, 2]


def test_evaluation_scores_them_and_says_so(root):
    add_panoptic(root, images=("i0",))
    coco = Coco(root, "val", image_size=32, mask_size=32)
    result = evaluate(small_model(), coco, protocols="spot,ocbench", progress=False)
    assert all(table.panoptic for table in result.tables)
    for row in result.tables[0].rows:
        assert row.counted["p_ari"] == row.counted["pq"] == 1 and row.counted["ari"] == 2
        assert row.scores["p_ari"] is not None
    assert "1 of 2 images are not in panoptic_val2017.json" in result.notes


def test_without_the_pngs_there_are_no_scores_but_a_note(root):
    add_panoptic(root).rename(root / "elsewhere")
    result = evaluate(small_model(), Coco(root, "val", image_size=32, mask_size=32), progress=False)
    assert not result.tables[0].panoptic and result.row("slots").scores["p_ari"] is None
    (note,) = [note for note in result.notes if "panoptic" in note]
    assert "there is no panoptic_val2017/ with its PNGs, unpack panoptic_val2017.zip" in note


def test_what_is_wrong_is_named(root):
    folder = add_panoptic(root)
    ids = panoptic_map()
    ids[0, 0] = 12
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(folder / "i0.png")
    with pytest.raises(UserError, match="i0.png has 1 segments that panoptic_val2017.json does not list, the first 12"):
        Coco(root, "val").panoptic_segments(0)
    Image.new("RGB", (11, 20), (7, 0, 0)).save(folder / "i0.png")
    with pytest.raises(UserError, match="i0.png gives 0.jpg masks of 11 x 20, but it is 30 x 20"):
        Coco(root, "val").panoptic_segments(0)
    Image.new("L", (30, 20)).save(folder / "i0.png")
    with pytest.raises(UserError, match=r"i0.png has no colours \(L\)"):
        Coco(root, "val").panoptic_segments(0)
    for text in ("{", "[]", '{"annotations": [{"image_id": 1}]}', '{"annotations": 3}'):
        folder.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=r"panoptic_val2017.json is not a COCO panoptic file"):
            Coco(root, "val").has_panoptic  # noqa: B018
