"""`SlotAttention`: how parameters start, what each option computes, which way gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F

from initial_weights import uniform_bound, xavier
from spot_kernels import SlotAttention, dispatch
from spot_kernels.modules.slot_attention import TRUNCATIONS


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
    before_last = with_options(modules["none"], inputs, slots, {"iterations": 2})[0].detach().requires_grad_()
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
    norms = [f"norm_{name}.{part}" for name in ("inputs", "slots", "mlp") for part in ("weight", "bias")]
    others = """project_q.weight project_k.weight project_v.weight gru.weight_ih gru.weight_hh gru.bias_ih gru.bias_hh
    mlp.0.weight mlp.0.bias mlp.2.weight mlp.2.bias"""
    assert list(SlotAttention(12, 8, mlp_hidden=16).state_dict()) == [*norms, *others.split()]


def with_options(module, inputs, slots, options):
    """SPEC section 2 head by head, every option where its documentation says: slots, attn and logits."""
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
    return slots, attn, torch.stack(logits, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 1},
        {"iterations": 2},
        {"iterations": 4, "eps": 0.1},
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
    results, expected = tuple(module(inputs, slots)), with_options(module, inputs, slots, options)
    torch.testing.assert_close(results, expected)
    leaves = [slots, *module.parameters()]
    gradients = [
        torch.autograd.grad(x.square().sum() + attn.square().sum(), leaves, allow_unused=True)
        for x, attn, _ in (results, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_a_slot_without_weight_gives_no_nan():
    """All attention of a slot underflows: with eps in the sum its update is 0, as in the formula."""
    module = SlotAttention(4, 4, mlp_hidden=None, eps=1e-8, eps_in="sum", iterations=1, update="replace", scale=1e4)
    slots = torch.eye(4)[None].requires_grad_()
    inputs = (torch.eye(4)[:1] @ module.project_k.weight).expand(1, 5, 4) * 10
    updated, attn, _ = module(inputs, slots)
    assert (attn.sum(1) == 0).any()
    assert not updated[0][attn.sum(1)[0] == 0].any()
    updated.square().sum().backward()
    assert torch.isfinite(updated).all() and torch.isfinite(slots.grad).all()


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
    dropped = module(inputs, slots)[0]
    full = module.eval()(inputs, slots)[0]
    module.mlp_last = False
    without = module(inputs, slots)[0]
    left_out = (dropped == without).all((1, 2))
    torch.testing.assert_close(dropped[~left_out], (without + (full - without) / 0.75)[~left_out])
    assert 0.1 < left_out.double().mean() < 0.4


def test_empty_batch_and_one_slot():
    torch.manual_seed(4)
    module, tokens = SlotAttention(24, 8, mlp_hidden=16).double(), torch.randn(2, 9, 24).double()
    assert module(tokens[:0], torch.empty(0, 5, 8).double())[0].shape == (0, 5, 8)
    assert torch.equal(module(tokens, torch.randn(2, 1, 8).double())[1], torch.ones(2, 9, 1).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5 does not divide the width 64"),
        ({"iterations": 0}, "iterations=0"),
        ({"truncation": "bilevel"}, "truncation='bilevel' is unknown"),
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joint_heads", [False, True])
def test_keys_and_values_of_one_product_are_those_of_two(bias, joint_heads):
    torch.manual_seed(0)
    module = SlotAttention(12, 8, mlp_hidden=16, heads=2, bias=bias, joint_heads=joint_heads).double()
    inputs, slots = torch.randn(2, 9, 12).double(), torch.randn(2, 3, 8).double()

    def run():
        results = module(inputs, slots)
        return *results, *torch.autograd.grad(sum(x.square().sum() for x in results), tuple(module.parameters()))

    joined = run()
    with dispatch.without("joined_projections"):
        torch.testing.assert_close(joined, run())


def test_projections_that_are_more_than_linear_layers_are_called():
    module, seen = SlotAttention(12, 8, mlp_hidden=16), []
    module(torch.randn(2, 9, 12), torch.randn(2, 3, 8))
    module.project_v.register_forward_hook(lambda *_: seen.append("v"))
    module(torch.randn(2, 9, 12), torch.randn(2, 3, 8))
    assert seen == ["v"]
