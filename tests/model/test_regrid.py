"""Protects models on another grid: same bits at the trained grid, right positions elsewhere, shared weights."""

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.model.encoder import Encoder, normalise, resample_positions
from spot_fast.model.regrid import at_grid, sharing_copy
from spot_fast.model.spot import Spot
from spot_fast.model.timm_import import import_timm

VARIANTS = [
    {},
    {"stage": 2},
    {"decoder": "mlp", "orders": "standard", "dec_mlp_hidden": 32},
    {"cappa": 0.5, "orders": "standard"},
    {"decoder": "masked"},
    {"decoder": "mlp", "dec_mlp_hidden": 32, "mlp_top_k": 2},
]


def model(**changes):
    torch.manual_seed(0)
    config = preset(
        "scenes", changes.pop("stage", 1), encoder_weights="none", dec_blocks=1, slot_dim=16, slot_mlp=16, **changes
    )
    return Spot(config, frozen_encoder(config)).eval()


def images(height, width):
    generator = torch.Generator().manual_seed(0)
    return normalise(torch.randint(0, 255, (2, 3, 8 * height, 8 * width), generator=generator, dtype=torch.uint8))


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_trained_grid_gives_the_same_bits_and_others_run(changes):
    one = model(**changes)
    noise = torch.randn(2, 6, 16)
    before = one.segment(images(12, 12), noise=noise, orders="all")
    same = at_grid(one, 12, 12).segment(images(12, 12), noise=noise, orders="all")
    other = at_grid(one, 5, 12)
    output = other.segment(images(5, 12), noise=noise, orders="all")
    assert output.masks.shape == output.slot_attn.shape == (2, 60, 6) and output.masks.isfinite().all()
    torch.testing.assert_close(output.masks.sum(-1), torch.ones(2, 60))
    after = one.segment(images(12, 12), noise=noise, orders="all")
    for name in ("slots", "slot_attn", "masks", "prediction"):
        assert torch.equal(getattr(before, name), getattr(same, name))
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_weights_are_shared_and_positions_are_not():
    one = model()
    other = at_grid(one, 4, 6)
    own = {name for name, value in one.named_parameters() if value is not dict(other.named_parameters())[name]}
    assert own == {"encoder.vit.pos_embed"}
    assert one.decoder.orders.shape == (9, 144) and other.decoder.orders.shape == (9, 24)


def test_positions_are_those_of_a_vit_of_that_size():
    one = model()
    table = one.encoder.vit.pos_embed
    expected = resample_positions(table, (4, 6), 1, one.config.pos_resize)
    assert expected.shape == (1, 25, table.shape[2])
    assert torch.equal(at_grid(one, 4, 6).encoder.vit.pos_embed, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_encoders_equal_those_built_at_that_size(name):
    """With the positions of the other size, a re-gridded ViT is the ViT that timm builds at it; rotary tables too."""
    timm = import_timm()
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, img_size=32)
    encoder = Encoder(vit, last_blocks=1)
    other = sharing_copy(encoder)
    other.set_grid(3, 3, "timm")
    fresh = timm.create_model(name, num_classes=0, img_size=48)
    fresh.load_state_dict(other.vit.state_dict())
    batch = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(other(batch), Encoder(fresh, last_blocks=1)(batch))
    other.set_grid(2, 4, "timm")
    assert other(torch.randn(1, 3, 32, 64)).shape == (1, 8, vit.embed_dim)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 4, vit.embed_dim)
