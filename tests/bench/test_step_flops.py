"""The floor's formulas against PyTorch's own counter on the reference step's parts, and where it is lower on ours."""

import pytest
import reference_step
import torch
from harness import step_flops, step_runs
from torch.utils.flop_counter import FlopCounterMode

import spot_kernels
from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny


@pytest.fixture(scope="module")
def model():
    return Trainer(tiny(eval_images=0), device=CPU).model


def counted(function, *inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def inputs(model, batch=1):
    encoder, slots = model.encoder, model.slot_encoder
    images = normalise(torch.zeros(batch, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8))
    return (
        images,
        torch.randn(batch, encoder.num_tokens, encoder.dim),
        torch.randn(batch, slots.num_slots, slots.slot_dim),
    )


def test_forward_of_the_parts(model):
    images, features, slots = inputs(model)
    blocks = list(model.encoder.vit.blocks)
    assert counted(reference_step.encode, model, blocks, images) == step_flops.encoder(model, len(blocks), embed=True)
    assert counted(reference_step.attend, model.slot_encoder, features, slots) == sum(step_flops.slots(model))
    other_half = len(model.decoder.transformer.blocks) * 2 * features.shape[1] ** 2 * features.shape[2]
    counted_decoder = counted(reference_step.decode, model.decoder, slots, features, 3)
    assert counted_decoder == step_flops.decoder(model, folded=False) + other_half


def test_folded_forward_of_the_decoder(model):
    """Our own decoder makes the folded products, which are fewer; the reference stays as the authors wrote it."""
    _, features, slots = inputs(model)
    more = len(model.decoder.transformer.blocks) * 2 * features.shape[1] ** 2 * features.shape[2]
    more += 2 * features.shape[2] ** 2  # [BOS] is projected apart from the tokens
    with spot_kernels.use_backend("torch"):
        assert counted(model.decoder.forward, slots, features) == step_flops.decoder(model) + more
        masks = counted(model.decoder.masks, slots, features)
    assert masks == step_flops.decoder(model, masks_only=True) + more
    assert step_flops.decoder(model) < step_flops.decoder(model, folded=False)


def test_backward_is_twice_forward(model):
    """Exactly but for products whose other factor needs no gradient; here slots and features come from parameters."""
    _, features, slots = inputs(model)

    def both():
        prediction, _ = reference_step.decode(model.decoder, slots.requires_grad_(), features, 0)
        prediction.sum().backward()

    other_half = len(model.decoder.transformer.blocks) * 2 * features.shape[1] ** 2 * features.shape[2]
    assert counted(both) == 3 * (step_flops.decoder(model, folded=False) + other_half)


def test_a_teachers_floor_stops_at_its_weights(model):
    """At least what the decoder's own `masks` leaves out: the last FFN."""
    _, features, slots = inputs(model)
    left_out = counted(model.decoder.forward, slots, features) - counted(model.decoder.masks, slots, features)
    assert step_flops.decoder(model) - step_flops.decoder(model, masks_only=True) >= left_out > 0


def test_caches_take_the_encoder_off(model):
    depth = len(model.encoder.vit.blocks)
    saved = step_flops.step(model, None, cached=False) - step_flops.step(model, None, cached=True)
    assert saved == step_flops.encoder(model, depth, embed=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_products_are_the_step_but_for_attention_and_slots(stage, tmp_path):
    """What is listed product by product is what the formulas count, at ViT-B/16 and COCO's settings: 95 % of them."""
    config = step_runs.settings(stage, precision="float32", batch_size=1)
    encoder = frozen_encoder(config)
    model = Spot(config, encoder)
    teacher = Spot(step_runs.settings(1, precision="float32", batch_size=1), encoder) if stage == 2 else None
    listed = sum(product.flops(1) * count for product, count in step_flops.products(model, teacher).items())
    tokens, dim = encoder.num_tokens, encoder.dim
    blocks = len(model.decoder.transformer.blocks)
    # per block: half of the N × N products, tokens by the slots of every head twice, and twice the folded projections
    columns, weights = config.dec_heads * config.num_slots, config.num_slots * dim
    attention = 2 * blocks * dim * (tokens**2 + 2 * tokens * columns + 2 * weights)
    rest = 3 * attention + (0 if teacher is None else attention)
    if stage == 2:
        rest += 3 * 2 * 2 * len(model.last_blocks) * (tokens + encoder.num_prefix) ** 2 * dim
    whole = step_flops.step(model, teacher, cached=True)
    assert 0.95 < listed / whole < 1 and abs(listed + rest - whole) / whole < 0.02  # slots are the rest
