"""What `patch` knows and what `SlotAttention.like` and `load_variant` know is one list, and both compute the same."""

import re

import pytest
import torch

from patch_modules import MODULES, build, inputs_of, known_as
from paths import ROOT
from published_modules import HIDDEN, SLOT_WIDTH, SLOTS
from spot_kernels import SlotAttention
from spot_kernels.modules import VARIANTS
from spot_kernels.modules.name_maps import NAMES
from spot_kernels.patching.implementations import IMPLEMENTATIONS

PUBLISHED = {known.name: known for known in IMPLEMENTATIONS if not known.default_noise}
# Published for TensorFlow and for JAX: no PyTorch module to patch.
OTHER_FRAMEWORKS = {"locatello", "savi"}
# Where an implementation has several: the class → the variant.
VARIANT_OF = {
    "AdaSlot, MOT (OCLF in another forward)": "adaslot",
    "AdaSlot, MOT (OCLF in another forward): MOT": "mot",
}
# Options of the published class → those of ours.
OPTIONS = {
    "n_heads": "heads",
    "heads": "heads",
    "kvq_dim": "inner_dim",
    "bias": "bias",
    "dropout": "dropout",
    "truncate": "truncation",
    "trunc_bp": "truncation",
}
CASES = [(name, i) for name, (_, options, _) in MODULES.items() for i in range(len(options))]


def variant_of(name):
    return VARIANT_OF.get(name) or PUBLISHED[known_as(name)].variants[0]


def ours(name, module, options):
    """`like` of the class's variant with the checkpoint of `module`."""
    state, given = module.state_dict(), {OPTIONS[key]: value for key, value in options.items() if key in OPTIONS}
    if "truncation" in given:
        given["truncation"] = given["truncation"].replace("-", "_")
    if name == "lucidrains, heads":
        given |= {"heads": 2, "inner_dim": 12}
    if options.get("implicit"):
        given |= {"truncation": "fixed_point", "iterations": 4}
    if options.get("learned"):
        given |= {"truncation": "bi_level", "initial": "learned", "num_slots": SLOTS}
    if not options.get("with_mlp", True) or not options.get("use_mlp", True):
        given["mlp_hidden"] = None
    if not options.get("use_gru", True):
        given["update"] = "residual"
    if name in ("OSRT", "Motion Grouping"):
        given["num_slots"] = module.num_slots
    initial = [theirs for theirs, name_here in NAMES[variant_of(name)].items() if name_here.startswith("initial.")]
    if not any(key.removesuffix(".weight") in initial for key in state):
        given["initial"] = None
    norm = next(
        key for key in ("norm_inputs", "norm_input", "norm_feature", "norm_features", "norm1kv") if hasattr(module, key)
    )
    width = getattr(module, norm).weight.shape[0]
    built = SlotAttention.like(variant_of(name), width, SLOT_WIDTH, **{"mlp_hidden": HIDDEN} | given)
    built.load_variant(variant_of(name), state)
    return built.eval()


def test_one_list_of_names():
    patched = {variant for known in PUBLISHED.values() for variant in known.variants}
    assert patched | OTHER_FRAMEWORKS == set(VARIANTS) == set(NAMES)
    assert {variant_of(name) for name in MODULES} == patched


def test_the_readme_has_a_row_for_every_name():
    readme = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| `like(…)` |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(VARIANTS)


def published_results(name, module, inputs):
    """Slots, and the inputs of slot attention itself."""
    if name == "MetaSlot":
        # one round of its iterations
        features, slots = inputs
        x = module.norm1kv(features)
        for _ in range(module.num_iter):
            slots, _ = module.step(slots, module.proj_k(x), module.proj_v(x))
        return slots, inputs
    if name.startswith(("LSD", "CODA")):
        # between layers of its own; the first of two frames
        slots = module.forward_slots(inputs[0])[0][:, 0]
        frames = module.in_mlp(module.in_layer_norm(module.pos(inputs[0]).flatten(3).mT))
        return slots, [frames[:, 0]]
    found = module(*inputs)
    if name == "STEVE":
        return found[0][:, 0], [inputs[0][:, 0]]
    if name.startswith("VideoSAUR"):
        return found["slots"], inputs[::-1]
    return found if isinstance(found, torch.Tensor) else found[0], inputs


@pytest.mark.parametrize(("name", "i"), CASES, ids=[f"{name} {i}" for name, i in CASES])
def test_like_computes_what_the_published_class_does_from_its_checkpoint(name, i):
    """Slots, from given initial slots or from the same random draws; the state dict is the class's own."""
    module = build(name, i).eval()
    attention = ours(name, module, MODULES[name][1][i])
    torch.manual_seed(3)
    expected, inputs = published_results(name, module, inputs_of(name))
    torch.manual_seed(3)
    given = {"slots": inputs[1]} if len(inputs) > 1 else {"num_slots": module.num_slots}
    slots, _, _ = attention(inputs[0], **given)
    torch.testing.assert_close(slots, expected, rtol=2e-6, atol=2e-6)


def test_dias_has_the_attention_of_every_iteration():
    """And its gradients: through the earlier iterations' attention as well, although slots are truncated."""
    name, (features, slots) = "OCBench, attention of every iteration", inputs_of("OCBench", torch.float64)
    module = build(name, 1).double().eval()
    attention = ours(name, module, MODULES[name][1][1]).double()
    _, published = module(features, slots)
    _, attn, logits = attention(features, slots)
    torch.testing.assert_close(attn.mT, torch.stack(published, dim=1))
    assert logits.shape == (3, 3, 1, 25, SLOTS)
    weights = torch.randn(attn.shape, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(published, dim=1).mT * weights).sum(), (features, slots))
    torch.testing.assert_close(torch.autograd.grad((attn * weights).sum(), (features, slots)), expected)
