"""Protects the masked decoder: what is hidden, what a prediction may depend on, and that evaluation hides nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_tier import DEVICE, needs_triton
from small_models import small_model
from spot_fast.model.decoders import AutoregressiveDecoder
from spot_fast.model.masked_decoder import MaskedDecoder
from spot_fast.model.spot import reconstruction_loss
from spot_kernels.dispatch import use_backend

TOKENS, WIDTH = 16, 24


def masked(**settings) -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(WIDTH, 12, TOKENS, **({"blocks": 2, "heads": 4} | settings)).double()


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 5, 12).double(), torch.randn(batch, TOKENS, WIDTH).double()


def drawn(decoder: MaskedDecoder, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return decoder.draws(batch, torch.Generator().manual_seed(seed))


def test_it_is_the_authors_shuffled_decoder():
    """Tokens laid out in a random order, the first few kept, the rest replaced, all with the positions of their own
    place, decoded without a causal mask and put back: DIAS's ARRandTransformerDecoder.
    """
    decoder, (slots, target) = masked(), inputs()
    order = torch.stack([torch.randperm(TOKENS) for _ in target])
    shown = torch.tensor([0, 5, TOKENS - 2])
    rows = order.unsqueeze(-1).expand(-1, -1, WIDTH)
    tokens = decoder.input_proj(target).gather(1, rows)
    for image, count in enumerate(shown):
        tokens[image, count:] = decoder.mask_token
    tokens = tokens + decoder.positions.expand(3, -1, -1).gather(1, rows)
    prediction, masks = decoder.transformer(tokens, decoder.slot_proj(slots), None)
    back = order.argsort(1).unsqueeze(-1)
    hidden = order.argsort(1) >= shown.unsqueeze(1)
    found = decoder(slots, target, draws={"hidden": hidden})
    torch.testing.assert_close(found[0], prediction.gather(1, back.expand(-1, -1, WIDTH)))
    torch.testing.assert_close(found[1], masks.gather(1, back.expand(-1, -1, 5)))


def test_a_hidden_feature_is_never_seen_and_a_shown_one_by_all():
    decoder, (slots, target) = masked(), inputs(1)
    hidden = torch.arange(TOKENS).unsqueeze(0) >= 6
    before = decoder(slots, target, draws={"hidden": hidden})[0]
    for token, seen in ((3, True), (9, False)):
        changed = target.clone()
        changed[:, token] += 1.0
        after = decoder(slots, changed, draws={"hidden": hidden})[0]
        assert (before != after).any(-1).all() if seen else torch.equal(before, after)


def test_every_parameter_trains():
    decoder, (slots, target) = masked(), inputs()
    reconstruction_loss(decoder(slots, target, draws=drawn(decoder, 3))[0], target).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_numbers_of_shown_tokens_are_those_of_the_authors():
    """Half of the images have the fixed share, the others any number up to N - 2; where they lie is any place."""
    decoder, images = masked(shown=0.25), 4000
    hidden = drawn(decoder, images)["hidden"]
    assert hidden.dtype == torch.bool and hidden.shape == (images, TOKENS)
    counts = (~hidden).sum(1).bincount(minlength=TOKENS + 1) / images
    uniform = 0.5 / (TOKENS - 1)
    assert counts[TOKENS - 1 :].sum() == 0
    torch.testing.assert_close(counts[4].item(), 0.5 + uniform, atol=0.03, rtol=0)
    others = counts[: TOKENS - 1][torch.arange(TOKENS - 1) != 4]
    torch.testing.assert_close(others, torch.full_like(others, uniform), atol=0.012, rtol=0)
    by_place = hidden.float().mean(0)
    torch.testing.assert_close(by_place, by_place.mean().expand(TOKENS), atol=0.03, rtol=0)


@pytest.mark.parametrize("settings, count", [(dict(shown=0.5, drawn=0.0), 8), (dict(shown=0.0, drawn=0.0), 0)])
def test_a_share_that_is_not_drawn_is_every_images(settings, count):
    hidden = drawn(masked(**settings), 50)["hidden"]
    assert (~hidden).sum(1).tolist() == [count] * 50
    assert count == 0 or len(hidden.unique(dim=0)) > 40


def test_draws_are_a_function_of_the_generator():
    decoder = masked()
    one, same, other = (drawn(decoder, 8, seed)["hidden"] for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_without_draws_nothing_is_hidden_and_masks_are_those_of_forward():
    decoder, (slots, target) = masked(), inputs()
    nothing = decoder(slots, target, draws={"hidden": torch.zeros(3, TOKENS, dtype=torch.bool)})
    for found in (decoder(slots, target), decoder(slots, target, torch.tensor(0))):
        assert torch.equal(found[0], nothing[0]) and torch.equal(found[1], nothing[1])
    assert torch.equal(decoder.masks(slots, target), nothing[1])
    hidden = decoder(slots, target, draws=drawn(decoder, 3))[1]
    assert (hidden - nothing[1]).abs().max() > 1e-4


def test_the_model_hands_it_its_draws_in_training_alone():
    model = small_model(decoder="masked")
    features = torch.randn(2, model.encoder.num_tokens, model.encoder.dim)
    noise = torch.randn(2, 4, 16)
    draws = drawn(model.decoder, 2)
    output = model(features, features, noise=noise, draws=draws)
    slots = output.slots
    for name, expected in zip(("prediction", "masks"), model.decoder(slots, features, draws=draws), strict=True):
        assert torch.equal(getattr(output, name), expected)
    plain = model(features, features, noise=noise)
    assert model.num_orders == 1 and not torch.equal(plain.masks, output.masks)
    assert torch.equal(model.decode_masks(slots, features), plain.masks)
    for found, name in zip(model.decode_all_orders(slots, features), ("prediction", "masks"), strict=True):
        assert torch.equal(found, getattr(plain, name))


class Operators(TorchDispatchMode):
    """Names of the operators of ours that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "spot_kernels":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def results(decoder, slots, target, **options) -> tuple[set[str], list[torch.Tensor]]:
    """Operators that ran, and prediction, masks and gradients of one decoding."""
    with Operators() as ran:
        prediction, masks = decoder(slots, target, **options)
        loss = reconstruction_loss(prediction, target) + masks.sin().mean()
        gradients = torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)
    return ran.names, [prediction, masks, *(gradient for gradient in gradients if gradient is not None)]


@needs_triton
def test_kernels_are_those_of_a_parallel_autoregressive_step():
    """No causal mask, so attention among tokens is PyTorch's; all else runs in the kernels that CapPa's steps use."""
    decoder, (slots, target) = masked().float().to(DEVICE), (each.float().to(DEVICE) for each in inputs())
    options = {"draws": {"hidden": drawn(decoder, 3)["hidden"].to(DEVICE)}}
    cappa = AutoregressiveDecoder(WIDTH, 12, 4, blocks=2, heads=4, orders="standard", cappa=0.5).to(DEVICE)
    with use_backend("torch"):
        _, expected = results(decoder, slots, target, **options)
    with use_backend("triton"):
        ran, found = results(decoder, slots, target, **options)
        of_cappa, _ = results(cappa, slots, target, parallel=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert ran == of_cappa > {"slot_cross_attention", "slot_cross_attention_backward"}
