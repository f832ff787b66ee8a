"""slot_attention_step: the formula of SPEC section 2 written out, gradients, optional results, odd sizes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

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


def test_softmax_runs_over_heads_and_slots_jointly():
    q, k, v = inputs(heads=4)
    _, attn, _ = slot_attention_step(q, k, v, return_attn=True)
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_of_all_three_results(heads):
    def all_results(q, k, v):
        return slot_attention_step(q, k, v, eps=1e-2, return_attn=True, return_logits=True)

    assert gradcheck(all_results, inputs(heads=heads, tokens=5, slots=3, width=2, grad=True))


def test_attention_and_logits_only_on_request():
    q, k, v = inputs()
    updates, attn, logits = slot_attention_step(q, k, v)
    assert attn is None and logits is None
    assert torch.equal(updates, slot_attention_step(q, k, v, return_attn=True)[0])


def test_a_slot_without_tokens_averages_all_tokens():
    """eps after the softmax keeps an empty slot's update finite: the plain mean of v."""
    q, k, v = inputs(slots=2, dtype=torch.float32)
    k = torch.full_like(k, 30.0)
    q[:, :, 0], q[:, :, 1] = 30.0, -30.0
    updates, attn, _ = slot_attention_step(q, k, v, return_attn=True)
    assert attn[..., 1].max() == 0
    torch.testing.assert_close(updates[:, :, 1], v.mean(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_attention_in_float32(dtype):
    q, k, v = inputs(dtype=dtype)
    updates, attn, logits = slot_attention_step(q, k, v, return_attn=True, return_logits=True)
    assert (updates.dtype, attn.dtype, logits.dtype) == (dtype, torch.float32, torch.float32)
    expected = slot_attention_step(q.double(), k.double(), v.double())[0]
    assert (updates.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * v.abs().max()


def test_empty_batch_and_strided_inputs():
    q, k, v = inputs(batch=0)
    assert slot_attention_step(q, k, v)[0].shape == (0, 1, 4, 5)
    q, k, v = inputs(heads=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(slot_attention_step(*strided)[0], slot_attention_step(q, k, v)[0])


def test_compiles_into_one_graph():
    step = torch.compile(slot_attention_step, backend="eager", fullgraph=True)
    q, k, v = inputs(heads=2)
    assert torch.equal(step(q, k, v)[0], slot_attention_step(q, k, v)[0])


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
        found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(map(torch.equal, found, expected))


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
    found = OPERATORS.slot_attention_step(*leaves, 1e-3, True, True, "torch")[:3]
    expected = reference.slot_attention_step(*leaves, 1e-3)
    torch.testing.assert_close(found, expected)
    gradients = []
    for results in (found, expected):
        some = [result for result, keep in zip(results, present, strict=True) if keep]
        grads = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in some]
        gradients.append(torch.autograd.grad(some, leaves, grads, materialize_grads=True))
    torch.testing.assert_close(*gradients)


@needs_triton
def test_gradients_of_gradients_are_refused():
    q, k, v = on(DEVICE, "dense")
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(slot_attention_step(q, k, v)[0].square().sum(), k, create_graph=True)
        with pytest.raises(ValueError, match="slot_attention_step: gradients of gradients .* use backend torch"):
            grad.sum().backward()


def test_torch_backend_gives_gradients_of_gradients():
    with use_backend("torch"):
        assert gradgradcheck(lambda *x: slot_attention_step(*x, eps=1e-2)[0], inputs(1, 1, 4, 3, 2, grad=True))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_results_that_are_not_requested_get_no_gradient_and_no_memory(backend, device):
    q, k, v = on(device, "permuted")
    raw = OPERATORS.slot_attention_step(q, k, v, 1e-8, False, False, backend)
    assert raw[1].numel() == raw[2].numel() == 0
    assert [x.requires_grad for x in raw[3:]] == [False, False]
    with use_backend(backend):
        _, attn, logits = slot_attention_step(q, k, v)
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
