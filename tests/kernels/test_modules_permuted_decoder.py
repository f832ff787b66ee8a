"""`PermutedDecoder`: how parameters start, what an order changes and what it does not."""

import math

import pytest
import torch

from initial_weights import uniform_bound, xavier
from spot_kernels import PermutedDecoder, PermutedDecoderBlock


def test_decoder_starts_as_specified():
    torch.manual_seed(0)
    blocks = 3
    decoder = PermutedDecoder(96, blocks=blocks, heads=6)
    gain = (3 * blocks) ** -0.5
    for block in decoder.blocks:
        for weight in block.self_attention.project_qkv.weight.chunk(3):
            xavier(weight)
        for name in ("project_q", "project_k", "project_v"):
            xavier(getattr(block.cross_attention, name).weight)
        for weight in (block.self_attention.project_o.weight, block.cross_attention.project_o.weight):
            xavier(weight, gain)
        uniform_bound(block.ffn[0].weight, math.sqrt(6 / 96))
        xavier(block.ffn[2].weight, gain)
        assert [name for name, _ in block.named_parameters() if "project" in name and "bias" in name] == []
        assert not block.ffn[0].bias.any() and not block.ffn[2].bias.any()


def decoder_and_inputs(**settings):
    torch.manual_seed(4)
    decoder = PermutedDecoder(24, **({"blocks": 3, "heads": 4} | settings)).double()
    return decoder, torch.randn(2, 9, 24).double(), torch.randn(2, 5, 24).double()


def test_an_order_only_relabels_tokens():
    """Decoding raster tokens in an order equals decoding the reordered tokens in raster order."""
    decoder, tokens, slots = decoder_and_inputs()
    raster = torch.arange(9)
    for seed in range(3):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        out, mean_map = decoder(tokens, slots, order)
        moved_out, moved_map = decoder(tokens[:, order], slots, raster)
        torch.testing.assert_close(out[:, order], moved_out)
        torch.testing.assert_close(mean_map[:, order], moved_map)


def test_an_order_for_each_sample():
    decoder, tokens, slots = decoder_and_inputs()
    orders = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    out, mean_map = decoder(tokens, slots, orders)
    for i in range(2):
        alone = decoder(tokens[i : i + 1], slots[i : i + 1], orders[i])
        torch.testing.assert_close((out[i : i + 1], mean_map[i : i + 1]), alone)


def test_without_an_order_every_token_sees_all():
    """The last token of an order sees everything either way; the first only without an order."""
    torch.manual_seed(5)
    attention = PermutedDecoder(24, blocks=1, heads=4).double().blocks[0].self_attention
    tokens, order = torch.randn(2, 9, 24).double(), torch.randperm(9)
    causal, free = attention(tokens, order), attention(tokens, None)
    torch.testing.assert_close(causal[:, order[-1]], free[:, order[-1]])
    assert (causal[:, order[0]] - free[:, order[0]]).abs().max() > 1e-3


def test_first_block_replaces_the_residual_stream():
    """x ← LN(x); x ← x + SA(x): a first block does not see the scale of its input, a later one does."""
    for first in (True, False):
        torch.manual_seed(6)
        block = PermutedDecoderBlock(24, 4, 4, gain=1.0, first=first).double()
        tokens, slots, order = torch.randn(2, 9, 24).double(), torch.randn(2, 5, 24).double(), torch.arange(9)
        same = torch.allclose(block(tokens, slots, order)[0], block(50 * tokens, slots, order)[0], atol=1e-3)
        assert same == first


def test_cross_heads_after_the_first_block():
    decoder, tokens, slots = decoder_and_inputs(cross_heads=2)
    assert [block.cross_attention.heads for block in decoder.blocks] == [4, 2, 2]
    assert [block.self_attention.heads for block in decoder.blocks] == [4, 4, 4]
    torch.testing.assert_close(decoder(tokens, slots, torch.arange(9))[1].sum(-1), torch.ones(2, 9).double())


@pytest.mark.parametrize("order", [None, torch.arange(9).flip(0)])
def test_masks_alone_are_those_of_forward(order):
    decoder, tokens, slots = decoder_and_inputs()
    assert torch.equal(decoder.masks(tokens, slots, order), decoder(tokens, slots, order)[1])


def test_empty_batch_and_one_slot():
    decoder, tokens, slots = decoder_and_inputs()
    out, mean_map = decoder(tokens[:0], slots[:0], torch.arange(9))
    assert out.shape == (0, 9, 24) and mean_map.shape == (0, 9, 5)
    assert torch.equal(decoder(tokens, slots[:, :1], torch.arange(9))[1], torch.ones(2, 9, 1).double())


def test_runs_under_autocast():
    """bf16 in the matrix products, results close to float32."""
    decoder, tokens, slots = (x.float() for x in decoder_and_inputs())
    expected, expected_map = decoder(tokens, slots, torch.arange(9))
    with torch.autocast("cpu", torch.bfloat16):
        out, mean_map = decoder(tokens, slots, torch.arange(9))
    out.float().square().mean().backward()
    assert mean_map.dtype == torch.float32
    assert (mean_map - expected_map).abs().max() < 0.02
    assert (out.float() - expected).abs().max() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_heads": 5}, "cross_heads=5 does not divide the width 24"),
        ({"blocks": 0}, "blocks=0"),
        ({"activation": "tanh"}, "activation='tanh' is unknown: use one of relu, gelu"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PermutedDecoder(24, **{"blocks": 2, "heads": 4} | options)
