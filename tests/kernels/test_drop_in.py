"""`SlotAttention` in place of published modules: same numbers from their parameters; the README's examples run."""

import re

import pytest
import torch

from kernel_tier import GRADIENT, OUTPUT, assert_as_exact, joined
from paths import ROOT
from published_variants import BATCH, CASES, HIDDEN, SLOT_WIDTH, SLOTS, TOKENS, random_state
from spot_kernels.modules import VARIANTS, SlotAttention
from spot_kernels.modules.name_maps import NAMES, from_state_dict_of

README = ROOT / "kernels" / "README.md"


def variant_of(case):
    return re.match(r"\w+", case)[0]


def ours(case, state):
    """Our module for a case, its parameters loaded by their published names."""
    variant, (_, _, options, _) = variant_of(case), CASES[case]
    width = from_state_dict_of(variant, state)["norm_inputs.weight"].shape[0]
    module = SlotAttention.like(variant, width, SLOT_WIDTH, **{"mlp_hidden": HIDDEN, "initial": None} | options)
    module.to(next(iter(state.values())).dtype).load_variant(variant, state)
    return module


def run(case, dtype, *, published, seed=0):
    """slots, attn [B, N, K] and all gradients, the parameters' by our names, of the formula or of our module."""
    formula, shapes, _, settings = CASES[case]
    state = {name: value.to(dtype) for name, value in random_state(shapes, seed).items()}
    module = ours(case, state)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = random(BATCH, TOKENS, module.norm_inputs.weight.shape[0]).requires_grad_()
    slots = random(BATCH, SLOTS, SLOT_WIDTH).requires_grad_()
    if published:
        state = {name: value.requires_grad_() for name, value in state.items()}
        updated, attn = formula(state, inputs, slots, **settings)
        # the softmax runs over the heads as well, or every head has its own
        attn = (attn.sum(1) / attn.sum((1, 2)).unsqueeze(1)).mT
    else:
        updated, attn, _ = module(inputs, slots)
    ((updated * random(*updated.shape)).sum() + (attn * random(*attn.shape)).sum()).backward()

    def grad(tensor):
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    if published:
        grads = from_state_dict_of(variant_of(case), {name: grad(value) for name, value in state.items()})
    else:
        grads = {name: grad(parameter) for name, parameter in module.named_parameters()}
    return {"slots": updated.detach(), "attn": attn.detach()}, grads | {"inputs": grad(inputs), "slots": grad(slots)}


def comparable(case, grads):
    """Flax has no bias in two gates of the hidden state: drop the gradients of ours there."""
    if variant_of(case) == "savi":
        grads = grads | {"gru.bias_hh": grads["gru.bias_hh"][2 * SLOT_WIDTH :]}
    return grads


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_from_published_parameters(case):
    """Float64: outputs and every gradient, to rounding."""
    (expected, grads), (outputs, our_grads) = (run(case, torch.float64, published=each) for each in (True, False))
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(comparable(case, our_grads), comparable(case, grads), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_exact_as_the_formula(case):
    """Over a few draws together: of one, the formula's own error may happen to be small."""

    def results(dtype, published):
        runs = [run(case, dtype, published=published, seed=seed) for seed in range(8)]
        outputs = {(seed, name): x for seed, (o, _) in enumerate(runs) for name, x in o.items()}
        grads = {(seed, name): x for seed, (_, g) in enumerate(runs) for name, x in comparable(case, g).items()}
        return outputs, grads

    exact, plain, module = results(torch.float64, True), results(torch.float32, True), results(torch.float32, False)
    for i, (what, factor) in enumerate((("outputs", OUTPUT), ("gradients", GRADIENT))):
        assert_as_exact(f"{case}: {what}", *(joined(x[i], exact[i]) for x in (module, exact, plain)), factor)


def test_every_variant_is_rebuilt():
    """Here, or as a class only in test_published_classes: ports, and those with another one's formula and layers."""
    classes = {"object_centric_library", "osrt", "motion_grouping"}
    alike = {"adaslot": "dinosaur", "mot": "dinosaur", "coda": "lsd", "dias": "ocbench", "metaslot": "ocbench"}
    assert {variant_of(case) for case in CASES} | classes | set(alike) == set(VARIANTS) == set(NAMES)
    assert all(NAMES[variant] == NAMES[other] for variant, other in alike.items())


@pytest.mark.parametrize(
    ("variant", "prefix", "initial_prefix", "mean", "scale"),
    [
        ("locatello", "", None, "slots_mu", "slots_log_sigma"),
        ("lucidrains", "", None, "slots_mu", "slots_logsigma"),
        ("lucidrains_heads", "", None, "slots_mu", "slots_logsigma"),
        ("evelinehong", "slot_attention.", None, "slots_mu", "slots_log_sigma"),
        ("untitled_ai", "slot_attention.", None, "slots_mu", "slots_log_sigma"),
        ("lsd", "", None, "slot_mu", "slot_log_sigma"),
        ("slate", "slot_attn.slot_attention.", "slot_attn.", "slot_mu", "slot_log_sigma"),
        ("steve", "steve_encoder.savi.", None, "slot_mu", "slot_log_sigma"),
        ("dinosaur", "perceptual_grouping.slot_attention.", "conditioning.", "slots_mu", "slots_logsigma"),
        ("ftdinosaur", "slot_attention.slot_attention.", "slot_init.", "slots_mu", "slots_logsigma"),
        ("spot", "slot_attn.slot_attention.", "slot_attn.", "slot_mu", "slot_log_sigma"),
    ],
)
def test_initial_slots_of_a_whole_checkpoint(variant, prefix, initial_prefix, mean, scale):
    """The parameters are found among a model's, and noise becomes slots by mean + exp(scale) · noise."""
    _, shapes, options, _ = CASES[variant]
    state = {prefix + name: value for name, value in random_state(shapes).items()}
    mu, log_sigma, noise = (torch.randn(shape).double() for shape in ((1, 1, SLOT_WIDTH),) * 2 + ((2, 4, SLOT_WIDTH),))
    begin = prefix if initial_prefix is None else initial_prefix
    state |= {begin + mean: mu, begin + scale: log_sigma}
    if prefix:
        # of the rest of the model
        state |= {"slot_attn.mlp.0.weight": torch.empty(3, 3), "decoder.weight": torch.empty(3)}
    if variant == "steve":
        state[f"{prefix}predictor.blocks.0.ffn.0.weight"] = torch.empty(3)
    if variant == "lsd":
        state |= {f"{name}.weight": torch.empty(3) for name in ("in_layer_norm", "in_mlp.0", "out_linear")}
        state |= {"pos.pe": torch.empty(3), "out_layer_norm.bias": torch.empty(3)}
    width = state[next(name for name in state if "norm_input" in name)].shape[0]
    module = SlotAttention.like(variant, width, SLOT_WIDTH, mlp_hidden=HIDDEN, **options).double()
    module.load_variant(variant, state, prefix=prefix, initial_prefix=initial_prefix)
    torch.testing.assert_close(module.initial(2, 4, noise=noise), mu + log_sigma.exp() * noise)


@pytest.mark.parametrize(
    ("variant", "name"), [("bo_qsa", "slots_init.weight"), ("spot", "slots_init.weight"), ("dinosaur", "slots")]
)
def test_learned_slots_of_a_checkpoint(variant, name):
    state = random_state(CASES[variant][1])
    embedding = torch.randn(SLOTS, SLOT_WIDTH).double()
    state[name] = embedding if name.endswith("weight") else embedding[None]
    width = from_state_dict_of(variant, state)["norm_inputs.weight"].shape[0]
    module = SlotAttention.like(variant, width, SLOT_WIDTH, mlp_hidden=HIDDEN, initial="learned", num_slots=SLOTS)
    module.double().load_variant(variant, state)
    assert torch.equal(module.initial(2), embedding.expand(2, -1, -1))


def test_a_gaussian_for_each_slot_of_a_whole_checkpoint():
    state = {f"slot_attn.{name}": value for name, value in random_state(CASES["bo_qsa_plain"][1]).items()}
    mean, spread, noise = (torch.randn(size, SLOTS, SLOT_WIDTH).double() for size in (1, 1, 2))
    state |= {"slot_mu": mean, "slot_log_sigma": spread, "decoder.weight": torch.empty(3)}
    module = SlotAttention.like("bo_qsa_plain", SLOT_WIDTH, SLOT_WIDTH, mlp_hidden=HIDDEN, num_slots=SLOTS).double()
    module.load_variant("bo_qsa_plain", state, prefix="slot_attn.", initial_prefix="")
    torch.testing.assert_close(module.initial(2, noise=noise), mean + spread.exp() * noise)


def test_the_standard_deviation_itself_is_read_as_that():
    state = random_state(CASES["evelinehong_2021"][1])
    state |= {"slots_mu": torch.zeros(1, 1, SLOT_WIDTH), "slots_sigma": torch.full((1, 1, SLOT_WIDTH), 0.5)}
    module = SlotAttention.like("evelinehong_2021", SLOT_WIDTH, SLOT_WIDTH, mlp_hidden=HIDDEN)
    module.load_variant("evelinehong_2021", state)
    noise = torch.randn(2, 4, SLOT_WIDTH)
    torch.testing.assert_close(module.initial(2, 4, noise=noise), 0.5 * noise)
    with pytest.raises(ValueError, match="unknown slots_sigma"):
        module.load_variant("evelinehong", state)


def test_initial_slots_that_are_buffers_are_not_trained():
    module = SlotAttention.like("untitled_ai", SLOT_WIDTH, SLOT_WIDTH, mlp_hidden=HIDDEN, num_slots=SLOTS)
    module(torch.randn(2, 9, SLOT_WIDTH))[0].sum().backward()
    assert module.initial.mean.grad is None and module.initial.scale.grad is None
    assert module.project_q.weight.grad is not None


def ocbench_state(*, dropout):
    """By the names of its own modules, initial slots with parameters for each slot."""
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    middle = [torch.nn.Dropout(0.01)] if dropout else []
    aggregat = torch.nn.ModuleDict(
        {
            "norm1q": norm(16),
            "norm1kv": norm(12),
            "norm2": norm(16),
            "rnn": torch.nn.GRUCell(16, 16),
            "proj_q": linear(16, 16, bias=False),
            "proj_k": linear(12, 16, bias=False),
            "proj_v": linear(12, 16, bias=False),
            "ffn": torch.nn.Sequential(linear(16, 20), torch.nn.GELU(), *middle, linear(20, 16)),
        }
    )
    state = {f"m.aggregat.{name}": value for name, value in aggregat.state_dict().items()}
    return state | {"m.initializ.mean": torch.randn(1, SLOTS, 16), "m.initializ.logstd": torch.zeros(1, SLOTS, 16)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ocbench_with_dropout_in_its_mlp_and_noise_in_training_only(dropout):
    """As VQ-VFM-OCL publishes it: the MLP's second layer is then the fourth of four."""
    options = {"initial": "slot_gaussian", "num_slots": SLOTS, "eval_noise": False, "dropout": dropout}
    module = SlotAttention.like("ocbench", 12, 16, mlp_hidden=20, **options)
    state = ocbench_state(dropout=dropout > 0)
    module.load_variant("ocbench", state, prefix="m.aggregat.", initial_prefix="m.initializ.")
    assert torch.equal(module.mlp.get_submodule("2").weight, state[f"m.aggregat.ffn.{3 if dropout else 2}.weight"])
    inputs, mean = torch.randn(2, 9, 12), state["m.initializ.mean"].expand(2, -1, -1)
    module.eval()
    assert torch.equal(module.initial(2), mean) and torch.equal(module(inputs)[0], module(inputs, mean)[0])
    noise = torch.randn(2, SLOTS, 16)
    torch.testing.assert_close(module.initial(2, noise=noise), mean + noise)
    module.train()
    assert not torch.equal(module.initial(2), module.initial(2))
    assert torch.equal(module(inputs, mean)[0], module(inputs, mean)[0]) == (dropout == 0)


def test_tensorflow_and_flax_name_things_in_their_own_way():
    """Slashes, checkpoint suffixes, optimiser slots, nested dictionaries, NumPy arrays."""
    plain = random_state(CASES["locatello"][1])
    checkpoint = {}
    for name, value in plain.items():
        path = "net/slot_attention/" + name.replace(".", "/")
        checkpoint[f"{path}/.ATTRIBUTES/VARIABLE_VALUE"] = value.numpy()
        checkpoint[f"{path}/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"] = value.numpy()
    checkpoint["net/encoder_cnn/layer_with_weights-0/kernel/.ATTRIBUTES/VARIABLE_VALUE"] = plain["gru.bias"].numpy()
    renamed = from_state_dict_of("locatello", checkpoint, prefix="net/slot_attention/")
    torch.testing.assert_close(renamed, from_state_dict_of("locatello", plain))

    plain = random_state(CASES["savi"][1])
    nested = {}
    for name, value in plain.items():
        *folders, leaf = name.split(".")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[leaf] = value.numpy()
    torch.testing.assert_close(from_state_dict_of("savi", nested), from_state_dict_of("savi", plain))


def test_wrong_state_dicts_are_one_clear_error():
    state = random_state(CASES["slate"][1])
    with pytest.raises(ValueError, match="variant='slot' is unknown: use one of locatello, "):
        from_state_dict_of("slot", state)
    with pytest.raises(ValueError, match="variant='slot' is unknown"):
        SlotAttention.like("slot", 12, 16, mlp_hidden=20)
    without = {name: value for name, value in state.items() if name != "gru.weight_hh"}
    with pytest.raises(ValueError, match=r"of slate: unknown nothing; missing \(by our names\) gru.weight_hh"):
        from_state_dict_of("slate", without)
    with pytest.raises(ValueError, match="missing .* mlp.2.bias"):
        from_state_dict_of("slate", {name: value for name, value in state.items() if name != "mlp.2.bias"})
    with pytest.raises(ValueError, match=r"unknown gru.gate, layer_norm.weight; missing \(by our names\) nothing"):
        from_state_dict_of("slate", state | {"layer_norm.weight": torch.empty(3), "gru.gate": torch.empty(3)})
    with pytest.raises(ValueError, match="unknown norm_inputs.bias, norm_inputs.weight, "):
        from_state_dict_of("lucidrains", state)
    # two initialisers cannot both be the one
    both = {"slots_mu": torch.empty(1, 1, 16), "slots": torch.empty(1, 5, 16)}
    with pytest.raises(ValueError, match="unknown slots"):
        from_state_dict_of("dinosaur", random_state(CASES["dinosaur"][1]) | both)

    module = SlotAttention.like("slate", 12, SLOT_WIDTH, mlp_hidden=HIDDEN)
    with pytest.raises(ValueError, match="missing initial.mean, initial.scale; unexpected nothing"):
        module.load_variant("slate", state)
    module = SlotAttention.like("slate", 12, SLOT_WIDTH, mlp_hidden=None, initial=None)
    with pytest.raises(ValueError, match="missing nothing; unexpected mlp.0.bias, "):
        module.load_variant("slate", state)
    module = SlotAttention.like("slate", 12, SLOT_WIDTH, mlp_hidden=HIDDEN, initial=None, bias=True)
    with pytest.raises(ValueError, match="missing project_k.bias, project_q.bias, project_v.bias; "):
        module.load_variant("slate", state)
    module = SlotAttention.like("slate", 12, SLOT_WIDTH, mlp_hidden=HIDDEN + 1, initial=None)
    with pytest.raises(ValueError, match=r"slate state: mlp.0.weight \(20, 16\) must be \(21, 16\)"):
        module.load_variant("slate", state)


def python_blocks():
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == text.count("```python")
    return [pytest.param(block, id=block.splitlines()[0]) for block in blocks]


@pytest.mark.parametrize("block", python_blocks())
def test_examples_of_the_readme_run(block):
    """Each by itself, as a reader would paste it."""
    exec(compile(block, str(README), "exec"), {"__name__": "example"})
