"""A training step waits for nothing on the device: on a GPU torch says so, on a CPU a trap for whatever would wait."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny, with_features

STANDARD = {"orders": "standard"}
CASES = [
    (1, {}),
    (1, STANDARD | {"decoder": "mlp", "dec_mlp_hidden": 16}),
    (1, STANDARD | {"cappa": 0.5, "precision": "bf16"}),
    (1, {"decoder": "masked", "precision": "bf16"}),
    (1, {"decoder": "mlp", "dec_mlp_hidden": 16, "mlp_top_k": 2}),
    (2, {"att_weight_final": 0.001}),
    (2, {"precision": "bf16", "clip": 0.0, "on_bad_step": "skip"}),
    (2, {"precision": "bf16", "online_teacher": True, "att_warmup_steps": 3, "adaptive_slots": True}),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Waits(Exception):
    pass


class Operators(TorchDispatchMode):
    """Raises where an operator gives a number to the host or a size that depends on values.

    What runs inside an operator of ours is not seen: on a GPU it is another implementation, which the GPU test covers.
    """

    NAMES = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.NAMES or masked:
            raise Waits(name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Raises where Python reads a tensor's memory, or makes a tensor of numbers that a GPU would have to be sent."""

    NAMES = ("tolist", "numpy", "__array__", "cpu", "tensor", "as_tensor", "from_numpy")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            raise Waits(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values[0].item(),
        lambda values: bool(values[0]),
        lambda values: float(values[0]),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: values[values > 0],
        lambda values: values.cpu(),
        lambda values: torch.tensor([1.0]),
        lambda values: torch.equal(values, values),
    ],
)
def test_the_trap_finds_what_waits(wait):
    with Operators(), Functions(), pytest.raises(Waits):
        wait(torch.arange(3.0))


@pytest.mark.parametrize("stage, changes", CASES)
def test_no_step_reads_a_number(stage, changes, teacher):
    config = tiny(stage, **changes)
    trainer = Trainer(config, device=CPU, teacher=teacher if stage == 2 and not config.online_teacher else None)
    orders = set()
    batches = list(trainer.batches())
    cached = [with_features(trainer, batch) for batch in batches]
    # As many steps as it takes to draw every order.
    while len(orders) < trainer.model.num_orders:
        orders.add(0 if trainer.model.num_orders == 1 else int(trainer.draw(trainer.step).order))
        with Operators(), Functions():
            trainer.train_step((cached if trainer.step % 2 else batches)[trainer.step % len(batches)])
        trainer.step += 1
    assert trainer.bad_steps.read() is None and not trainer.bad_steps.steps


def assert_no_step_waits_for_the_gpu(stage, changes, teacher):
    device = torch.device("cuda")
    config = tiny(stage, **changes)
    trainer = Trainer(config, device=device, teacher=teacher if stage == 2 and not config.online_teacher else None)
    batches = list(trainer.batches())
    cached = [with_features(trainer, batch) for batch in batches]
    # Kernels are compiled and Adam's moments made in the first steps, also in those of a parallel step.
    for step in range(40):
        debug_mode = "error" if step >= 20 else "default"
        try:
            torch.cuda.set_sync_debug_mode(debug_mode)
            trainer.train_step((cached if step % 2 else batches)[step % len(batches)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.step += 1
    assert trainer.bad_steps.read() is None and not trainer.bad_steps.steps


@needs_gpu
@pytest.mark.parametrize("stage, changes", CASES)
def test_no_step_waits_for_the_gpu(stage, changes, teacher):
    assert_no_step_waits_for_the_gpu(stage, changes | {"compile": "no"}, teacher)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_no_compiled_step_waits_for_the_gpu(stage, teacher):
    assert_no_step_waits_for_the_gpu(stage, {"compile": "yes", "precision": "bf16"}, teacher)
