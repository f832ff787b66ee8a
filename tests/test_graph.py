"""A recorded step does what the step does, whatever changes between steps.

Here a recording is imitated on the CPU: the operators that ran are run again on the very same tensors. Like a CUDA
graph it knows nothing of Python numbers that have changed since, nor of tensors that were made anew.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from spot_fast.errors import UserError
from spot_fast.graph import WARMUP, Graphed, resolve_cuda_graph
from spot_fast.optimiser import adam
from spot_fast.trainer import Trainer
from tiny_runs import CPU, assert_same_run, go_on, stop_after, tiny, train

CASES = [
    (1, {}),
    (1, {"cappa": 0.5, "orders": "standard", "accumulate": 2}),
    (1, {"decoder": "mlp", "dec_mlp_hidden": 16, "orders": "standard"}),
    (2, {"att_weight_final": 0.001, "precision": "bf16"}),
]


class Operators(TorchDispatchMode):
    """Keeps every operator with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                # A view shows its tensor's new contents, and what was changed in place is changed.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def imitate(function, device):
    """As `graph.record`, which does not run what it records: everything that changes in place is put back."""
    operators = Operators()
    kept = [(value, value.clone()) for value in imitate.state()]
    with operators:
        results = function()
    with torch.no_grad():
        for value, before in kept:
            value.copy_(before)
    return operators.replay, results


def rate_on_device(trainer: Trainer) -> Trainer:
    """`trainer` with the Adam of recorded steps, whose learning rate is a float32 tensor."""
    trainer.optimiser = adam(trainer.parameters, graphed=True)
    trainer.optimiser.param_groups[0]["capturable"] = False  # which it is on GPUs only
    return trainer


def graphed(trainer: Trainer) -> Trainer:
    """`trainer` with steps that are recorded, as on a GPU."""
    rate_on_device(trainer)
    imitate.state = lambda: [trainer.bad_steps.state, *(p.data for p in trainer.parameters),
                             *(t for state in trainer.optimiser.state.values() for t in state.values())]  # fmt: skip
    trainer.update = Graphed(trainer.update_weights, CPU, record=imitate, warm_up=lambda function, _: function())
    trainer.update.say = lambda text: None
    return trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train(tmp_path_factory.mktemp("teacher"), tiny(eval_images=0, epochs=1, dec_blocks=1))[0]


@pytest.mark.parametrize("stage, changes", CASES)
def test_recorded_steps_are_the_steps(stage, changes, teacher):
    if stage == 2:
        changes = changes | {"dec_blocks": 1}
    plain, recorded = (Trainer(tiny(stage, **changes), device=CPU, teacher=teacher if stage == 2 else None)
                       for _ in "pr")  # fmt: skip
    rate_on_device(plain)
    graphed(recorded)
    orders, calls = set(), []
    update_weights = recorded.update._function
    recorded.update._function = lambda *arguments: calls.append(1) or update_weights(*arguments)
    batches = list(plain.batches())
    while plain.step < 16:
        if plain.model.num_orders > 1:
            orders.add(int(plain.draw(plain.step).order))
        batch = batches[plain.step % len(batches)]
        if stage == 2:
            batch = plain.frozen_features(batch.images)
        for trainer in (plain, recorded):
            trainer.train_step(batch)
            trainer.step += 1
        for one, other in zip(plain.parameters, recorded.parameters, strict=True):
            assert torch.equal(one, other), (plain.step, plain.names[one])
    assert torch.equal(plain.meter.epoch, recorded.meter.epoch)
    assert torch.equal(plain.bad_steps.state, recorded.bad_steps.state)
    # After the steps that warm up and the one that is recorded, for parallel steps too, no Python runs.
    assert len(calls) == (WARMUP + 1) * (2 if changes.get("cappa") else 1)
    assert len(orders) > 4 or plain.model.num_orders == 1


def test_the_imitation_finds_a_number_that_was_baked_in():
    rate = [1.0]
    weight = torch.zeros(())
    imitate.state = lambda: [weight]
    step = Graphed(lambda x: weight.add_(x * rate[0]), CPU, record=imitate, warm_up=lambda function, _: function())
    step.say = lambda text: None
    for rate[0] in (1.0, 1.0, 1.0, 2.0, 3.0):
        step(torch.ones(()))
    assert weight.item() == 1 + 1 + 1 + 2 + 2


def test_a_bad_step_is_left_out_of_a_replay_too():
    trainer = graphed(Trainer(tiny(on_bad_step="skip", eval_images=0), device=CPU))
    batch = trainer.frozen_features(next(iter(trainer.batches())).images)
    for step in range(1, 9):
        before = [p.detach().clone() for p in trainer.parameters]
        trainer.train_step((batch[0] * (float("nan") if step == 6 else 1.0),))
        trainer.step += 1
        same = all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
        assert same == (step in (1, 6))  # the learning rate of step 1 is 0
    assert trainer.bad_steps.read() is None and [each.step for each in trainer.bad_steps.found] == [6]


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
    def broken(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    said = []
    step = Graphed(lambda x: x + 1, CPU, optional=optional, record=broken, warm_up=lambda function, _: function())
    step.say = said.append
    for _ in range(WARMUP):
        step(torch.ones(1))
    if optional:
        assert step(torch.ones(1)).item() == step(torch.ones(1)).item() == 2
        assert len(said) == 1 and "not permitted" in said[0] and "piece by piece" in said[0]
    else:
        with pytest.raises(UserError, match=r"recorded as a CUDA graph \(.*not permitted.*use --cuda-graph no"):
            step(torch.ones(1))


def test_auto_records_on_an_nvidia_gpu_in_one_process(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = torch.device("cuda")
    assert [resolve_cuda_graph("auto", *where) for where in ((cuda, 1), (cuda, 2), (CPU, 1))] == ["yes", "no", "no"]
    assert resolve_cuda_graph("no", cuda, 1) == "no"
    with pytest.raises(UserError, match="--cuda-graph yes needs one process on an NVIDIA GPU, not cpu"):
        Trainer(tiny(cuda_graph="yes"), device=CPU)
    with pytest.raises(UserError, match="not 2 processes: use auto or no"):
        resolve_cuda_graph("yes", cuda, 2)
    with pytest.raises(ValueError, match="--cuda-graph perhaps is unknown"):
        resolve_cuda_graph("perhaps", cuda, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage, changes, compiled", [*((*case, "no") for case in CASES), (*CASES[0], "yes"),
                                                      (*CASES[-1], "yes")])  # fmt: skip
def test_recorded_steps_are_the_steps_on_a_gpu(stage, changes, compiled, teacher):
    changes = changes | {"compile": compiled} | ({"dec_blocks": 1} if stage == 2 else {})
    device = torch.device("cuda")
    plain, recorded = (Trainer(tiny(stage, cuda_graph=graph, **changes), device=device,
                               teacher=teacher if stage == 2 else None) for graph in ("no", "yes"))  # fmt: skip
    batches = list(plain.batches())
    for step in range(24):
        for trainer in (plain, recorded):
            trainer.train_step(batches[step % len(batches)])
            trainer.step += 1
    for one, other in zip(plain.parameters, recorded.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert isinstance(recorded.update, Graphed) and not recorded.update._given_up
    assert recorded.bad_steps.read() is None and not recorded.bad_steps.found
