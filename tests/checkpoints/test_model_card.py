"""The model card: the licence of the encoder's weights, and front matter that the hub can read."""

import pytest

from spot_fast.checkpoints.model_card import card, encoder_licence
from spot_fast.config import preset


@pytest.mark.parametrize(
    "name, identifier, words",
    [
        ("vit_base_patch16_224.dino", "apache-2.0", "DINO, published under Apache"),
        ("vit_base_patch14_reg4_dinov2", "apache-2.0", "DINOv2"),
        ("vit_small_patch16_dinov3.lvd1689m", "other", "DINOv3 Lic"),
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0", "no commercial use"),
        ("vit_base_moco_v3", "cc-by-nc-4.0", "MoCo v3"),
        ("spot_scenes", "apache-2.0", "spot_fast's own"),
        ("vit_base_patch16_224", "other", "not known here"),
    ],
)
def test_licence_of_encoder_weights(name, identifier, words):
    licence, sentence = encoder_licence(name)
    assert licence == identifier and words in sentence


def test_front_matter_and_contents():
    config = preset("coco", 2, encoder="vit_base_patch16_224.mae")
    text = card(config, {}, "abc123", included=True, source="`file`, a checkpoint of the authors")
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    values = dict(line.split(": ", 1) for line in head.splitlines())
    assert values["license"] == "cc-by-nc-4.0" and values["library_name"] == "spot_fast"
    for words in (
        "# SPOT, stage 2, coco",
        "spot_fast.load(",
        "None are known",
        "in `encoder.safetensors`",
        "abc123",
        "trained copy of its last 4 blocks",
        "Converted from `file`",
    ):
        assert words in body, words
    stage1 = card(preset("coco", 1), {"mbo_i_decoder": 0.345}, "abc", included=False, source=None)
    assert "trained copy" not in stage1 and "not in this folder" in stage1
    assert "| mBO_i, decoder masks | 0.3450 |" in stage1
