"""Inputs that every operator must take: views of all kinds, empty batches, some inputs that need gradients."""

import itertools

import pytest
import torch

from kernel_tier import needs_triton
from operator_calls import INTEGERS, calls, results_of, with_gradients
from spot_kernels import native, use_backend

BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.describe())),
    pytest.param("triton", marks=needs_triton),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("operator", calls())
VIEWS = {
    "axes reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other element": lambda x: torch.stack([x, x.roll(1)], -1)[..., 0],
    "not at the start of its memory": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
    "negated when read": lambda x: torch.complex(x, -x).conj().imag if x.is_floating_point() else x,
}


@every_backend
@every_operator
def test_views_give_the_results_of_copies(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        for name, view in VIEWS.items():
            views = [view(tensor) for tensor in tensors]
            found = results_of(function(*views))
            expected = results_of(function(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in views)))
            for value, true in zip(found, expected, strict=True):
                torch.testing.assert_close(value, true, msg=lambda text, name=name: f"{name}: {text}")


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
        with use_backend(backend):
            found = with_gradients(function, tensors)
        for tensor in found:
            assert tensor.dtype != torch.float32 or bool(torch.isfinite(tensor).all())
        if operator not in INTEGERS and not batch:
            assert not any(gradient.any() for gradient in found[-len(tensors) :])


@every_backend
@pytest.mark.parametrize("operator", [name for name in calls() if name not in INTEGERS])
def test_any_of_the_inputs_may_need_a_gradient(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        every = with_gradients(function, tensors)[-len(tensors) :]
        for needs in itertools.product((True, False), repeat=len(tensors)):
            if sum(needs) == 1:
                leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
                through = [result for result in results_of(function(*leaves)) if result.requires_grad]
                given = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in through]
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                found = torch.autograd.grad(through, wanted, given, allow_unused=True)
                expected = [gradient for gradient, need in zip(every, needs, strict=True) if need]
                if len(through) == len(results_of(function(*tensors))):
                    torch.testing.assert_close(found, tuple(expected))


@every_backend
@every_operator
def test_inference_mode(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = results_of(function(*tensors))
        with torch.inference_mode():
            found = results_of(function(*tensors))
    assert all(map(torch.equal, found, expected)) and all(tensor.is_inference() for tensor in found)
