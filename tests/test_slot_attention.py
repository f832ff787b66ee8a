"""slot_attention_step: the formula of SPEC section 2 written out, gradients, optional results, odd sizes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spot_kernels import slot_attention_step


def inputs(batch=2, heads=1, tokens=9, slots=4, width=5, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((slots, width), (tokens, width), (tokens, width))
    return [torch.randn(batch, heads, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
            for s in shapes]  # fmt: skip


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


def test_attention_and_logits_only_when_asked():
    q, k, v = inputs()
    updates, attn, logits = slot_attention_step(q, k, v)
    assert attn is None and logits is None
    assert torch.equal(updates, slot_attention_step(q, k, v, return_attn=True)[0])


def test_a_slot_that_no_token_wants_averages_all_tokens():
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
