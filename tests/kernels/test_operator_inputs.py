"""Inputs that every operator must take: views of all kinds, empty batches, some inputs that need gradients."""

import pytest
import torch

from kernel_tier import every_backend
from operator_calls import INTEGERS, calls, results_of, with_gradients
from spot_kernels import use_backend

every_operator = pytest.mark.parametrize("operator", calls())
VIEWS = {
    "axes reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "heads side by side": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 1 else x,
    "every other element": lambda x: torch.stack([x, x.roll(1)], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :] if x.dim() > 1 else x,
    "not at the start of its memory": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x) if x.dim() > 1 else x,
    "negated when read": lambda x: torch.complex(x, -x).conj().imag if x.is_floating_point() else x,
}


@every_backend
@every_operator
def test_views_give_the_results_of_copies(operator, backend):
    """Results and gradients, from views of inputs and of the results' gradients, over several tiles of tokens."""
    function, tensors = calls(tokens=36)[operator]
    with use_backend(backend):
        for name, view in VIEWS.items():
            views = [view(tensor) for tensor in tensors]
            copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in views]
            expected = with_gradients(function, copies, lambda x, view=view: view(x).contiguous())
            results = with_gradients(function, views, view)
            torch.testing.assert_close(results, expected, msg=lambda text, name=name: f"{name}: {text}")


@every_backend
@every_operator
def test_results_share_no_memory_with_inputs_or_each_other(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        held = [x.untyped_storage().data_ptr() for x in (*tensors, *results_of(function(*tensors)))]
    assert len(set(held)) == len(held)


@every_backend
@every_operator
def test_empty_and_single_batches(operator, backend):
    """With backward; a gradient that sums over no samples is zero."""
    for batch in (0, 1):
        function, tensors = calls(batch=batch)[operator]
        with use_backend("torch"):
            expected = with_gradients(function, tensors)
        with use_backend(backend):
            results = with_gradients(function, tensors)
        assert all(torch.isfinite(result).all() for result in results)
        if operator not in INTEGERS:
            torch.testing.assert_close(results, expected)
            assert batch or not any(gradient.any() for gradient in results[-len(tensors) :])
        else:
            assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in expected]


@every_backend
@pytest.mark.parametrize("operator", [name for name in calls() if name not in INTEGERS])
def test_any_of_the_inputs_may_need_a_gradient(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        every = with_gradients(function, tensors)[-len(tensors) :]
        for i, expected in enumerate(every):
            leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(tensors)]
            results = results_of(function(*leaves))
            through = [result for result in results if result.requires_grad]
            given = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in through]
            (gradient,) = torch.autograd.grad(through, leaves[i], given)
            if len(through) == len(results):
                torch.testing.assert_close(gradient, expected)


@every_backend
@every_operator
def test_inference_mode(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = results_of(function(*tensors))
        with torch.inference_mode():
            results = results_of(function(*tensors))
    assert all(map(torch.equal, results, expected)) and all(tensor.is_inference() for tensor in results)
