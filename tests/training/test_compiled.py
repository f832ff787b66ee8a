"""The compiled forward pass: one graph, whatever is drawn; the same numbers as without."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from spot_fast.errors import UserError
from spot_fast.training.compiled import Compiled, resolve_compile
from spot_fast.training.step import Draws
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny, train, with_features

STANDARD = {"orders": "standard"}
SMALL = {"dec_blocks": 1, "slot_iterations": 2}
# Stage, settings, whether features are cached, graphs.
CASES = [
    (1, SMALL, False, 1),
    (1, SMALL | STANDARD | {"cappa": 0.5}, True, 2),
    (1, SMALL | STANDARD | {"decoder": "mlp", "dec_mlp_hidden": 16}, True, 1),
    (1, SMALL | {"decoder": "masked"}, True, 1),
    (1, SMALL | {"decoder": "mlp", "dec_mlp_hidden": 16, "mlp_top_k": 2}, True, 1),
    (2, SMALL | {"att_weight_final": 0.001, "precision": "bf16"}, True, 1),
    (2, SMALL | {"online_teacher": True, "att_warmup_steps": 2, "adaptive_slots": True}, True, 2),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train(tmp_path_factory.mktemp("teacher"), tiny(eval_images=0, epochs=1, **SMALL))[0]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def pair(stage, changes, teacher, backend) -> tuple[Trainer, Trainer]:
    """The same run without and with compilation."""
    teacher = teacher if stage == 2 and "online_teacher" not in changes else None
    plain, compiled = (Trainer(tiny(stage, **changes), device=CPU, teacher=teacher) for _ in "pc")
    compiled.update.losses = Compiled(
        compiled.forward.losses, compiled.parameters, backend=backend, say=lambda text: None
    )
    return plain, compiled


def all_orders(trainer: Trainer, drawn: Draws, step: int) -> Draws:
    """What `trainer` has drawn, but in nine steps all nine orders, and with cappa a parallel step in every two."""
    order, teacher_order = (
        None if o is None else torch.tensor(i % 9) for o, i in ((drawn.order, step), (drawn.teacher_order, step + 4))
    )
    parallel = bool(trainer.config.cappa and step % 2)
    return replace(drawn, order=order, teacher_order=teacher_order, parallel=parallel)


@pytest.mark.parametrize("stage, changes, cached, graphs", CASES)
def test_nine_orders_are_one_graph_that_gives_eager_gradients(stage, changes, cached, graphs, teacher, monkeypatch):
    plain, compiled = pair(stage, changes, teacher, "eager")
    for trainer in (plain, compiled):
        monkeypatch.setattr(
            trainer, "draw", lambda step, trainer=trainer, draw=trainer.draw: all_orders(trainer, draw(step), step)
        )
    batches = [batch for _ in range(2) for batch in plain.batches()][:10]
    if cached:
        batches = [with_features(plain, batch) for batch in batches]
    for batch in batches:
        for trainer in (plain, compiled):
            trainer.train_step(batch)
            trainer.step += 1
        for one, other in zip(plain.parameters, compiled.parameters, strict=True):
            assert torch.equal(one, other) and (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert torch.equal(plain.meter.interval, compiled.meter.interval)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, backend", [(1, "aot_eager"), (2, "inductor")])
def test_compiled_code_gives_eager_gradients_to_rounding(stage, backend, teacher):
    """Sums in another order: within 2e-5 of a gradient's largest value, float32 being accurate to 6e-8.

    Some gradients, such as norm_slots.bias's, are zero but for rounding: hence 1e-8.
    """
    plain, compiled = pair(stage, {}, teacher, backend)
    try:
        for batch in plain.batches():
            plain.train_step(batch)
            compiled.train_step(batch)
            for one, other in zip(plain.parameters, compiled.parameters, strict=True):
                assert (one.grad - other.grad).abs().max() <= 2e-5 * one.grad.abs().max() + 1e-8
                other.data.copy_(one)
    except UserError as error:
        if "CxxCompiler" in str(error):
            pytest.skip("no C++ compiler")
        raise
    torch.testing.assert_close(plain.meter.interval, compiled.meter.interval, rtol=1e-5, atol=0)


def test_what_cannot_be_compiled_is_a_sentence():
    def reads_the_device(value):
        return {"loss": value * 2 if value.sum() > 0 else value}

    with pytest.raises(UserError, match="cannot be compiled .*--compile no"):
        Compiled(reads_the_device, [], backend="eager")(torch.ones(2))


def test_only_the_first_call_is_reported():
    said = []
    function = Compiled(lambda value: {"loss": value * 2}, [], backend="eager", say=said.append)
    for _ in range(3):
        assert function(torch.ones(2))["loss"].tolist() == [2, 2]
    assert len(said) == 1 and "compiled in" in said[0]


def test_auto_compiles_on_a_gpu_only():
    assert resolve_compile("auto", CPU) == "no" and resolve_compile("yes", CPU) == "yes"
    with pytest.raises(ValueError, match="--compile perhaps is unknown"):
        resolve_compile("perhaps", CPU)
    assert Trainer(tiny(), device=CPU).config.compile == "no"


def compiles_nothing(graph, inputs):
    raise RuntimeError("this backend compiles nothing")


def compiles_forward_only():
    """A backend as Inductor is one: it is asked for the backward pass when that first runs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backward(graph, inputs):
        raise RuntimeError("this backend compiles nothing backward")

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=backward)


def runs_forward_only():
    """A backend whose backward pass compiles, and fails where it is launched."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def launch(*arguments):
        raise RuntimeError("this backend compiles nothing that can be launched")

    return aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=lambda graph, inputs: make_boxed_func(launch),
    )


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("backend", [lambda: compiles_nothing, compiles_forward_only, runs_forward_only])
def test_what_cannot_be_compiled_runs_uncompiled_unless_it_was_asked_for(backend, optional):
    said = []
    weight = torch.ones(1, requires_grad=True)
    compiled = Compiled(
        lambda x: {"loss": x * weight * 2, "x": x}, [weight], backend=backend(), optional=optional, say=said.append
    )
    if optional:
        for _ in range(2):
            loss = compiled(torch.ones(1))["loss"]
            loss.backward()
        assert loss.item() == 2 and weight.grad.item() == 4  # that of two backward passes, none added by the attempt
        assert len(said) == 1 and "compiles nothing" in said[0] and said[0].endswith("it runs uncompiled")
    else:
        with pytest.raises(UserError, match=r"cannot be compiled \(.*compiles nothing.*use --compile no"):
            compiled(torch.ones(1))


@pytest.mark.parametrize("optional", [True, False])
def test_what_is_wrong_without_a_compiler_too_is_its_own_error(optional):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("a defect of the model")

    weight = torch.ones(1, requires_grad=True)
    compiled = Compiled(
        lambda x: {"loss": Wrong.apply(x * weight)}, [weight], backend="eager", optional=optional, say=lambda text: None
    )
    with pytest.raises((ArithmeticError, UserError), match="a defect of the model|cannot be compiled"):
        compiled(torch.ones(1))["loss"].backward()


def test_a_run_goes_on_where_its_backward_pass_cannot_be_compiled(monkeypatch, teacher):
    """Through the trainer, with parallel steps that are compiled later than the others: the bits of a plain run."""
    plain, compiled = pair(1, SMALL | STANDARD | {"cappa": 0.5}, teacher, "eager")
    said = []
    compiled.update.losses = Compiled(
        compiled.forward.losses,
        compiled.parameters,
        backend=compiles_forward_only(),
        optional=True,
        say=said.append,
    )
    for batch in plain.batches():
        for trainer in (plain, compiled):
            trainer.train_step(batch)
            trainer.step += 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, compiled.parameters, strict=True))
    assert len(said) == 1 and "it runs uncompiled" in said[0]
