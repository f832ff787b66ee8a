"""Models with the golden weights, and their gradients under the official implementation's parameter names."""

from __future__ import annotations

import torch

import golden_tensors
from spot_fast.checkpoints.official import convert
from spot_fast.checkpoints.official_names import spot_name
from spot_fast.model.spot import Spot

_FROZEN_BLOCKS = 8  # blocks of the golden student's encoder that stay frozen


def stage1(dtype: torch.dtype = torch.float32, **changes) -> Spot:
    """The golden stage-1 model; `changes` are Config fields (such as slot_heads) that its tensors do not show."""
    return convert(golden_tensors.stage1_state_dict(), num_slots=7, encoder_heads=3, **changes).model().to(dtype)


def stage2(dtype: torch.dtype = torch.float32, **changes) -> Spot:
    return convert(golden_tensors.stage2_state_dict(), num_slots=7, encoder_heads=3, **changes).model().to(dtype)


def parameter(model: Spot, official: str, *, grad: bool) -> torch.Tensor:
    """The parameter, or its gradient (zeros where there is none), that the authors call `official`, in our shape."""
    if official.startswith("encoder.blocks."):
        _, _, block, rest = official.split(".", 3)
        name, third = f"last_blocks.{int(block) - _FROZEN_BLOCKS}.{rest}", None
    else:
        name, third = spot_name(official)
    value = model.get_parameter(name)
    if grad:
        value = torch.zeros_like(value) if value.grad is None else value.grad
    return value if third is None else value.chunk(3)[third]


def assert_grad(key: str, value: torch.Tensor, float32_error: float = 1e-3) -> None:
    """A float64 gradient within the index's tolerance; a float32 one up to single ReLU inputs that flip.

    float32_error: allowed norm of the difference as a fraction of the golden tensor's.
    """
    if value.dtype == torch.float64:
        golden_tensors.assert_close(key, value)
        return
    expected = golden_tensors.load(key)
    assert (value - expected).norm() <= float32_error * expected.norm(), key


def assert_parameter(key: str, model: Spot, official: str, *, grad: bool) -> None:
    """Compares with the golden tensor `key`, whose shape may have broadcasting axes that ours has not."""
    shape = golden_tensors.index()["tensors"][key]["shape"]
    # A trained parameter has what flips moved in it as well: by a small part of its few small steps.
    assert_grad(key, parameter(model, official, grad=grad).reshape(shape), 1e-3 if grad else 1e-5)


def assert_all_parameters(prefix: str, model: Spot, *, grad: bool) -> None:
    """Compares every golden tensor named `prefix` + official parameter name."""
    keys = [name for name in golden_tensors.names() if name.startswith(prefix)]
    assert keys, prefix
    for key in keys:
        assert_parameter(key, model, key.removeprefix(prefix), grad=grad)
