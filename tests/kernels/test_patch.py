"""`patch` on modules rebuilt from published formulas: results and everything else stay; what is left alone, and why."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

import published_modules as published
from kernel_tier import DEVICE, needs_triton
from patch_modules import MODULES, assert_equal_to_rounding, build, inputs_of, known_as, only, run
from published_modules import SLOT_WIDTH, SLOTS, WIDTH
from spot_kernels import PatchReport, SlotAttention, patch, unpatch, use_backend
from spot_kernels.patching.implementations import IMPLEMENTATIONS
from spot_kernels.patching.switches import has_attribute, unknown_reads

VARIANTS = [(name, i) for name, (_, options, _) in MODULES.items() for i in range(len(options))]
NAMES = [f"{name} {i}" if i else name for name, i in VARIANTS]
every_variant = pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=NAMES)


def test_every_known_implementation_is_rebuilt():
    assert {known_as(name) for name in MODULES} == {known.name for known in IMPLEMENTATIONS if not known.default_noise}


@pytest.mark.parametrize("name", [name for name in MODULES if name == known_as(name)])
def test_every_replaced_method_is_compared(name):
    known = next(known for known in IMPLEMENTATIONS if known.name == name)
    calls = known.example_calls(build(name), torch.randn)
    assert {call.method for call in calls} == set(known.methods)


def run_everywhere(name, module):
    """In float64 and float32, training and evaluation; and evaluation under autocast."""
    runs = [
        run(module.to(dtype).train(training), inputs_of(name, dtype))
        for dtype in (torch.float64, torch.float32)
        for training in (True, False)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        return runs, run(module, inputs_of(name))


@every_variant
def test_outputs_and_gradients_stay(name, variant):
    """In both precisions to rounding, under autocast to bfloat16's, and with the original's dtypes. The module keeps
    parameters, keys and name of its class; unpatching brings the very same numbers back.
    """
    module, kind = build(name, variant), MODULES[name][0]
    (before, half_before), keys = run_everywhere(name, module), list(module.state_dict())
    parameters = [id(parameter) for parameter in module.parameters()]
    assert only(patch(module)).implementation == known_as(name)
    assert type(module) is not kind and isinstance(module, kind) and type(module).__name__ == kind.__name__
    after, half = run_everywhere(name, module)
    for patched, published_run in zip(after, before, strict=True):
        assert_equal_to_rounding(patched, published_run)
    for a, b in zip(half, half_before, strict=True):
        assert [x.dtype for x in a] == [x.dtype for x in b]
        difference = sum((x.float() - y.float()).square().sum() for x, y in zip(a, b, strict=True))
        assert difference.sqrt() <= 0.05 * sum(y.float().square().sum() for y in b).sqrt()
    assert list(module.state_dict()) == keys and [id(parameter) for parameter in module.parameters()] == parameters
    assert unpatch(module) == [""] and type(module) is kind and unpatch(module) == []
    torch.testing.assert_close(run(module, inputs_of(name)), before[-1], rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("name", ["SLATE", "STEVE", "FT-DINOSAUR", "MetaSlot", "SlotDiffusion, SlotFormer"])
def test_outputs_and_gradients_stay_with_the_gpu_kernels(name):
    """GRU and LayerNorm are one kernel there."""
    module, inputs = build(name).to(DEVICE).eval(), [x.detach()[:1].to(DEVICE) for x in inputs_of(name)]
    inputs = [x.requires_grad_() for x in inputs]
    before = run(module, inputs)
    patch(module)
    with use_backend("triton"):
        assert_equal_to_rounding(run(module, inputs), before)


def test_a_module_in_bfloat16_gives_bfloat16():
    module = build("SLATE").bfloat16()
    inputs = inputs_of("SLATE", torch.bfloat16)
    before = run(module, inputs)
    assert patch(module).replaced
    assert [x.dtype for x in run(module, inputs)[0]] == [x.dtype for x in before[0]] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "name",
    [
        "SLATE",
        "OCLF (DINOSAUR)",
        "AdaSlot, MOT (OCLF in another forward)",
        "AdaSlot, MOT (OCLF in another forward): MOT",
        "FT-DINOSAUR",
        "VideoSAUR, SlotContrast",
        "OCBench, attention of every iteration",
        "MetaSlot",
        "CODA",
    ],
)
def test_a_patched_module_compiles_to_one_graph(name):
    module, inputs = build(name).eval(), inputs_of(name)
    patch(module)
    expected = run(module, inputs)
    torch._dynamo.reset()
    assert_equal_to_rounding(run(torch.compile(module, backend="eager", fullgraph=True), inputs), expected)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.grouping = nn.ModuleDict({"slots": published.Slate(), "others": published.Slate(heads=2)})

    def forward(self, inputs, slots):
        return [module(self.encoder(inputs), slots) for module in self.grouping.values()]


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_are_patched_modules_of_their_own(duplicate):
    model = Model()
    patch(model)
    twin, inputs = duplicate(model), inputs_of("SLATE")
    assert type(twin.grouping["slots"]) is type(model.grouping["slots"])
    with torch.no_grad():
        expected = model(*inputs)
        for parameter in model.parameters():
            parameter.zero_()
        results = twin(*inputs)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    assert unpatch(twin) == ["grouping.slots", "grouping.others"] and type(twin.grouping["slots"]) is published.Slate
    assert type(model.grouping["slots"]) is not published.Slate


def test_a_replica_uses_its_own_parameters():
    """nn.DataParallel copies the attributes of a module: a function bound to it would use those of the first device."""
    module = build("SLATE")
    patch(module)
    replica = module._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica


class SlotAttentionModel(Model):
    """Named after slot attention, but only holds it."""


def test_a_model_named_after_slot_attention_is_not_reported_for_it():
    assert [module.path for module in patch(SlotAttentionModel()).modules] == ["grouping.slots", "grouping.others"]


@pytest.mark.parametrize("name", ["SLATE", "SPOT", "BO-QSA", "OCLF (DINOSAUR)"])
def test_a_single_slot(name):
    module, (inputs, slots) = build(name), inputs_of(name)
    module.num_slots = 1
    inputs = [inputs, slots.detach()[:, :1].requires_grad_()]
    before = run(module, inputs)
    assert patch(module).replaced
    for a, b in zip(run(module, inputs), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_report_names_every_module_and_a_second_call_changes_nothing():
    model = Model()
    model.ours = SlotAttention(WIDTH, SLOT_WIDTH, mlp_hidden=None)
    report = patch(model)
    kind = type(model.grouping["slots"])
    assert isinstance(report, PatchReport) and len(report.replaced) == 2
    assert str(report).splitlines() == [
        "module           class          implementation  replaced              note",
        "grouping.slots   SlotAttention  SLATE           attention and update",
        "grouping.others  SlotAttention  SLATE           attention and update",
        "ours             SlotAttention  spot_kernels    nothing               runs on our operators as it is",
    ]
    again = patch(model)
    assert [x.note for x in again.replaced] == ["was patched before"] * 2
    assert type(model.grouping["slots"]) is kind
    empty = str(patch(nn.Linear(2, 2)))
    assert empty.startswith("no slot attention found: nothing was replaced (looked for the modules of ")
    assert "SLATE, STEVE, BO-QSA" in empty and "slot_attention_step" in empty


def test_patch_leaves_gradients_modes_buffers_and_random_states():
    module = build("Slot Attention (untitled-ai)").eval()
    module.gru.train()
    gradient = module.project_q.weight.grad = torch.ones_like(module.project_q.weight)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert patch(module).replaced
    assert torch.equal(torch.get_rng_state(), before)
    assert module.project_q.weight.grad is gradient and bool((gradient == 1).all())
    assert not module.training and module.gru.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_numbers_of_a_module_may_change_after_patching():
    module, plain = build("SPOT"), build("SPOT")
    patch(module)
    for each in (module, plain):
        each.num_iter, each.truncate, each.epsilon = 5, "bi-level", 1e-3
    inputs = inputs_of("SPOT")
    assert_equal_to_rounding(run(module, inputs), run(plain, inputs))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("BO-QSA", {"num_iter": 1}),
        ("lucidrains", {"num_slots": 7}),
        ("VideoSAUR, SlotContrast", {"n_iters": 2}),
        ("OCLF (DINOSAUR)", {"masks": torch.arange(SLOTS).expand(3, -1) > 2}),
        ("OCBench", {"smask": torch.arange(SLOTS).expand(3, -1) < 3, "num_iter": 2}),
    ],
)
def test_optional_arguments_mean_the_same(name, kwargs):
    """Slot masks as well: those calls run the original."""
    module, inputs = build(name), inputs_of(name)
    before = run(module, inputs, **kwargs)
    patch(module)
    assert_equal_to_rounding(run(module, inputs, **kwargs), before)


def test_steps_that_a_model_calls_itself_stay():
    """OCLF's and VideoSAUR's `step` are public: video models call them."""
    k, v = torch.randn(2, 3, 25, 1, SLOT_WIDTH)
    slots = torch.randn(3, SLOTS, SLOT_WIDTH)
    oclf, videosaur = build("OCLF (DINOSAUR)"), build("VideoSAUR, SlotContrast")

    def steps():
        return oclf.step(slots, k, v), oclf.iterate(slots, k, v), videosaur.step(slots, k[:, :, 0], v[:, :, 0])

    before = steps()
    patch(nn.ModuleList([oclf, videosaur]))
    assert_equal_to_rounding(steps(), before)


def test_hooks_of_the_module_itself_are_called_and_not_by_the_comparison():
    module, seen = build("SLATE"), []
    module.register_forward_hook(lambda module, inputs, results: seen.append(results[1].shape))
    assert patch(module).replaced and not seen
    module(*inputs_of("SLATE"))
    assert seen == [(3, 25, SLOTS)]


# Modules with the attributes of a known one that are not it. Each is left as it was, for its own reason.
@published.published_as("SlotAttention")
class OtherFormula(published.Slate):
    """Softmax over tokens."""

    def forward(self, inputs, slots):
        k, v = self.keys_values(inputs)
        attn = (k @ self.queries(slots).mT).softmax(1)
        return published.gru_step(self.gru, attn.mT @ v, slots), attn


@published.published_as("SlotAttention")
class AlmostSame(published.Slate):
    """Another eps, which float32 hardly sees."""

    def forward(self, inputs, slots):
        self.epsilon, epsilon = 2e-8, self.epsilon
        try:
            return published.Slate.forward(self, inputs, slots)
        finally:
            self.epsilon = epsilon


@published.published_as("SlotAttention")
class Remembers(published.Slate):
    def forward(self, inputs, slots):
        slots, self.last_attention = published.Slate.forward(self, inputs, slots)
        return slots, self.last_attention


@published.published_as("SlotAttention")
class DrawsMore(published.Slate):
    def forward(self, inputs, slots):
        torch.rand(1)
        return published.Slate.forward(self, inputs, slots)


@published.published_as("SlotAttention")
class Detached(published.Slate):
    """Right values, other gradients."""

    def forward(self, inputs, slots):
        slots, attn = published.Slate.forward(self, inputs, slots)
        return slots, attn.detach() + 0 * slots.sum()


@published.published_as("SlotAttention")
class Fails(published.Slate):
    def forward(self, inputs, slots):
        raise RuntimeError("only on Tuesdays")


@published.published_as("SlotAttention")
class OtherArguments(published.Slate):
    def forward(self, inputs, slots, mask=None):
        return published.Slate.forward(self, inputs, slots)


class GroupedSlotAttention(nn.Module):
    """Known as slot attention by its name only."""


def changed(change):
    module = published.Slate()
    change(module)
    return module


OTHER, CLOSEST = "its forward computes something else", "fits no known form (closest is"
COMPILED = "compiled: patch before torch.compile"


@pytest.mark.parametrize(
    ("build_it", "implementation", "note"),
    [
        (OtherFormula, "SLATE", f"{OTHER}: results differ by"),
        (AlmostSame, "SLATE", f"{OTHER}: results differ by"),
        (Remembers, "SLATE", f"{OTHER}: it sets last_attention"),
        (DrawsMore, "SLATE", f"{OTHER}: it draws other random numbers"),
        (Detached, "SLATE", f"{OTHER}: gradients differ by"),
        (Fails, "SLATE", "it could not be compared: RuntimeError: only on Tuesdays"),
        (OtherArguments, "", f"{CLOSEST} SLATE, but its forward takes (self, inputs, slots, mask=None)): "),
        (lambda: changed(lambda m: delattr(m, "epsilon")), "", f"{CLOSEST} SLATE, but it has no epsilon): "),
        (
            lambda: changed(lambda m: setattr(m, "project_k", nn.Linear(WIDTH, 8, bias=False))),
            "SLATE",
            "it could not be compared: RuntimeError: ",
        ),
        (lambda: changed(lambda m: m.gru.register_forward_hook(print)), "SLATE", "its layer gru has hooks"),
        (
            lambda: changed(lambda m: setattr(m, "forward", functools.partial(print))),
            "SLATE",
            "its forward was replaced on the instance",
        ),
        (lambda: changed(lambda m: m.mlp.compile(backend="eager")), "SLATE", f"its layer mlp is {COMPILED}"),
        (lambda: changed(lambda m: m.compile(backend="eager")), "SLATE", f"is {COMPILED}"),
        (lambda: published.Slate().to("meta"), "SLATE", "its parameters are on the meta device: move them first"),
        (GroupedSlotAttention, "", CLOSEST),
    ],
)
def test_an_unknown_module_is_left_alone_with_a_reason(build_it, implementation, note):
    module = build_it()
    kind, attributes = type(module), dict(vars(module))
    report = only(patch(module))
    assert (report.implementation, report.replaced) == (implementation, "") and report.note.startswith(note), report
    assert type(module) is kind and vars(module) == attributes
    assert note in str(patch(module))


def test_a_compiled_model_is_left_alone():
    assert only(patch(torch.compile(published.Slate(), backend="eager"))).note.startswith("is compiled")


class Derived(published.Slate):
    def __init__(self):
        super().__init__(heads=2)

    def forward(self, inputs, slots):
        return super().forward(inputs, slots)


class LowRankAdapter(nn.Linear):
    def __init__(self):
        super().__init__(SLOT_WIDTH, SLOT_WIDTH)
        self.down, self.up = nn.Linear(SLOT_WIDTH, 2), nn.Linear(2, SLOT_WIDTH)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class ScaledGru(nn.GRUCell):
    def forward(self, updates, slots):
        return 0.5 * super().forward(updates, slots)


@pytest.mark.parametrize(
    "build_it",
    [
        Derived,
        lambda: changed(lambda m: setattr(m, "project_q", LowRankAdapter())),
        lambda: changed(lambda m: setattr(m, "gru", ScaledGru(SLOT_WIDTH, SLOT_WIDTH))),
        lambda: changed(lambda m: setattr(m, "mlp", nn.Sequential(nn.Linear(SLOT_WIDTH, SLOT_WIDTH), nn.Dropout(0.5)))),
        lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m.project_k)),
        lambda: changed(lambda m: setattr(m, "norm_slots", nn.Identity())),
        lambda: changed(lambda m: setattr(m, "unused", nn.Linear(2, 2))),
        lambda: changed(lambda m: m.register_buffer("unused", torch.zeros(1))),
    ],
    ids=["derived", "adapter", "GRU", "MLP", "weight norm", "no norm", "unused layer", "unused buffer"],
)
def test_layers_of_any_kind_stay_and_the_module_around_them_is_replaced(build_it):
    """The replacement calls the layers that the module has; what the forward does not read does not matter."""
    module = build_it().eval()
    before = run(module, inputs_of("SLATE"))
    assert only(patch(module)).implementation == "SLATE"
    assert_equal_to_rounding(run(module, inputs_of("SLATE")), before)


@pytest.mark.parametrize("known", [known for known in IMPLEMENTATIONS if not known.default_noise], ids=lambda k: k.name)
def test_the_table_lists_what_replacements_read(known):
    """Else a module that lacks an attribute would be replaced, and fail; or one would be left alone for no reason."""
    module = build(known.name)
    assert patch(module).replaced
    read = {name.removeprefix("self.") for name in unknown_reads(module, known.methods, known=())}
    read = {name for name in read if has_attribute(module, name) and not name.startswith(("_published", "__"))}
    # a width of the layers is no switch and so not among them
    assert read | (known.reads & {"slot_size", "slot_dim"}) == known.reads


def test_a_model_that_is_no_module_raises():
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match=f"{function.__name__}: model is a dict: pass a torch.nn.Module"):
            function({})
