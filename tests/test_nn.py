"""spot_kernels.nn: how parameters start, which way gradients go, and that an order only relabels tokens."""

import math

import pytest
import torch

from spot_kernels.nn import TRUNCATIONS, PermutedDecoder, PermutedDecoderBlock, SlotAttention


def uniform_bound(weight, bound):
    """Uniform in ±bound: nothing beyond, the extremes reached, standard deviation bound / √3."""
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.abs().max() > 0.95 * bound
    torch.testing.assert_close(weight.std().item(), bound / math.sqrt(3), rtol=0.06, atol=0)


def xavier(weight, gain=1.0):
    uniform_bound(weight, gain * math.sqrt(6 / sum(weight.shape)))


def test_slot_attention_starts_as_specified():
    torch.manual_seed(0)
    module = SlotAttention(96, 64, mlp_hidden=128)
    for projection in (module.project_q, module.project_k, module.project_v):
        assert projection.bias is None
        xavier(projection.weight)
    xavier(module.gru.weight_ih)
    recurrent = module.gru.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(64), rtol=0, atol=1e-5)
    assert not module.gru.bias_ih.any() and not module.gru.bias_hh.any()
    uniform_bound(module.mlp[0].weight, math.sqrt(6 / 64))
    xavier(module.mlp[2].weight)
    assert not module.mlp[0].bias.any() and not module.mlp[2].bias.any()
    assert {norm.eps for norm in module.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-5}


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


def by_hand(module, inputs, slots):
    """Slot attention as SPEC section 2 states it, one head; returns the slots after every iteration."""
    inputs = module.norm_inputs(inputs)
    k = module.project_k(inputs) * slots.shape[-1] ** -0.5
    v = module.project_v(inputs)
    history = [slots]
    for _ in range(module.iterations):
        logits = k @ module.project_q(module.norm_slots(slots)).mT
        weights = logits.softmax(-1) + 1e-8
        updates = (weights / weights.sum(1, keepdim=True)).mT @ v
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(module.norm_mlp(slots))
        history.append(slots)
    return history, logits


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_slot_attention_equals_the_formula(iterations):
    torch.manual_seed(1)
    module = SlotAttention(12, 8, mlp_hidden=16, iterations=iterations).double()
    inputs, slots = torch.randn(2, 10, 12).double(), torch.randn(2, 3, 8).double()
    history, logits = by_hand(module, inputs, slots)
    got_slots, got_attn, got_logits = module(inputs, slots)
    torch.testing.assert_close(got_slots, history[-1])
    torch.testing.assert_close(got_logits[:, 0], logits)
    torch.testing.assert_close(got_attn, logits.softmax(-1))


def test_truncations_agree_forward_and_differ_backward():
    """none sends gradients to the initial slots through all iterations, fixed_point none, bi_level straight."""
    torch.manual_seed(2)
    modules = {t: SlotAttention(12, 8, mlp_hidden=16, truncation=t).double() for t in TRUNCATIONS}
    inputs = torch.randn(2, 10, 12).double()
    grads, outputs = {}, {}
    for truncation, module in modules.items():
        module.load_state_dict(modules["none"].state_dict())
        slots = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        outputs[truncation] = module(inputs, slots)[0]
        outputs[truncation].square().sum().backward()
        grads[truncation] = slots.grad
    assert torch.equal(outputs["none"], outputs["fixed_point"]) and torch.equal(outputs["none"], outputs["bi_level"])
    assert grads["fixed_point"] is None
    # Straight through: the gradient at the last iteration's input.
    before_last = by_hand(modules["none"], inputs, slots)[0][-2].detach().requires_grad_()
    last = SlotAttention(12, 8, mlp_hidden=16, iterations=1).double()
    last.load_state_dict(modules["none"].state_dict())
    last(inputs, before_last)[0].square().sum().backward()
    torch.testing.assert_close(grads["bi_level"], before_last.grad)
    assert (grads["none"] - grads["bi_level"]).abs().max() > 1e-3


def test_slot_attention_treats_slots_alike():
    """Permuted initial slots give permuted results."""
    torch.manual_seed(3)
    module = SlotAttention(12, 8, mlp_hidden=16, heads=2).double()
    inputs, slots = torch.randn(2, 10, 12).double(), torch.randn(2, 5, 8).double()
    permutation = torch.randperm(5)
    plain, permuted = module(inputs, slots), module(inputs, slots[:, permutation])
    torch.testing.assert_close(permuted[0], plain[0][:, permutation])
    torch.testing.assert_close(permuted[1], plain[1][..., permutation])


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
    slot_attention = SlotAttention(24, 8, mlp_hidden=16).double()
    assert slot_attention(tokens[:0], torch.empty(0, 5, 8).double())[0].shape == (0, 5, 8)
    assert torch.equal(slot_attention(tokens, torch.randn(2, 1, 8).double())[1], torch.ones(2, 9, 1).double())


def test_runs_under_autocast():
    """bf16 in the matrix products, results close to float32."""
    decoder, tokens, slots = (x.float() for x in decoder_and_inputs())
    slot_attention = SlotAttention(24, 24, mlp_hidden=16)
    with torch.autocast("cpu", torch.bfloat16):
        found, _, logits = slot_attention(tokens, slots)
        out, mean_map = decoder(tokens, found, torch.arange(9))
        (out.float().square().mean() + logits.float().mean()).backward()
    expected, expected_map = decoder(tokens, slot_attention(tokens, slots)[0], torch.arange(9))
    assert mean_map.dtype == torch.float32
    assert (mean_map - expected_map).abs().max() < 0.02
    assert (out.float() - expected).abs().max() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="heads=5 does not divide the width 64"):
        SlotAttention(96, 64, mlp_hidden=8, heads=5)
    with pytest.raises(ValueError, match="iterations=0"):
        SlotAttention(96, 64, mlp_hidden=8, iterations=0)
    with pytest.raises(ValueError, match="truncation='bilevel' is unknown"):
        SlotAttention(96, 64, mlp_hidden=8, truncation="bilevel")
    with pytest.raises(ValueError, match="cross_heads=5 does not divide the width 24"):
        PermutedDecoder(24, blocks=2, heads=4, cross_heads=5)
    with pytest.raises(ValueError, match="blocks=0"):
        PermutedDecoder(24, blocks=0, heads=4)
