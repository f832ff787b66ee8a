"""folded_cross_attention and the modules that use it: the unfused formula, gradients, odd sizes, error, bad input."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spot_kernels import dispatch, folded_cross_attention, folded_cross_map, use_backend
from spot_kernels.folded_cross_attention import columns, padded, takes
from spot_kernels.modules import PermutedDecoder, SlotCrossAttention, permuted_decoder
from spot_kernels.reference import folded_cross_attention as reference


def inputs(batch=2, heads=3, tokens=9, slots=4, width=5, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((tokens, width), (heads, slots, width), (heads, slots, width))
    return [
        torch.randn(batch, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 33), st.integers(1, 33), st.integers(1, 9))
def test_equals_the_formula(batch, heads, tokens, slots, width):
    x, a, v = inputs(batch, heads, tokens, slots, width)
    out, mean_map = folded_cross_attention(x, a, v, scale=0.3)
    p = (0.3 * torch.einsum("bnd,bhkd->bhnk", x, a)).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhnk,bhkd->bnd", p, v))
    torch.testing.assert_close(mean_map, p.mean(1))
    assert torch.equal(folded_cross_map(x, a, scale=0.3), mean_map)


def test_gradients_of_both_results():
    small = inputs(tokens=4, slots=3, heads=2, width=2, grad=True)
    assert gradcheck(lambda *given: folded_cross_attention(*given, scale=0.7), small)
    assert gradcheck(lambda x, a: folded_cross_map(x, a, scale=0.7), small[:2])


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_written_out_gradients_are_those_of_autograd(which):
    tensors = inputs(grad=True)
    outputs = reference.folded_cross_attention(*tensors, 0.6)
    given = [torch.randn_like(output) if wanted else None for output, wanted in zip(outputs, which, strict=True)]
    asked = [i for i in (0, 1) if which[i]]
    expected = torch.autograd.grad(
        [outputs[i] for i in asked], tensors, [given[i] for i in asked], materialize_grads=True
    )
    with torch.no_grad():
        p = reference.probabilities(*tensors[:2], 0.6)
        torch.testing.assert_close(reference.gradients(*given, *tensors, p, 0.6), expected)


def test_map_only_when_asked_and_the_output_is_the_same():
    tensors = inputs()
    out, nothing = folded_cross_attention(*tensors, return_map=False)
    assert nothing is None
    torch.testing.assert_close(out, folded_cross_attention(*tensors)[0])


def test_half_precision_keeps_the_map_in_float32():
    out, mean_map = folded_cross_attention(*inputs(dtype=torch.bfloat16))
    assert (out.dtype, mean_map.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mean_map.sum(-1), torch.ones(2, 9))


def test_columns_of_a_tile_are_powers_of_two_that_hold_all_slots():
    assert (padded(6, 7), padded(1, 7), padded(2, 3)) == ((8, 8), (1, 16), (2, 8))
    for heads in range(1, 17):
        for slots in range(1, 65):
            tile_heads, tile_slots = padded(heads, slots)
            assert tile_heads >= heads and tile_slots >= slots and tile_heads * tile_slots == columns(heads, slots)
            assert columns(heads, slots) >= 16 and columns(heads, slots).bit_count() == 1


def test_bad_arguments_are_named():
    x, a, v = inputs()
    with pytest.raises(ValueError, match=r"a \(2, 3, 4, 4\) does not fit"):
        folded_cross_attention(x, a[..., :4], v)
    with pytest.raises(ValueError, match=r"v \(2, 3, 3, 5\) does not fit"):
        folded_cross_attention(x, a, v[:, :, :3])
    with pytest.raises(ValueError, match="at least one head, one slot"):
        folded_cross_attention(x, a[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="v is torch.float32 but x is torch.float64"):
        folded_cross_attention(x, a, v.float())
    with pytest.raises(ValueError, match="folded_cross_map: scale=0 must be above 0"):
        folded_cross_map(x, a, scale=0)


# ---- the module


def plain():
    return dispatch.without("folded_cross_attention")


def module(width=96, heads=3, slots=8, batch=2, tokens=21, dtype=torch.float64):
    """A cross-attention, normalised tokens, slots."""
    torch.manual_seed(width + heads + slots)
    attention = SlotCrossAttention(width, heads, gain=0.3).to(dtype)
    tokens = F.layer_norm(torch.randn(batch, tokens, width), (width,)).to(dtype).requires_grad_()
    return attention, tokens, torch.randn(batch, slots, width).to(dtype).requires_grad_()


def results(attention, tokens, slots, grad_out, grad_map):
    """out, map and the gradients of tokens, slots and all weights."""
    out, mean_map = attention(tokens, slots, return_map=True)
    wanted = tokens, slots, *attention.parameters()
    grads = grad_out.to(out.dtype), grad_map.to(mean_map.dtype)
    return out, mean_map, *torch.autograd.grad((out, mean_map), wanted, grads)


def folded(attention, slots) -> bool:
    return attention.keys_values(slots).folded


@pytest.mark.parametrize("width, heads, slots", [(96, 3, 8), (64, 1, 3), (128, 4, 6), (48, 6, 2)])
def test_folding_changes_no_result_and_no_gradient(width, heads, slots):
    attention, tokens, slots = module(width, heads, slots)
    grads = torch.randn_like(tokens), torch.randn(*tokens.shape[:2], slots.shape[1]).double()
    assert folded(attention, slots)
    ours = results(attention, tokens, slots, *grads)
    with plain():
        assert not folded(attention, slots)
        expected = results(attention, tokens, slots, *grads)
        expected_map = attention.map(tokens, slots)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(attention.map(tokens, slots), expected_map, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width, heads, slots, batch, tokens", [(768, 6, 7, 3, 196), (128, 4, 6, 8, 64)])
def test_error_in_bfloat16_is_no_larger_than_without_folding(width, heads, slots, batch, tokens):
    """Of outputs and gradients of the whole block against float64, in the mean; rounding is a matter of luck at one."""
    attention, tokens, slots = module(width, heads, slots, batch, tokens, torch.float32)
    grads = torch.randn_like(tokens).bfloat16(), 0.1 * torch.randn(*tokens.shape[:2], slots.shape[1])
    exact = results(
        copy.deepcopy(attention).double(), *(t.detach().double().requires_grad_() for t in (tokens, slots)), *grads
    )

    def errors(context):
        with context, torch.autocast("cpu", torch.bfloat16):
            computed = results(attention, tokens, slots, *grads)
        return [
            ((c.double() - e).square().mean() / e.square().mean()).sqrt().item()
            for c, e in zip(computed, exact, strict=True)
        ]

    ours, theirs = errors(contextlib.nullcontext()), errors(plain())
    assert all(1e-4 < mine <= 1.1 * other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_folds_only_where_it_is_less_work():
    attention, _, slots = module(96, 3, 8)
    assert folded(attention, slots)
    assert not folded(attention, torch.cat([slots, slots[:, :1]], 1))  # 4 × 27 > 96
    assert not folded(attention, slots[:, :0])


def test_the_work_that_is_left():
    """FLOPs of forward: two products over the tokens instead of four, none of D × D."""
    from torch.utils.flop_counter import FlopCounterMode

    (attention, tokens, slots), n, k, d, h = module(128, 4, 6, 2, 64), 64, 6, 128, 4
    counted = []
    for context in (contextlib.nullcontext(), plain()):
        with context, FlopCounterMode(display=False) as counter:
            attention(tokens, slots, return_map=True)
        counted.append(counter.get_total_flops() // 2)
    both = 4 * k * d * d  # k and v of the slots
    assert counted == [4 * n * h * k * d + 4 * k * d * d + both, 4 * n * d * d + 4 * n * k * d + both]


class Adapter(torch.nn.Linear):
    pass


@pytest.mark.parametrize("change", ["hook", "adapter", "bias"])
@pytest.mark.parametrize("layer", ["project_q", "project_o"])
def test_layers_that_do_more_than_a_product_are_called(layer, change):
    attention, tokens, slots = module()
    expected = attention(tokens, slots, return_map=True)
    inner, calls = getattr(attention, layer), []
    if change == "hook":
        inner.register_forward_hook(lambda *_: calls.append(1))
    elif change == "adapter":
        inner.__class__ = Adapter
    else:
        inner.bias = torch.nn.Parameter(torch.zeros(96, dtype=torch.float64))
    assert not folded(attention, slots)
    torch.testing.assert_close(attention(tokens, slots, return_map=True), expected)
    torch.testing.assert_close(attention.map(tokens, slots), expected[1])
    if change == "hook":
        assert len(calls) == (2 if layer == "project_q" else 1)  # the map alone needs no output
    # the other projections are layers in either form
    attention, tokens, slots = module()
    attention.project_k.register_forward_hook(lambda *_: calls.append(2))
    assert folded(attention, slots) and 2 in calls


def test_more_columns_than_the_kernels_hold_are_folded_by_pytorch_alone(monkeypatch):
    bf16, float32 = torch.zeros(1, 24, 768, dtype=torch.bfloat16), torch.zeros(1, 24, 768)
    with use_backend("torch"):
        assert takes(bf16, 6, 24)
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with use_backend("triton"):
        assert takes(bf16, 6, 16) and not takes(bf16, 6, 24)
        assert takes(float32, 6, 8) and not takes(float32, 6, 16)
        with torch.autocast("cpu", torch.bfloat16):
            assert takes(float32, 6, 16)
        attention, tokens, slots = module(768, 6, 24, 1, 3, torch.float32)
        assert not folded(attention, slots)


def test_orders_share_folded_slots(monkeypatch):
    """Nine orders fold once, in every block."""
    torch.manual_seed(0)
    decoder = PermutedDecoder(64, blocks=2, heads=4).double()
    tokens, slots = torch.randn(2, 9, 64).double(), torch.randn(2, 4, 64).double()
    orders = torch.stack([torch.randperm(9) for _ in range(9)])
    sources = torch.arange(9).expand(9, 9)
    expected = [decoder(tokens, slots, order) for order in orders]
    made = []
    fold = permuted_decoder.fold_output
    monkeypatch.setattr(permuted_decoder, "fold_output", lambda *given: made.append(1) or fold(*given))
    for ours, theirs in zip(decoder.decode_orders(tokens, slots, orders, sources), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert len(made) == 2


def test_compiled_whole():
    attention, tokens, slots = module(dtype=torch.float32)
    expected = attention(tokens, slots, return_map=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, slots, return_map=True), expected)
    torch._dynamo.reset()
