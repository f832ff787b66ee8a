"""Adam and the infinity-norm clip against the authors' training steps."""

import pytest
import torch
from torch import nn

import golden_tensors
from spot_fast.training.optimiser import (
    adam,
    clip_by_infinity_norm,
    load_optimiser_tensors,
    optimiser_tensors,
    set_learning_rate,
)

GOLDEN = ["linear_problem.step_*", "inputs:optimiser.*"]


def test_golden_linear_problem():
    x, y, weight, bias = (golden_tensors.load(f"inputs:optimiser.{name}") for name in ("x", "y", "weight", "bias"))
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    optimiser = adam([weight, bias])
    for step, rate in enumerate(golden_tensors.load("linear_problem.lr").tolist()):
        loss = (x @ weight + bias - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        norm = clip_by_infinity_norm([weight, bias], 0.3)
        set_learning_rate(optimiser, rate)
        optimiser.step()
        golden_tensors.assert_close(f"linear_problem.step_{step}.loss_and_grad_norm", torch.stack([loss, norm]))
        golden_tensors.assert_close(f"linear_problem.step_{step}.weight", weight)
        golden_tensors.assert_close(f"linear_problem.step_{step}.bias", bias)


def parameters(*gradients: list[float]) -> list[nn.Parameter]:
    result = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(result, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return result


@pytest.mark.parametrize("limit", [0.3, 2.0, 100.0])
def test_clip_is_torchs(limit):
    ours, theirs = (parameters([0.1, -4.0], [3.0, 0.0]) for _ in "ab")
    norm = clip_by_infinity_norm(ours, limit)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, limit, norm_type=float("inf")))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_zero_is_no_clipping_and_parameters_without_gradient_are_left_out():
    some = [*parameters([5.0, -7.0]), nn.Parameter(torch.zeros(2))]
    assert clip_by_infinity_norm(some, 0.0) == 7
    assert some[0].grad.tolist() == [5, -7] and some[1].grad is None
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_by_infinity_norm(some[1:], 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_norm_of_a_broken_gradient_is_not_finite(bad):
    assert not clip_by_infinity_norm(parameters([1.0], [0.0, bad]), 0.3).isfinite()


def test_state_round_trip_keeps_who_has_moments():
    used, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    names = {used: "a.weight", unused: "b"}
    first = adam(names)
    used.grad = torch.randn(3)
    set_learning_rate(first, 0.1)
    first.step()
    saved = {name: value.clone() for name, value in optimiser_tensors(first, names).items()}
    assert saved.keys() == {"adam.step.a.weight", "adam.exp_avg.a.weight", "adam.exp_avg_sq.a.weight"}
    second = adam(names)
    load_optimiser_tensors(second, names, saved)
    loaded = optimiser_tensors(second, names)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert loaded["adam.exp_avg.a.weight"].data_ptr() != saved["adam.exp_avg.a.weight"].data_ptr()
