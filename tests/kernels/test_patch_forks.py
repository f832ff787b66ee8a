"""`patch` on forks: switches of their own, other class names, default dtypes, and the notes about the rest."""

import copy
import sys

import pytest
import torch
from torch import nn

import published_frameworks as frameworks
import published_modules as published
from patch_changed_forks import CHANGED, OclfWithGate
from patch_forks import FORKS, Fork, Harmless
from patch_modules import assert_equal_to_rounding, build, inputs_of, only, run
from spot_kernels import patch, unpatch
from spot_kernels.patching.implementations import IMPLEMENTATIONS


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.__name__)
def test_a_fork_that_reads_a_switch_of_its_own_is_left_alone(fork):
    """At its default it computes what the known form does, so a comparison of outputs cannot detect it."""
    module = fork()
    kind = type(module)
    report = only(patch(module))
    assert report.implementation == "SLATE" and not report.replaced and type(module) is kind
    assert report.note.startswith("its forward reads ") and "spot_kernels.slot_attention_step" in report.note


@pytest.mark.parametrize(("fork", "known", "note"), CHANGED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fork_with_a_changed_line_is_left_alone_with_the_reason(fork, known, note):
    module = fork()
    report = only(patch(module))
    assert report.implementation == known and not report.replaced and type(module) is fork
    assert report.note.startswith(note)


def test_a_forward_around_published_steps_stays_and_its_switches_work():
    module, inputs = OclfWithGate(), inputs_of("OCLF (DINOSAUR)")
    plain = copy.deepcopy(module)
    assert only(patch(module)).implementation == "AdaSlot, MOT (OCLF in another forward)"
    for each in (module, plain):
        each.gate = 0.5
    assert_equal_to_rounding(run(module, inputs), run(plain, inputs))


@pytest.mark.parametrize("fork", [Fork, Harmless])
def test_a_class_of_another_name_is_known_by_its_structure(fork):
    module, inputs = fork(), inputs_of("SLATE")
    before = run(module, inputs)
    report = only(patch(module))
    assert (report.implementation, report.replaced, report.class_name) == (
        "SLATE",
        "attention and update",
        fork.__name__,
    )
    assert_equal_to_rounding(run(module, inputs), before)
    assert unpatch(module) == [""] and type(module) is fork


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (frameworks.SlotFormer, "SlotDiffusion, SlotFormer"),
        (frameworks.SlotFormerWithMask, "SlotDiffusion, SlotFormer, with masks"),
        (frameworks.OcBench, "OCBench"),
        (frameworks.OcBenchWithAllAttention, "OCBench, attention of every iteration"),
    ],
)
def test_among_forms_with_the_same_layers_the_one_that_agrees_is_chosen(kind, name):
    module = kind()
    kind.__name__, before = "Grouping", kind.__name__
    try:
        assert only(patch(module)).implementation == name
    finally:
        kind.__name__ = before
        sys.modules["spot_kernels.patching.patch"]._patched_class.cache_clear()


class Refiner(nn.Module):
    """Slot attention of no known form and without a telling name."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.cell, self.norm = nn.GRUCell(8, 8), nn.LayerNorm(8)


def test_slot_attention_of_no_known_form_is_reported_with_a_remedy():
    report = only(patch(nn.Sequential(nn.Linear(8, 8), Refiner())))
    assert (report.path, report.implementation, report.replaced) == ("1", "", "")
    assert report.note.startswith("fits no known form (closest is ")


def test_a_note_names_three_differences_and_counts_the_rest():
    class SlotAttention(nn.Module):
        pass

    note = only(patch(SlotAttention())).note
    assert note.startswith("fits no known form (closest is ") and note.count(";") == 2
    assert note.endswith(" more): its forward can call spot_kernels.slot_attention_step") and len(note) < 200


@published.published_as("SlotAttention")
class DefaultNoise(published.LucidrainsSlots):
    """Draws without naming a dtype."""

    def initial(self, inputs, num_slots):
        count = self.num_slots if num_slots is None else num_slots
        mu = self.slots_mu.expand(inputs.shape[0], count, -1)
        return mu + self.slots_logsigma.exp() * torch.randn(mu.shape, device=inputs.device)

    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


@published.published_as("SlotAttentionVideo")
class DefaultNoiseVideo(published.Steve):
    def forward(self, inputs):
        noise = torch.randn(len(inputs), self.num_slots, self.slot_size, device=inputs.device)
        slots = self.slot_mu + torch.exp(self.slot_log_sigma) * noise
        k, v = self.keys_values(inputs)
        k, all_slots, all_attn = self.slot_size**-0.5 * k, [], []
        for t in range(inputs.shape[1]):
            for i in range(self.num_iterations):
                slots, attn = self.step(slots, k[:, t], v[:, t], with_mlp=i < self.num_iterations - 1)
            all_slots.append(slots)
            all_attn.append(attn)
            slots = self.predictor(slots)
        return torch.stack(all_slots, 1), torch.stack(all_attn, 1)


class DefaultConstant(Fork):
    """Makes a constant without naming a dtype."""

    def divisor(self):
        return torch.full((), 0.1) * 10


@pytest.mark.parametrize(("kind", "base"), [(DefaultNoise, "lucidrains"), (DefaultNoiseVideo, "STEVE")])
def test_noise_in_the_default_dtype_is_drawn_as_it_was(kind, base):
    """In float32, in float64, and where the inputs have another dtype than the default."""
    module = kind().eval()
    plain = copy.deepcopy(module)
    assert only(patch(module)).implementation == f"{base}, noise in the default dtype"
    for dtype in (torch.float32, torch.float64):
        arguments = inputs_of(base, dtype)
        assert_equal_to_rounding(run(module.to(dtype), arguments), run(plain.to(dtype), arguments))
    half = [x.bfloat16() for x in inputs_of(base)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.manual_seed(1)
        drawn = module.float()(*half)
        torch.manual_seed(1)
        expected = plain.float()(*half)
    torch.testing.assert_close(drawn, expected, rtol=0.05, atol=0.05)


def test_constants_in_the_default_dtype_are_not_another_formula():
    assert only(patch(DefaultConstant())).replaced


class Fails(Fork):
    def divisor(self):
        raise RuntimeError("only on Tuesdays")


@pytest.mark.parametrize("kind", [Fork, Fails, DefaultNoise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_is_as_before(kind, dtype):
    module = kind()
    torch.set_default_dtype(dtype)
    try:
        patch(module)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("width", [64, 224, 256])
def test_bi_level_gradients_in_bfloat16_are_judged_by_float64(width):
    """At 256 the sign of what a ReLU gets is changed by rounding in the published module as well as in ours, at 224 in
    ours alone, and with it a whole gradient.
    """
    assert only(patch(published.BoQsa(drop_path=0, width=width).bfloat16())).replaced


@pytest.mark.parametrize("known", [known.name for known in IMPLEMENTATIONS if not known.default_noise])
def test_every_form_is_known_in_bfloat16(known):
    assert only(patch(build(known).bfloat16())).implementation == known


@pytest.mark.parametrize("known", ["SLATE", "BO-QSA", "lucidrains"])
def test_forms_are_known_in_float16(known):
    assert only(patch(build(known).half())).replaced


def test_operators_that_fail_in_a_dtype_are_detected(monkeypatch):
    """Errors above the original's own error against float64 are rejected."""
    from spot_kernels.patching import replacements as ours

    right = ours.attention_step
    monkeypatch.setattr(
        ours, "attention_step", lambda q, *rest, **kwargs: right(q if q.dtype == torch.float64 else -q, *rest, **kwargs)
    )
    assert only(patch(published.BoQsa().bfloat16())).note.startswith("its operators differ here: ")
    assert only(patch(published.BoQsa(width=256).bfloat16())).note.startswith("its operators differ here: ")


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("SPOT", "truncate"), ("OCBench", "trunc_bp"), ("OCBench, attention of every iteration", "trunc_bp")],
)
@pytest.mark.parametrize("truncation", ["bi-level", "nothing known"])
def test_a_truncation_chosen_after_patching_is_that_of_the_published_forward(name, attribute, truncation):
    """Gradients through attention of earlier iterations included; what is no truncation there is none here."""
    module, inputs = build(name).eval(), inputs_of(name)
    plain = copy.deepcopy(module)
    assert patch(module).replaced
    for each in (module, plain):
        setattr(each, attribute, truncation)
    assert_equal_to_rounding(run(module, inputs), run(plain, inputs))


def test_torch_jit_script_says_what_to_do():
    model = nn.Sequential(Fork())
    assert patch(model).replaced
    with pytest.raises(ValueError, match="torch.jit.script cannot compile the operators in Fork: unpatch first"):
        torch.jit.script(model)


def test_a_model_that_holds_a_module_twice_has_it_patched_once():
    module = Fork()
    model = nn.ModuleDict({"one": module, "other": module})
    assert [report.path for report in patch(model).replaced] == ["one"]
    assert model["one"] is model["other"] and unpatch(model) == ["one"] and type(module) is Fork


def test_a_parametrisation_registered_after_patching_stays_when_unpatched():
    module = build("lucidrains")
    assert patch(module).replaced

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    nn.utils.parametrize.register_parametrization(module, "slots_mu", Doubled())
    mean = module.slots_mu.detach().clone()
    assert [report.note for report in patch(module).modules] == ["was patched before"]
    assert unpatch(module) == [""] and not hasattr(type(module), "_published_class")
    assert isinstance(module, published.LucidrainsSlots) and torch.equal(module.slots_mu, mean)
    nn.utils.parametrize.remove_parametrizations(module, "slots_mu")
    assert type(module) is published.LucidrainsSlots
