"""A recorded step does what the step does, whatever changes between steps. Recordings are imitated on the CPU."""

import contextlib
from dataclasses import replace

import pytest
import torch

from imitated_graph import ImitatedRecorder, graphed, rate_on_device
from spot_fast.errors import UserError
from spot_fast.training.cuda_graph import WARMUP, Graphed, Recorder, resolve_cuda_graph
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, assert_same_run, go_on, stop_after, tiny, train, with_features

CASES = [
    (1, {}),
    (1, {"cappa": 0.5, "orders": "standard", "accumulate": 2}),
    (1, {"decoder": "mlp", "dec_mlp_hidden": 16, "orders": "standard"}),
    (1, {"decoder": "masked", "accumulate": 2}),
    (1, {"decoder": "mlp", "dec_mlp_hidden": 16, "mlp_top_k": 2}),
    (2, {"att_weight_final": 0.001, "precision": "bf16"}),
    (2, {"online_teacher": True, "att_warmup_steps": 6, "adaptive_slots": True}),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train(tmp_path_factory.mktemp("teacher"), tiny(eval_images=0, epochs=1, dec_blocks=1))[0]


@pytest.mark.parametrize("stage, changes", CASES)
def test_recorded_steps_are_the_steps(stage, changes, teacher):
    if stage == 2:
        changes = changes | {"dec_blocks": 1}
    taught = stage == 2 and "online_teacher" not in changes
    plain, recorded = (Trainer(tiny(stage, **changes), device=CPU, teacher=teacher if taught else None) for _ in "pr")
    rate_on_device(plain)
    graphed(recorded)
    orders, calls = set(), []
    update = recorded.update._function
    recorded.update._function = lambda *arguments: calls.append(1) or update(*arguments)
    batches = list(plain.batches())
    while plain.step < 16:
        if plain.model.num_orders > 1:
            orders.add(int(plain.draw(plain.step).order))
        batch = batches[plain.step % len(batches)]
        if stage == 2:
            batch = with_features(plain, batch)
        for trainer in (plain, recorded):
            trainer.train_step(batch)
            trainer.step += 1
        for one, other in zip(plain.parameters, recorded.parameters, strict=True):
            assert torch.equal(one, other), (plain.step, plain.names[one])
    assert torch.equal(plain.meter.epoch, recorded.meter.epoch)
    assert torch.equal(plain.bad_steps.mean, recorded.bad_steps.mean)
    # After the steps that warm up and the one that is recorded, for parallel steps and those with a teacher too, no
    # Python runs.
    assert len(calls) == (WARMUP + 1) * (2 if changes.keys() & {"cappa", "att_warmup_steps"} else 1)
    assert len(orders) > 4 or plain.model.num_orders == 1


def test_the_imitation_finds_a_number_that_was_baked_in():
    rate = [1.0]
    weight = torch.zeros(())
    step = Graphed(lambda x: weight.add_(x * rate[0]), ImitatedRecorder(lambda: [weight]), say=lambda text: None)
    for rate[0] in (1.0, 1.0, 1.0, 2.0, 3.0):
        step(torch.ones(()))
    assert weight.item() == 1 + 1 + 1 + 2 + 2


def test_a_bad_step_is_left_out_of_a_replay_too():
    trainer = graphed(Trainer(tiny(on_bad_step="skip", eval_images=0), device=CPU))
    batch = with_features(trainer, next(iter(trainer.batches())))
    for step in range(1, 9):
        before = [p.detach().clone() for p in trainer.parameters]
        broken = (batch.features[0] * (float("nan") if step == 6 else 1.0),)
        trainer.train_step(replace(batch, features=broken))
        trainer.step += 1
        same = all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
        assert same == (step in (1, 6))  # the learning rate of step 1 is 0
    assert trainer.bad_steps.read() is None and [each.step for each in trainer.bad_steps.steps] == [6]


def test_a_run_of_recorded_steps_resumes_to_the_same_bits(tmp_path, monkeypatch):
    config = tiny(eval_images=0)
    made = Trainer.__init__

    def make(self, *arguments, **options):
        made(self, *arguments, **options)
        graphed(self)

    monkeypatch.setattr(Trainer, "__init__", make)
    whole, _ = train(tmp_path, config)
    with stop_after(monkeypatch, 10):
        parts, _ = train(tmp_path, config)
    assert go_on(parts, config).finished
    assert_same_run(parts, whole)


@pytest.mark.parametrize("optional", [True, False])
def test_what_cannot_be_recorded_is_launched_unless_it_was_asked_for(optional):
    class Broken(ImitatedRecorder):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    said = []
    step = Graphed(lambda x: x + 1, Broken(list), optional=optional, say=said.append)
    for _ in range(WARMUP):
        step(torch.ones(1))
    if optional:
        assert step(torch.ones(1)).item() == step(torch.ones(1)).item() == 2
        assert len(said) == 1 and "not permitted" in said[0] and "piece by piece" in said[0]
    else:
        with pytest.raises(UserError, match=r"recorded as a CUDA graph \(.*not permitted.*use --cuda-graph no"):
            step(torch.ones(1))


def test_warming_up_and_recording_share_one_stream(monkeypatch):
    """The allocator keeps the memory of each stream apart: a stream for each warm-up would hold three activations."""
    made, used, waits = [], [], []

    class Stream:
        def __init__(self, device=None):
            made.append(self)

        def wait_stream(self, other):
            waits.append((self, other))

    @contextlib.contextmanager
    def within(stream):
        used.append(stream)
        yield

    present = Stream.__new__(Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda self: None})())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: within(stream))
    step = Graphed(lambda x: x + 1, Recorder(torch.device("cuda")), say=lambda text: None)
    for _ in range(WARMUP + 2):
        assert step(torch.ones(1)).item() == 2
    assert step.recorded and len(made) == 1 and used == made * (WARMUP + 1)
    assert waits == [(made[0], present), (present, made[0])] * WARMUP


def test_auto_records_on_an_nvidia_gpu_in_one_process(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = torch.device("cuda")
    assert [resolve_cuda_graph("auto", *where) for where in ((cuda, 1), (cuda, 2), (CPU, 1))] == ["yes", "no", "no"]
    assert resolve_cuda_graph("no", cuda, 1) == "no"
    assert resolve_cuda_graph("yes", cuda, 2) == "yes"  # several processes only where it is asked for
    with pytest.raises(UserError, match="--cuda-graph yes needs an NVIDIA GPU, not cpu: use auto or no"):
        Trainer(tiny(cuda_graph="yes"), device=CPU)
    with pytest.raises(ValueError, match="--cuda-graph perhaps is unknown"):
        resolve_cuda_graph("perhaps", cuda, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "stage, changes, compiled", [*((*case, "no") for case in CASES), (*CASES[0], "yes"), (*CASES[-1], "yes")]
)
def test_recorded_steps_are_the_steps_on_a_gpu(stage, changes, compiled, teacher):
    changes = changes | {"compile": compiled} | ({"dec_blocks": 1} if stage == 2 else {})
    device = torch.device("cuda")
    teacher = teacher if stage == 2 and "online_teacher" not in changes else None
    plain, recorded = (
        Trainer(tiny(stage, cuda_graph=graph, **changes), device=device, teacher=teacher) for graph in ("no", "yes")
    )
    batches = list(plain.batches())
    for step in range(24):
        for trainer in (plain, recorded):
            trainer.train_step(batches[step % len(batches)])
            trainer.step += 1
    for one, other in zip(plain.parameters, recorded.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert recorded.update.recorded
    assert recorded.bad_steps.read() is None and not recorded.bad_steps.steps
