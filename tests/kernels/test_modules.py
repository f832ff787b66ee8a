"""The modules: how parameters start, what each option computes, which way gradients go, what an order changes."""

import math

import pytest
import torch
import torch.nn.functional as F

from spot_kernels.modules.slot_attention import (
    TRUNCATIONS,
    InitialSlots,
    PermutedDecoder,
    PermutedDecoderBlock,
    SlotAttention,
)


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


def test_default_parameters_keep_their_names():
    """Checkpoints of SPOT are read by these names."""
    assert list(SlotAttention(12, 8, mlp_hidden=16).state_dict()) == [
        "norm_inputs.weight",
        "norm_inputs.bias",
        "norm_slots.weight",
        "norm_slots.bias",
        "norm_mlp.weight",
        "norm_mlp.bias",
        "project_q.weight",
        "project_k.weight",
        "project_v.weight",
        "gru.weight_ih",
        "gru.weight_hh",
        "gru.bias_ih",
        "gru.bias_hh",
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
    ]


def with_options(module, inputs, slots, options):
    """Slot attention head by head, every option where its documentation says; returns the slots and attn."""
    heads, eps, in_sum = options.get("heads", 1), options.get("eps", 1e-8), options.get("eps_in") == "sum"
    inputs = module.norm_inputs(inputs)
    parts = [part.chunk(heads, -1) for part in (module.project_k(inputs), module.project_v(inputs))]
    for i in range(options.get("iterations", 3)):
        queries = module.project_q(module.norm_slots(slots)).chunk(heads, -1)
        scale = options.get("scale", queries[0].shape[-1] ** -0.5)
        logits = [scale * k @ q.mT for q, k in zip(queries, parts[0], strict=True)]
        if options.get("joint_heads", True):
            attention = torch.cat(logits, -1).softmax(-1).chunk(heads, -1)
            attn = sum(attention)
        else:
            attention = [part.softmax(-1) for part in logits]
            attn = sum(attention) / heads
        weights = [a if in_sum else a + eps for a in attention]
        sums = [w.sum(1).unsqueeze(-1) + (eps if in_sum else 0) for w in weights]
        updates = torch.cat([w.mT @ v / s for w, v, s in zip(weights, parts[1], sums, strict=True)], -1)
        if "out_dim" in options:
            updates = module.project_out(updates)
        match options.get("update", "gru"):
            case "gru":
                slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            case "residual":
                slots = slots + updates
            case "replace":
                slots = updates
        if module.mlp is None or i == options.get("iterations", 3) - 1 and not options.get("mlp_last", True):
            continue
        norm = options.get("mlp_norm", "pre")
        x = module.norm_mlp(slots) if norm == "pre" else slots
        hidden = F.linear(x, module.mlp[0].weight, module.mlp[0].bias)
        x = module.mlp[2](F.gelu(hidden) if options.get("activation") == "gelu" else hidden.relu())
        slots = slots + x if options.get("mlp_residual", True) else x
        slots = module.norm_mlp(slots) if norm == "post" else slots
    return slots, attn


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.1},
        {"eps": 1.0, "eps_in": "sum"},
        {"eps": 0.3, "eps_in": "sum", "heads": 2},
        {"eps": 0.3, "eps_in": "sum", "heads": 4, "joint_heads": False},
        {"heads": 2, "joint_heads": False},
        {"heads": 4, "inner_dim": 20, "scale": 0.7},
        {"heads": 2, "out_dim": 4, "bias": True},
        {"update": "replace", "mlp_norm": "none"},
        {"update": "residual", "mlp_norm": "post", "activation": "gelu"},
        {"update": "residual", "inner_dim": 12, "out_dim": 8, "mlp_hidden": None},
        {"mlp_norm": "post", "mlp_last": False},
        {"mlp_residual": False, "norm_eps": 0.1},
        {"mlp_last": False, "iterations": 1},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()),
)
def test_options_equal_their_formula(options):
    torch.manual_seed(1)
    module = SlotAttention(12, 8, **{"mlp_hidden": 16} | options).double()
    assert {norm.eps for norm in module.modules() if isinstance(norm, torch.nn.LayerNorm)} == {
        options.get("norm_eps", 1e-5)
    }
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.7)
    inputs, slots = torch.randn(2, 10, 12).double(), torch.randn(2, 3, 8).double().requires_grad_()
    expected, expected_attn = with_options(module, inputs, slots, options)
    found, attn, logits = module(inputs, slots)
    torch.testing.assert_close((found, attn), (expected, expected_attn))
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, 10).double())
    assert logits.shape == (2, options.get("heads", 1), 10, 3)
    parameters = [slots, *(p for p in module.parameters() if p is not None)]
    gradients = [
        torch.autograd.grad(x.square().sum() + a.square().sum(), parameters, allow_unused=True)
        for x, a in ((found, attn), (expected, expected_attn))
    ]
    torch.testing.assert_close(*gradients)


def test_a_slot_without_weight_gives_no_nan():
    """All attention of a slot underflows: with eps in the sum its update is 0, as in the formula."""
    module = SlotAttention(4, 4, mlp_hidden=None, eps=1e-8, eps_in="sum", iterations=1, update="replace", scale=1e4)
    slots = torch.eye(4)[None].requires_grad_()
    inputs = (torch.eye(4)[:1] @ module.project_k.weight).expand(1, 5, 4) * 10
    found, attn, _ = module(inputs, slots)
    assert (attn.sum(1) == 0).any()
    assert not found[0][attn.sum(1)[0] == 0].any()
    found.square().sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(slots.grad).all()


def test_iterations_of_a_call():
    torch.manual_seed(1)
    module, inputs, slots = SlotAttention(12, 8, mlp_hidden=16), torch.randn(2, 10, 12), torch.randn(2, 3, 8)
    longer = SlotAttention(12, 8, mlp_hidden=16, iterations=5)
    longer.load_state_dict(module.state_dict())
    assert torch.equal(module(inputs, slots, iterations=5)[0], longer(inputs, slots)[0])
    with pytest.raises(ValueError, match="iterations=0"):
        module(inputs, slots, iterations=0)


def test_drop_path_leaves_out_the_mlp_of_samples_in_training():
    torch.manual_seed(1)
    module = SlotAttention(12, 8, mlp_hidden=16, iterations=1, drop_path=0.25).double()
    inputs, slots = torch.randn(200, 5, 12).double(), torch.randn(200, 3, 8).double()
    found = module(inputs, slots)[0]
    full = module.eval()(inputs, slots)[0]
    module.mlp_last = False
    without = module(inputs, slots)[0]
    left_out = (found == without).all((1, 2))
    torch.testing.assert_close(found[~left_out], (without + (full - without) / 0.75)[~left_out])
    assert 0.1 < left_out.double().mean() < 0.4


def test_initial_slots_start_as_specified():
    torch.manual_seed(0)
    gaussian = InitialSlots(512)
    assert gaussian.mean.shape == gaussian.scale.shape == (1, 1, 512)
    uniform_bound(gaussian.mean, math.sqrt(3 / 512))
    uniform_bound(gaussian.scale, math.sqrt(3 / 512))
    learned = InitialSlots(512, "learned", num_slots=7)
    assert [name for name, _ in learned.named_parameters()] == ["mean"]
    uniform_bound(learned.mean, math.sqrt(6 / 519))
    for spread in ("softplus", "abs"):
        drawn = InitialSlots(512, "slot_gaussian", num_slots=7, spread=spread)(64)
        torch.testing.assert_close(drawn.std().item(), 1.0, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "slot_gaussian", "learned"])
def test_initial_slots_equal_their_formula(kind):
    torch.manual_seed(0)
    noise = torch.randn(2, 5, 8)
    spreads = {"exp": torch.exp, "softplus": F.softplus, "abs": torch.abs}
    for spread, function in spreads.items():
        initial = InitialSlots(8, kind, num_slots=5, spread=spread)
        for parameter in initial.parameters():
            parameter.data.normal_()
        scale = 0 if kind == "learned" else function(initial.scale)
        torch.testing.assert_close(initial(2, noise=noise), (initial.mean + scale * noise).expand(2, 5, 8))
    if kind == "learned":
        torch.testing.assert_close(initial(2, noise=noise, jitter=0.5), initial.mean * (1 + 0.5 * noise))
        initial(2, noise=noise, jitter=0.5).sum().backward()
        torch.testing.assert_close(initial.mean.grad, torch.full((1, 5, 8), 2.0))


def test_a_module_with_its_own_initial_slots():
    torch.manual_seed(0)
    module = SlotAttention(12, 8, mlp_hidden=16, initial="gaussian")
    inputs, noise = torch.randn(2, 10, 12), torch.randn(2, 4, 8)
    found = module(inputs, num_slots=4, noise=noise)
    torch.testing.assert_close(found, module(inputs, module.initial(2, 4, noise=noise)))
    assert module(inputs, num_slots=6)[0].shape == (2, 6, 8)
    found[0].sum().backward()
    assert module.initial.mean.grad.any() and module.initial.scale.grad.any()
    learned = SlotAttention(12, 8, mlp_hidden=16, initial="learned", num_slots=3, truncation="bi_level")
    learned(inputs)[0].square().sum().backward()
    assert learned.initial.mean.grad.any()


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
    with pytest.raises(ValueError, match="activation='tanh' is unknown: use one of relu, gelu"):
        PermutedDecoder(24, blocks=1, heads=4, activation="tanh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps_in": "mean"}, "eps_in='mean' is unknown: use one of weights, sum"),
        ({"update": "lstm"}, "update='lstm' is unknown"),
        ({"hidden": "both"}, "hidden='both' is unknown: use one of slots, normed"),
        ({"activation": "tanh"}, "activation='tanh' is unknown: use one of relu, gelu"),
        ({"mlp_norm": "both"}, "mlp_norm='both' is unknown"),
        ({"update": "residual", "inner_dim": 32}, "needs updates as wide as the slots, 64: inner_dim is 32"),
        ({"heads": 3, "inner_dim": 64}, "heads=3 does not divide the width 64"),
        ({"drop_path": 1.0}, "drop_path=1.0 must be a probability"),
        ({"dropout": 1.5}, "dropout=1.5 must be a probability"),
        ({"initial": "zeros"}, "initial='zeros' is unknown"),
        ({"initial": "learned"}, "initial='learned' has parameters for each slot: pass num_slots"),
        ({"initial": "gaussian", "num_slots": 0}, "num_slots=0"),
        ({"initial": "gaussian", "spread": "log"}, "spread='log' is unknown"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SlotAttention(96, 64, mlp_hidden=8, **options)


def test_bad_initial_slots_are_named():
    inputs, slots = torch.randn(2, 10, 12), torch.randn(2, 3, 8)
    plain = SlotAttention(12, 8, mlp_hidden=16)
    with pytest.raises(ValueError, match="pass initial slots, or build the module with initial"):
        plain(inputs)
    with pytest.raises(ValueError, match="slots were passed, so num_slots and noise say nothing"):
        plain(inputs, slots, num_slots=3)
    with pytest.raises(ValueError, match="pass num_slots"):
        SlotAttention(12, 8, mlp_hidden=16, initial="gaussian")(inputs)
    learned = SlotAttention(12, 8, mlp_hidden=16, initial="slot_gaussian", num_slots=3)
    with pytest.raises(ValueError, match="num_slots=4, but there are parameters for 3"):
        learned(inputs, num_slots=4)
    with pytest.raises(ValueError, match=r"noise \(2, 4, 8\) must be \(2, 3, 8\)"):
        learned(inputs, noise=torch.randn(2, 4, 8))
