"""`InitialSlots`: how its parameters start, what it draws, alone and inside `SlotAttention`."""

import math

import pytest
import torch
import torch.nn.functional as F

from initial_weights import uniform_bound
from spot_kernels import SlotAttention
from spot_kernels.modules import InitialSlots


def test_initial_slots_start_as_specified():
    torch.manual_seed(0)
    gaussian = InitialSlots(512)
    assert gaussian.mean.shape == gaussian.scale.shape == (1, 1, 512)
    uniform_bound(gaussian.mean, math.sqrt(3 / 512))
    uniform_bound(gaussian.scale, math.sqrt(3 / 512))
    learned = InitialSlots(512, "learned", num_slots=7)
    assert [name for name, _ in learned.named_parameters()] == ["mean"]
    uniform_bound(learned.mean, math.sqrt(6 / 519))
    for spread in ("softplus", "abs"):
        drawn = InitialSlots(512, "slot_gaussian", num_slots=7, spread=spread)(64)
        torch.testing.assert_close(drawn.std().item(), 1.0, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "slot_gaussian", "learned"])
def test_initial_slots_equal_their_formula(kind):
    torch.manual_seed(0)
    noise = torch.randn(2, 5, 8)
    spreads = {"exp": torch.exp, "softplus": F.softplus, "abs": torch.abs}
    for spread, function in spreads.items():
        initial = InitialSlots(8, kind, num_slots=5, spread=spread)
        for parameter in initial.parameters():
            parameter.data.normal_()
        scale = 0 if kind == "learned" else function(initial.scale)
        torch.testing.assert_close(initial(2, noise=noise), (initial.mean + scale * noise).expand(2, 5, 8))
    if kind == "learned":
        torch.testing.assert_close(initial(2, noise=noise, jitter=0.5), initial.mean * (1 + 0.5 * noise))
        initial(2, noise=noise, jitter=0.5).sum().backward()
        torch.testing.assert_close(initial.mean.grad, torch.full((1, 5, 8), 2.0))


def test_a_module_with_its_own_initial_slots():
    torch.manual_seed(0)
    module = SlotAttention(12, 8, mlp_hidden=16, initial="gaussian")
    inputs, noise = torch.randn(2, 10, 12), torch.randn(2, 4, 8)
    results = module(inputs, num_slots=4, noise=noise)
    torch.testing.assert_close(results, module(inputs, module.initial(2, 4, noise=noise)))
    assert module(inputs, num_slots=6)[0].shape == (2, 6, 8)
    results[0].sum().backward()
    assert module.initial.mean.grad.any() and module.initial.scale.grad.any()
    learned = SlotAttention(12, 8, mlp_hidden=16, initial="learned", num_slots=3, truncation="bi_level")
    learned(inputs)[0].square().sum().backward()
    assert learned.initial.mean.grad.any()


def test_bad_initial_slots_are_named():
    inputs, slots = torch.randn(2, 10, 12), torch.randn(2, 3, 8)
    plain = SlotAttention(12, 8, mlp_hidden=16)
    with pytest.raises(ValueError, match="pass initial slots, or build the module with initial"):
        plain(inputs)
    with pytest.raises(ValueError, match="slots were passed, so num_slots and noise have no effect"):
        plain(inputs, slots, num_slots=3)
    with pytest.raises(ValueError, match="pass num_slots"):
        SlotAttention(12, 8, mlp_hidden=16, initial="gaussian")(inputs)
    learned = SlotAttention(12, 8, mlp_hidden=16, initial="slot_gaussian", num_slots=3)
    with pytest.raises(ValueError, match="num_slots=4, but there are parameters for 3"):
        learned(inputs, num_slots=4)
    with pytest.raises(ValueError, match=r"noise \(2, 4, 8\) must be \(2, 3, 8\)"):
        learned(inputs, noise=torch.randn(2, 4, 8))
