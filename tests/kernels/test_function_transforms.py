"""Derivatives other than one backward pass: those of backend torch, or refused in words; never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad

from kernel_tier import NATIVE, TRITON
from operator_calls import INTEGERS, calls, results_of
from spot_kernels import use_backend

BACKENDS = ["auto", NATIVE, TRITON]
DIFFERENTIABLE = [name for name in calls() if name not in INTEGERS]


def scalar(operator):
    """A function of tensors whose derivatives are nowhere zero, and tensors for it."""
    function, tensors = calls()[operator]
    return lambda *given: sum(result.sin().sum() for result in results_of(function(*given))), tensors


def jvp(function, tensors, tangents):
    return torch.func.jvp(function, tensors, tangents)[1]


def dual(function, tensors, tangents):
    with forward_ad.dual_level():
        pairs = map(forward_ad.make_dual, tensors, tangents)
        return forward_ad.unpack_dual(function(*pairs)).tangent


DERIVATIVES = {
    "jvp": jvp,
    "forward_ad": dual,
    "forward_ad in no_grad": torch.no_grad()(dual),
    "jacfwd": lambda function, tensors, _: torch.func.jacfwd(function)(*tensors),
    "func.grad": lambda function, tensors, _: torch.func.grad(function)(*tensors),
    "hessian-vector": lambda function, tensors, tangents: jvp(torch.func.grad(function), tensors, tangents),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_transforms_are_torchs_or_refused(operator, derivative, backend):
    function, tensors = scalar(operator)
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    find = DERIVATIVES[derivative]
    with use_backend("torch"):
        expected = find(function, tensors, tangents)
    assert bool((expected != 0).any())
    with use_backend(backend):
        if backend == "triton":
            with pytest.raises(ValueError, match=f"{operator}: backend triton was requested, but the call is inside"):
                find(function, tensors, tangents)
        else:
            torch.testing.assert_close(find(function, tensors, tangents), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["slot_attention_step", "slot_cross_attention", "permuted_causal_attention"])
def test_vmap_of_what_needs_gradients(operator, backend):
    """Over a batch axis in front, with a backward pass outside of vmap, and a gradient for each sample inside it."""
    function, tensors = scalar(operator)
    many = tuple(torch.stack([tensor, tensor.flip(0)]) for tensor in tensors)
    if backend == "triton":
        with use_backend(backend), pytest.raises(ValueError, match="inside a transform"):
            torch.func.vmap(function)(*many)
        return
    with use_backend(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in many]
        outside = torch.autograd.grad(torch.func.vmap(function)(*leaves).sum(), leaves)
        inside = torch.func.vmap(torch.func.grad(function, tuple(range(len(many)))))(*many)
        for i in range(2):
            one = [tensor[i].clone().requires_grad_() for tensor in many]
            for true, *gradients in zip(torch.autograd.grad(function(*one), one), outside, inside, strict=True):
                for gradient in gradients:
                    torch.testing.assert_close(gradient[i], true)


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_gradients_of_gradients_are_torchs_or_refused(operator, backend):
    function, tensors = scalar(operator)

    def twice():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), leaves)

    with use_backend(backend):
        if backend == "triton":
            with pytest.raises(ValueError, match=f"{operator}: gradients of gradients are not .* use backend torch"):
                twice()
        else:
            second = twice()
            with use_backend("torch"):
                torch.testing.assert_close(second, twice())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["linear_assignment", "mask_labels", "match_masks"])
def test_integers_are_constants_to_a_transform(operator, backend):
    """A loss that matches masks on the way can be differentiated by torch.func, on the kernels too."""
    function, tensors = calls()[operator]
    if operator == "match_masks":
        soft = torch.randn(2, 9, 3)
        loss = lambda x: (x.square() * function(x.argmax(-1), tensors[1])[..., None]).sum()  # noqa: E731
    else:
        soft = tensors[0]
        loss = lambda x: x.square().sum() * function(x).sum()  # noqa: E731
    leaf = soft.clone().requires_grad_()
    with use_backend(backend):
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(soft), expected)
        torch.testing.assert_close(torch.func.jvp(loss, (soft,), (soft,))[1], (expected * soft).sum())
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(soft[None]), expected[None])


def test_transforms_compile():
    """One graph, the same numbers; and a compiled function notices that it is called inside a transform."""
    function, tensors = scalar("slot_attention_step")
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: jvp(function, given, tangents), backend="eager", fullgraph=True)
    expected = jvp(function, tensors, tangents)
    torch.testing.assert_close(compiled(*tensors), expected)
    plain = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(plain(*tensors), function(*tensors))
    with forward_ad.dual_level():
        result = plain(*map(forward_ad.make_dual, tensors, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, expected)
    torch._dynamo.reset()
