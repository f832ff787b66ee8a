"""slot_attention_step: the formula of SPEC section 2 written out, gradients, optional results, odd sizes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kernel_tier import DEVICE, needs_triton
from spot_kernels import chosen_backend, slot_attention_step, use_backend
from spot_kernels.reference import slot_attention as reference

OPERATORS = torch.ops.spot_kernels
# What the custom operators run: the kernels, or the reference where a graph that was traced with them runs elsewhere.
BACKENDS = [
    pytest.param("triton", DEVICE, marks=needs_triton, id="triton"),
    pytest.param("torch", torch.device("cpu"), id="torch"),
]


def inputs(batch=2, heads=1, tokens=9, slots=4, width=5, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((slots, width), (tokens, width), (tokens, width))
    return [
        torch.randn(batch, heads, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for s in shapes
    ]


def by_the_formula(q, k, v, eps):
    """One token, head and slot at a time."""
    batch, heads, slots, _ = q.shape
    tokens = k.shape[2]
    logits = torch.einsum("bhnd,bhkd->bhnk", k, q)
    weights = torch.zeros_like(logits)
    for b in range(batch):
        for n in range(tokens):
            weights[b, :, n] = logits[b, :, n].flatten().softmax(0).view(heads, slots)
    attn = sum(weights[:, h] for h in range(heads))
    normalised = (weights + eps) / (weights + eps).sum(2, keepdim=True)
    return torch.einsum("bhnk,bhnd->bhkd", normalised, v), attn, logits


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 33), st.integers(1, 9))
def test_equals_the_formula(batch, heads, tokens, slots, width):
    q, k, v = inputs(batch, heads, tokens, slots, width)
    got = slot_attention_step(q, k, v, eps=1e-3, return_attn=True, return_logits=True)
    for value, expected in zip(got, by_the_formula(q, k, v, 1e-3), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_of_all_three_results(heads):
    def all_results(q, k, v):
        return slot_attention_step(q, k, v, eps=1e-2, return_attn=True, return_logits=True)

    assert gradcheck(all_results, inputs(heads=heads, tokens=5, slots=3, width=2, grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_attention_in_float32(dtype):
    q, k, v = inputs(dtype=dtype)
    updates, attn, logits = slot_attention_step(q, k, v, return_attn=True, return_logits=True)
    assert (updates.dtype, attn.dtype, logits.dtype) == (dtype, torch.float32, torch.float32)
    expected = slot_attention_step(q.double(), k.double(), v.double())[0]
    assert (updates.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * v.abs().max()


def test_bad_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"q \(2, 4, 5\) must have the layout"):
        slot_attention_step(q[:, 0], k, v)
    with pytest.raises(ValueError, match=r"k \(2, 1, 9, 4\) does not fit"):
        slot_attention_step(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"v \(2, 1, 8, 5\) does not fit"):
        slot_attention_step(q, k, v[:, :, :8])
    with pytest.raises(ValueError, match="at least one head and one slot"):
        slot_attention_step(q[:, :, :0], k, v)
    with pytest.raises(ValueError, match="k is torch.float32 but q is torch.float64"):
        slot_attention_step(q, k.float(), v)
    with pytest.raises(ValueError, match="q is torch.int64"):
        slot_attention_step(q.long(), k.long(), v.long())


def on(device, layout, heads=2, dtype=torch.float32):
    """q, k, v as leaves that need gradients: dense, or with the heads of a token side by side."""
    tensors = [x.to(device) for x in inputs(heads=heads, dtype=dtype)]
    if layout == "permuted":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)])
def test_opcheck(backend, device, layout, asked):
    """Schema, fake tensors (shapes, dtypes, strides), autograd registration and tracing, of forward and backward."""
    q, k, v = on(device, layout)
    torch.library.opcheck(OPERATORS.slot_attention_step.default, (q, k, v, 1e-3, *asked, backend))
    updates, attn, logits, exact, sums = OPERATORS.slot_attention_step(q, k, v, 1e-3, *asked, backend)
    grads = [torch.ones_like(x).detach() if x.numel() else None for x in (updates, attn, logits)]
    saved = [x.detach() for x in (q, k, v, exact, sums)]
    torch.library.opcheck(OPERATORS.slot_attention_step_backward.default, (*grads, *saved, 1e-3, backend))
    torch.library.opcheck(OPERATORS.slot_attention_step_backward.default, (None, *grads[1:], *saved, 1e-3, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_compiled_forward_and_backward_give_the_same_numbers(backend, device, heads):
    def loss(q, k, v):
        updates, attn, logits = slot_attention_step(q, k, v, return_attn=True, return_logits=True)
        return updates.square().sum() + attn.square().sum() + logits.sum()

    q, k, v = on(device, "permuted", heads)
    with use_backend(backend):
        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_casts_the_inputs_and_keeps_float32_weights(backend, device):
    q, k, v = on(device, "permuted")
    with use_backend(backend), torch.autocast(device.type, dtype=torch.bfloat16):
        updates, attn, _ = slot_attention_step(q, k, v, return_attn=True)
        grads = torch.autograd.grad(updates.float().square().sum() + attn[..., 0].sum(), (q, k, v))
    assert (updates.dtype, attn.dtype) == (torch.bfloat16, torch.float32)
    assert [x.dtype for x in grads] == 3 * [torch.float32]
    with use_backend(backend):
        assert torch.equal(updates, slot_attention_step(q.bfloat16(), k.bfloat16(), v.bfloat16())[0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_the_operator_on_pytorch_has_the_gradients_of_autograd(heads, present):
    """Its written-out backward, with a gradient of every result and of each alone."""
    leaves = inputs(heads=heads, grad=True)
    ours = OPERATORS.slot_attention_step(*leaves, 1e-3, True, True, "torch")[:3]
    expected = reference.slot_attention_step(*leaves, 1e-3)
    torch.testing.assert_close(ours, expected)
    gradients = []
    for results in (ours, expected):
        some = [result for result, keep in zip(results, present, strict=True) if keep]
        grads = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in some]
        gradients.append(torch.autograd.grad(some, leaves, grads, materialize_grads=True))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_results_that_are_not_requested_get_no_gradient_and_no_memory(backend, device):
    q, k, v = on(device, "permuted")
    raw = OPERATORS.slot_attention_step(q, k, v, 1e-8, False, False, backend)
    assert raw[1].numel() == raw[2].numel() == 0
    assert [x.requires_grad for x in raw[3:]] == [False, False]
    with use_backend(backend):
        updates, attn, logits = slot_attention_step(q, k, v)
        assert torch.equal(updates, slot_attention_step(q, k, v, return_attn=True)[0])
    assert attn is None and logits is None


@needs_triton
def test_inputs_beyond_the_kernels_limits():
    """More than 64 slots or 256 channels, and float64: an error where they were requested, PyTorch otherwise."""
    big = [(65, 8, "more than 64 slots"), (3, 257, "more than 256 channels")]
    for slots, width, words in big:
        tensors = [x.to(DEVICE) for x in inputs(1, 1, 4, slots, width, torch.float32)]
        expected = reference.slot_attention_step(*tensors, 1e-8)[0]
        torch.testing.assert_close(slot_attention_step(*tensors)[0], expected)
        with use_backend("triton"), pytest.raises(ValueError, match=words):
            slot_attention_step(*tensors)
    tensors = [x.to(DEVICE) for x in inputs()]
    assert chosen_backend("slot_attention_step", tensors[0]) == "torch"
    with use_backend("triton"), pytest.raises(ValueError, match="do not take torch.float64"):
        slot_attention_step(*tensors)
