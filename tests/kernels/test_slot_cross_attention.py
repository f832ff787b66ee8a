"""slot_cross_attention: softmax over slots per head, head-averaged map, gradients, odd sizes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spot_kernels import slot_cross_attention
from spot_kernels.reference import slot_cross_attention as reference


def inputs(batch=2, heads=3, tokens=9, slots=4, width=5, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((tokens, width), (slots, width), (slots, width))
    return [
        torch.randn(batch, heads, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for s in shapes
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 33), st.integers(1, 33), st.integers(1, 9))
def test_equals_the_formula(batch, heads, tokens, slots, width):
    q, k, v = inputs(batch, heads, tokens, slots, width)
    out, mean_map = slot_cross_attention(q, k, v)
    p = (torch.einsum("bhnd,bhkd->bhnk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhnk,bhkd->bhnd", p, v))
    torch.testing.assert_close(mean_map, p.mean(1))
    torch.testing.assert_close(mean_map.sum(-1), torch.ones(batch, tokens, dtype=torch.float64))


def test_gradients_of_both_results():
    assert gradcheck(slot_cross_attention, inputs(tokens=4, slots=3, heads=2, width=2, grad=True))


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_written_out_gradients_are_those_of_autograd(which):
    tensors = inputs(grad=True)
    outputs = reference.slot_cross_attention(*tensors)
    given = [torch.randn_like(output) if wanted else None for output, wanted in zip(outputs, which, strict=True)]
    asked = [i for i in (0, 1) if which[i]]
    expected = torch.autograd.grad(
        [outputs[i] for i in asked], tensors, [given[i] for i in asked], materialize_grads=True
    )
    with torch.no_grad():
        torch.testing.assert_close(reference.gradients(*given, *tensors), expected)


def test_map_only_when_asked_and_the_output_is_the_same():
    q, k, v = inputs()
    out, nothing = slot_cross_attention(q, k, v, return_map=False)
    assert nothing is None
    torch.testing.assert_close(out, slot_cross_attention(q, k, v)[0])


def test_half_precision_keeps_the_map_in_float32():
    out, mean_map = slot_cross_attention(*inputs(dtype=torch.bfloat16))
    assert (out.dtype, mean_map.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mean_map.sum(-1), torch.ones(2, 9))


def test_bad_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"k \(2, 3, 4, 4\) does not fit"):
        slot_cross_attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"v \(2, 3, 3, 5\) does not fit"):
        slot_cross_attention(q, k, v[:, :, :3])
    with pytest.raises(ValueError, match="at least one slot"):
        slot_cross_attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="v is torch.float32 but q is torch.float64"):
        slot_cross_attention(q, k, v.float())
