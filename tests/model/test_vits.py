"""Protects the names of ViTs: which ViT a name builds, which name weights get, and what is refused."""

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import load_vit_weights
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.vits import build_vit, vit_name


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224.dino", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]
)
def test_a_vit_is_recognised_by_its_weights(name):
    """Those with a name of timm's by it, others by their shape, which is enough to build them."""
    weights = dict(build_vit(preset("coco", encoder=name)).state_dict())
    torch.nn.init.normal_(weights["pos_embed"])
    assert vit_name(weights) == name
    shape = vit_name(weights, heads=3)
    assert shape.startswith("vit:patch=1") and "width=384,depth=12,heads=3,hidden=1536" in shape
    own = build_vit(preset("coco", encoder=shape))
    load_vit_weights(own, weights, pos_resize="dino", source="x")
    assert own.blocks[0].attn.num_heads == 3 and own.state_dict().keys() == weights.keys()


def test_maes_fixed_positions_are_not_taken_for_dinos():
    weights = dict(build_vit(preset("coco", encoder="vit_base_patch16_224.mae")).state_dict())
    weights["pos_embed"] = torch.randn(1, 197, 768)
    assert vit_name(weights) == "vit_base_patch16_224.dino"
    weights["pos_embed"][:, 0] = 0
    assert vit_name(weights) == "vit_base_patch16_224.mae"


@pytest.mark.parametrize(
    "encoder, words",
    [
        ("vit:patch=8,width=24", "describes no ViT: give depth, heads, hidden, patch, width"),
        ("vit:patch=8,width=24,depth=2,heads=0,hidden=8", "describes no ViT"),
        ("vit:patch=8,width=24,depth=2,heads=3,hidden=8,colour=1", "describes no ViT"),
        ("vit:patch=8,width=24,depth=2,heads=5,hidden=8", "heads=5 does not divide width=24"),
    ],
)
def test_a_vit_described_wrongly_is_refused(encoder, words):
    with pytest.raises(UserError, match=words):
        build_vit(preset("scenes", encoder=encoder))


def test_a_name_that_builds_no_fitting_vit_is_refused():
    for changes, words in (
        ({"encoder": "vit_bse_patch16"}, "not a model timm knows"),
        ({"encoder": "resnet18", "image_size": 64}, "not a plain ViT"),
        ({"image_size": 60}, "not a multiple of the encoder's patch size 8: use 56 or 64"),
    ):
        with pytest.raises(UserError, match=words):
            build_vit(preset("scenes", **changes))
