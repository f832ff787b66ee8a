"""Flat buffers change no bit: beside torch's fused Adam, in whole runs, and beside autocast's casts of every step."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kernel_tier import DEVICE, needs_gpu, needs_triton
from spot_fast.training.compiled import Compiled
from spot_fast.training.flat import UNIT, FlatAdam, rounded_weights
from spot_fast.training.optimiser import (
    Adam,
    Slow,
    adam,
    load_optimiser_tensors,
    optimiser_tensors,
    set_learning_rate,
)
from spot_fast.training.shared_gradients import SharedGradients
from spot_fast.training.trainer import Trainer
from spot_kernels import dispatch, use_backend
from tiny_runs import CPU, tiny

interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs Triton's interpreter")
SHAPES = [(5,), (3, 7), (16, 16), (1025,), (2, 3, 4), ()]


def parameters(seed=0, device=CPU):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def step(optimiser, given, seed, limit=0.3, bad=0.0, without=(), collect=False):
    """One step on random gradients, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    optimiser.zero_grad()
    for number, parameter in enumerate(given):
        gradient = torch.randn(parameter.shape, generator=generator) * 10 ** (number - 3)
        parameter.grad = None if number in without else gradient.to(parameter.device)
    if collect:
        optimiser.collect()
    set_learning_rate(optimiser, 1e-3 * (seed + 1))
    norm = optimiser.clip(limit)
    optimiser.update(torch.tensor(bad, device=norm.device))
    return norm


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.3, 1e4])
def test_bits_of_torchs_fused_adam(limit, graphed):
    """Over many steps, some bad, some without a gradient of some parameters."""
    ours, theirs = parameters(), parameters()
    flat, plain = FlatAdam(ours, graphed=graphed), adam(theirs)
    if graphed:
        plain.rate_on_device()
    for number in range(60):
        options = dict(limit=limit, bad=float(number % 7 == 3), without=(1, 4) if number % 5 == 2 else ())
        norms = [step(one, given, number, **options) for one, given in ((flat, ours), (plain, theirs))]
        assert torch.equal(*norms)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(flat.state[one][name], value) for name, value in plain.state[other].items())
    assert len({int(state["step"]) for state in flat.state.values()}) == 2


def test_a_bad_step_changes_nothing_whatever_its_gradients():
    given = parameters()
    flat = FlatAdam(given)
    step(flat, given, 0)
    before = [tensor.clone() for tensor in flat.tensors()]
    given[0].grad.fill_(float("nan"))
    assert flat.clip(0.3).isnan()
    flat.update(torch.tensor(1.0))
    assert all(map(torch.equal, flat.tensors(), before))


def test_parameters_are_views_of_one_buffer_whose_padding_stays_zero():
    given = parameters()
    values = [parameter.detach().clone() for parameter in given]
    flat = FlatAdam(given)
    assert all(map(torch.equal, given, values))
    for number in range(3):
        step(flat, given, number)
    assert all((p.data_ptr() - flat.weights.data_ptr()) % (4 * UNIT) == 0 for p in given)
    for buffer in (flat.weights, flat.exp_avg, flat.exp_avg_sq):
        assert buffer.count_nonzero() == sum(p.numel() for p in given)
    lone = copy.deepcopy(given[1])
    lone.data.zero_()
    assert given[1].any()


def test_state_round_trip_and_states_of_torchs_adam():
    """Saved tensors have the names and values of torch's Adam, and either continues the other's."""
    ours, theirs = parameters(), parameters()
    names = [{p: f"layer.{number}" for number, p in enumerate(given)} for given in (ours, theirs)]
    flat, plain = FlatAdam(ours), adam(theirs)
    for one, given in ((flat, ours), (plain, theirs)):
        step(one, given, 0, without=(2,))
    saved, expected = optimiser_tensors(flat, names[0]), optimiser_tensors(plain, names[1])
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    for number in range(1, 4):
        again = [nn.Parameter(p.detach().clone()) for p in ours]
        other = FlatAdam(again) if number < 3 else adam(again)
        load_optimiser_tensors(other, {p: f"layer.{n}" for n, p in enumerate(again)}, saved)
        for one, given in ((flat, ours), (plain, theirs), (other, again)):
            step(one, given, number)
        assert all(map(torch.equal, ours, theirs)) and all(map(torch.equal, ours, again))
        saved = {name: value.clone() for name, value in optimiser_tensors(plain, names[1]).items()}


def test_only_float32_parameters():
    with pytest.raises(ValueError, match="flat parameters are float32"):
        FlatAdam([nn.Parameter(torch.zeros(2, dtype=torch.float64))])


# ---- the kernels, as on a GPU


def beside():
    """Parameters of a FlatAdam that uses kernels and of torch's Adam, with both."""
    ours, theirs = parameters(device=DEVICE), parameters(device=DEVICE)
    plain = adam(theirs)
    plain.rate_on_device()
    return (FlatAdam(ours), ours), (plain, theirs)


def assert_beside(flat, ours, plain, theirs):
    """As near as float32 gets: on CUDA PyTorch too weights Adam's moments by float32's 1 − β."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one in flat.state) == (other in plain.state)
        for name, value in plain.state.get(other, {}).items():
            torch.testing.assert_close(flat.state[one][name], value, rtol=1e-4, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_kernels_do_what_torchs_adam_does(limit):
    """A bad step, and steps in which parameters have no gradient, one of them never."""
    with use_backend("triton"):
        (flat, ours), (plain, theirs) = beside()
        for number in range(8):
            options = dict(limit=limit, bad=float(number == 3), without=(1, 4) if number % 2 else (4,))
            norms = []
            for optimiser, given in ((flat, ours), (plain, theirs)):
                norms.append(step(optimiser, given, number, **options, collect=True))
            assert torch.equal(*norms)
            for gradient, parameter in zip(flat.last_gradients(), theirs, strict=True):
                assert (gradient is None) == (parameter.grad is None)
                assert gradient is None or torch.equal(gradient, parameter.grad)
        assert_beside(flat, ours, plain, theirs)
        with pytest.raises(ValueError, match="no parameter has a gradient"):
            flat.zero_grad()
            flat.clip(limit)


@needs_triton
def test_kernels_take_what_several_processes_have_added_up(monkeypatch):
    """Where it lies, also after the layout has changed because a parameter had no gradient."""
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: Done())
    with use_backend("triton"):
        (flat, ours), (plain, theirs) = beside()
        shared = SharedGradients(ours, 2, None, contextlib.nullcontext)
        flat.take_from(shared)
        for number in range(6):
            without = (2,) if number in (1, 2, 4) else ()
            shared.start()
            shared.last_pass()
            generator = torch.Generator().manual_seed(number)
            factors = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in ours]
            sum(
                (p * f).sum() for n, (p, f) in enumerate(zip(ours, factors, strict=True)) if n not in without
            ).backward()
            flat.collect()
            shared.finish([torch.zeros((), device=DEVICE)])
            for n, (parameter, factor) in enumerate(zip(theirs, factors, strict=True)):
                parameter.grad = None if n in without else factor / 2
            for optimiser in (flat, plain):
                set_learning_rate(optimiser, 1e-2)
            assert torch.equal(flat.clip(0.3), plain.clip(0.3))
            for optimiser in (flat, plain):
                optimiser.update(torch.zeros((), device=DEVICE))
            assert flat._gradients[0] is shared.buffer
            for gradient, parameter in zip(flat.last_gradients(), theirs, strict=True):
                assert gradient is None if parameter.grad is None else torch.equal(gradient, parameter.grad)
            flat._found.clear()
        assert_beside(flat, ours, plain, theirs)


class Done:
    def wait(self):
        pass


@interpreted
@pytest.mark.parametrize("stage, changes", [(1, {}), (2, {"accumulate": 2}), (1, {"orders": "standard", "cappa": 0.5})])
def test_a_trainer_with_kernels(stage, changes, teacher):
    plain = Trainer(tiny(stage, **changes), device=CPU, teacher=teacher if stage == 2 else None)
    with use_backend("triton"):
        flat = Trainer(tiny(stage, **changes), device=CPU, teacher=teacher if stage == 2 else None)
    batches = list(flat.batches())
    for number in range(4):
        for trainer, backend in ((flat, "triton"), (plain, "auto")):
            # only the update: the model's own operators are others' subject
            update = trainer.update.optimiser
            trainer.update.optimiser = Within(update, backend)
            trainer.train_step(batches[number])
            trainer.update.optimiser = update
            trainer.step += 1
    (ours, _), (theirs, _) = flat.state(), plain.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5, msg=name)


class Within:
    """An optimiser whose clip and update run on a backend."""

    def __init__(self, optimiser, backend):
        self.optimiser, self.backend = optimiser, backend

    def __getattr__(self, name):
        return getattr(self.optimiser, name)

    def clip(self, limit):
        with use_backend(self.backend):
            return self.optimiser.clip(limit)

    def update(self, bad):
        with use_backend(self.backend):
            self.optimiser.update(bad)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_steps_on_a_gpu(precision, teacher):
    """Recorded as a CUDA graph and not, with flat parameters and without."""
    found = []
    for flat in (True, False):
        for graph in ("yes", "no"):
            config = tiny(2, precision=precision, cuda_graph=graph, compile="no", loader="torch")
            with contextlib.nullcontext() if flat else dispatch.without("flat_parameters"):
                trainer = Trainer(config, device=DEVICE, teacher=teacher)
            for batch in list(trainer.batches())[:6]:
                trainer.train_step(batch)
                trainer.step += 1
            found.append(torch.cat([parameter.detach().flatten() for parameter in trainer.parameters]))
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-3)


@interpreted
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_of_shadows_stay_bfloat16_unless_they_are_added_up(passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with use_backend("triton"):
        flat = FlatAdam(list(model.parameters()), model=model, rounded=rounded_weights(model), passes=passes)
        set_learning_rate(flat, 0.1)
        before = flat.weights.clone()
        with flat.in_use(), torch.autocast("cpu", torch.bfloat16):
            assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.dtype == torch.float32
            for _ in range(passes):
                model(torch.randn(5, 40)).square().sum().backward()
                flat.collect()
        kinds = {gradient.dtype for gradient in flat._gradients}
        assert kinds == ({torch.bfloat16, torch.float32} if passes == 1 else {torch.float32})
        norm = flat.clip(0.3)
        flat.update(torch.zeros(()))
    largest = max(gradient.abs().max() for gradient in flat.last_gradients())
    assert torch.allclose(largest, norm.clamp(max=0.3)) and not torch.equal(before, flat.weights)
    torch.testing.assert_close(flat.shadow.float(), flat.weights[: len(flat.shadow)], rtol=2**-7, atol=0)
    assert all(leaf.grad is None for leaf in flat.leaves if leaf.dtype == torch.bfloat16)


# ---- whole steps


def trainers(teacher, stage, **changes):
    """Of the same run, with flat parameters and without."""
    config = tiny(stage, **changes)
    given = teacher if stage == 2 else None
    flat = Trainer(config, device=CPU, teacher=given)
    with dispatch.without("flat_parameters"):
        plain = Trainer(config, device=CPU, teacher=given)
    assert isinstance(flat.optimiser, FlatAdam) and isinstance(plain.optimiser, Adam)
    return flat, plain


CASES = [
    (1, {}),
    (2, {}),
    (1, {"precision": "bf16"}),
    (2, {"precision": "bf16"}),
    (2, {"precision": "bf16", "accumulate": 2}),
    (1, {"precision": "bf16", "orders": "standard", "decoder": "mlp", "dec_mlp_hidden": 16}),
    (1, {"precision": "bf16", "orders": "standard", "cappa": 0.5}),
    (1, {"precision": "bf16", "slot_init": "gaussian", "clip": 0.0}),
]


@pytest.mark.parametrize("stage, changes", CASES)
def test_steps_change_no_bit(stage, changes, teacher):
    """Losses, gradients, weights and the saved state, also of bfloat16 runs, whose casts are those of autocast."""
    flat, plain = trainers(teacher, stage, **changes)
    batches = list(flat.batches())
    for number in range(6):
        for trainer in (flat, plain):
            trainer.train_step(batches[number % len(batches)])
            trainer.step += 1
        for one, other in zip(flat.parameters, plain.parameters, strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad), flat.names[one]
    (ours, _), (theirs, _) = flat.state(), plain.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert flat.validate() == plain.validate()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_shadows_added_up_by_processes(accumulate, teacher, monkeypatch):
    """As those of a process alone, whose exchange is a stand-in."""
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: Done())
    shared, plain = trainers(teacher, 2, precision="bf16", accumulate=accumulate)
    options = {"leaves": shared.optimiser.leaves, "piece_bytes": 2**14}
    shared.update.gradients = SharedGradients(shared.parameters, 1, None, contextlib.nullcontext, **options)
    shared.optimiser.take_from(shared.update.gradients)
    for batch in list(shared.batches())[:3]:
        for trainer in (shared, plain):
            trainer.train_step(batch)
        for one, other in zip(shared.parameters, plain.parameters, strict=True):
            assert torch.equal(one, other) and torch.equal(one.grad, other.grad)


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operators by name, and casts of parameters' shapes from float32 to bfloat16."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.casts = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and result.dtype == torch.bfloat16:
            self.casts += tuple(args[0].shape) in self.shapes and args[0].requires_grad
        return result


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_casts_no_weights_of_linear_layers(stage, teacher):
    flat, plain = trainers(teacher, stage, precision="bf16")
    shapes = {tuple(p.shape) for p in rounded_weights(plain.model)}
    counted = []
    for trainer in (flat, plain):
        with Casts(shapes) as counter:
            trainer.train_step(next(trainer.batches()))
        counted.append(counter.casts)
    # Folded projections are cast as views, in other shapes.
    assert counted[0] == 0 and counted[1] > 0.8 * len(rounded_weights(plain.model))
    rounded = sum(p.numel() for p in rounded_weights(flat.model))
    assert rounded > 0.9 * sum(p.numel() for p in flat.parameters)


def test_compiled_steps_use_shadows_and_are_compiled_once(teacher):
    """One graph without casts of weights, whose gradients are those of the eager step but for rounding."""
    torch._dynamo.reset()
    compiled, eager = (trainers(teacher, 1, precision="bf16")[0] for _ in range(2))
    graphs = []

    def note(graph, inputs):
        graphs.append(sorted({str(value.dtype) for value in inputs if value.requires_grad}))
        return graph

    losses, leaves = compiled.forward.losses, compiled.optimiser.leaves
    compiled.update.losses = Compiled(losses, leaves, backend=note, say=lambda text: None)
    for batch in list(compiled.batches())[:3]:
        for trainer in (compiled, eager):
            trainer.train_step(batch)
            trainer.step += 1
    assert graphs == [["torch.bfloat16", "torch.float32"]]
    for one, other in zip(compiled.parameters, eager.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_shadows_follow_weights_that_were_changed(teacher):
    flat, plain = trainers(teacher, 1, precision="bf16")
    batch = next(flat.batches())
    for trainer in (flat, plain):
        trainer.train_step(batch)
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.mul_(0.5)
        trainer.train_step(batch)
    assert all(map(torch.equal, flat.parameters, plain.parameters))
    assert torch.equal(flat.meter.epoch, plain.meter.epoch)


def test_the_model_has_its_float32_weights_outside_of_a_step(teacher):
    flat, _ = trainers(teacher, 1, precision="bf16")
    named = dict(flat.model.named_parameters())
    with pytest.raises(RuntimeError, match="inside"), flat.optimiser.in_use() as leaves:
        inside = [p for p in flat.model.parameters() if p.requires_grad]
        assert {p.dtype for p in inside} == {torch.bfloat16, torch.float32}
        assert all(one is other for one, other in zip(inside, leaves, strict=True))
        raise RuntimeError("inside")
    assert all(parameter is named[name] for name, parameter in flat.model.named_parameters())


@pytest.mark.parametrize("kind", [FlatAdam, adam])
def test_slow_parameters_make_a_share_of_the_step(kind):
    """With moments and step counts of a full one; a bad step changes nothing; rounded copies are of the new weights."""
    ours, theirs = parameters(), parameters()
    slowed, plain = kind(ours), kind(theirs)
    slowed.slow = Slow(ours[1:3], 0.25)
    for number in range(4):
        before = [one.detach().clone() for one in theirs]
        for one, other in zip(ours, before, strict=True):
            one.data.copy_(other)
        bad = float(number == 2)
        for optimiser, given in ((slowed, ours), (plain, theirs)):
            step(optimiser, given, number, bad=bad)
        for index, (one, other, start) in enumerate(zip(ours, theirs, before, strict=True)):
            share = 0.25 if index in (1, 2) else 1.0
            torch.testing.assert_close(one - start, share * (other - start), atol=1e-6, rtol=1e-4)
            assert bool(torch.equal(other, start)) == bool(bad)
        assert all(
            torch.equal(slowed.state[one]["exp_avg"], plain.state[other]["exp_avg"])
            for one, other in zip(ours, theirs, strict=True)
        )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_with_a_slower_slot_encoder(precision):
    runs = [Trainer(tiny(precision=precision, slot_rate=rate, warmup_steps=0), device=CPU) for rate in (1.0, 0.2)]
    before = copy.deepcopy(runs[0].model.state_dict())
    for trainer in runs:
        for batch, _ in zip(trainer.batches(), range(4), strict=False):
            trainer.train_step(batch)
    moved = [
        {
            part: max(
                float((value - before[name]).abs().max())
                for name, value in trainer.model.named_parameters()
                if part in name
            )
            for part in ("slot_encoder", "decoder")
        }
        for trainer in runs
    ]
    assert moved[1]["slot_encoder"] < 0.5 * moved[0]["slot_encoder"]
    assert moved[1]["decoder"] > 0.5 * moved[0]["decoder"]
    flat = runs[1].optimiser
    assert torch.equal(flat.shadow, flat.weights[: len(flat.shadow)].bfloat16())
