"""The kernels of slot_attention_step, forward and backward, against float64: all kinds of tiles, splits, layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_tier import DEVICE, GRADIENT, OUTPUT, assert_as_exact, assert_graph_replays, needs_gpu, needs_triton, redraw
from spot_kernels import slot_attention_step, use_backend
from spot_kernels.gpu import launch
from spot_kernels.reference import slot_attention as reference

pytestmark = needs_triton

EPS = 1e-8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batch, heads, tokens, slots, width. One token, one slot; padded and full tiles of 16, 32 and 64 slots; four heads in
# one tile (7 and 11 slots) and with programs of their own (33 and 64).
SHAPES = [
    (2, 1, 1, 7, 24),
    (2, 1, 15, 1, 16),
    (1, 1, 49, 2, 5),
    (2, 1, 196, 6, 32),
    (1, 1, 257, 11, 40),
    (1, 1, 49, 16, 16),
    (1, 1, 49, 24, 48),
    (1, 1, 49, 33, 24),
    (1, 1, 15, 64, 16),
    (1, 4, 1, 7, 16),
    (2, 4, 49, 7, 24),
    (1, 4, 15, 11, 16),
    (1, 4, 49, 1, 16),
    (1, 4, 49, 33, 16),
    (1, 3, 15, 64, 8),
]

REAL_SHAPES = [
    (64, 1, 196, 7, 256),
    (16, 1, 1024, 7, 256),
    (8, 1, 196, 24, 256),
    (8, 1, 16384, 11, 64),
    (2, 1, 196, 64, 256),
    (8, 4, 196, 11, 64),
]


def inputs(batch, heads, tokens, slots, width, dtype=torch.float32):
    """q, k / √width, v with the heads of a token side by side, and gradients of updates, attn and logits."""
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)

    def rows(count, scale=1.0):
        values = torch.randn(batch, count, heads, width, generator=generator) * scale
        return values.to(DEVICE, dtype).transpose(1, 2)

    grads = [
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((batch, tokens, slots), (batch, heads, tokens, slots))
    ]
    return [rows(slots), rows(tokens, width**-0.5), rows(tokens)], [rows(slots), *grads]


def results(function, tensors, grads, eps):
    """updates, attn, logits, dq, dk, dv; a gradient that is None is left out of the sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = function(*leaves, eps)
    some = [(out, grad.to(out.dtype)) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    values, wanted = zip(*some, strict=True)
    return *(out.detach() for out in outs), *torch.autograd.grad(values, leaves, wanted, materialize_grads=True)


def kernels(q, k, v, eps=EPS):
    with use_backend("triton"):
        return slot_attention_step(q, k, v, eps=eps, return_attn=True, return_logits=True)


def check(tensors, grads, eps=EPS):
    ours = results(kernels, tensors, grads, eps)
    in_double = [grad if grad is None else grad.double() for grad in grads]
    exact = results(reference.slot_attention_step, [x.double() for x in tensors], in_double, eps)
    plain = results(reference.slot_attention_step, tensors, grads, eps)
    names = "updates", "attn", "logits", "dq", "dk", "dv"
    for name, *values in zip(names, ours, exact, plain, strict=True):
        assert_as_exact(name, *values, GRADIENT if name.startswith("d") else OUTPUT)
    return ours


@pytest.fixture
def plans(monkeypatch):
    """Plans of the launches of a test, with the number of programs over which each splits the tokens."""
    from spot_kernels.gpu import slot_attention_plan as module

    made, plan, splits = [], module.plan, module.splits
    monkeypatch.setattr(module, "plan", lambda *args, **kw: made.append([plan(*args, **kw)]) or made[-1][0])

    def counted(*args, **kw):
        number, span = splits(*args, **kw)
        made[-1].append(number)
        return number, span

    monkeypatch.setattr(module, "splits", counted)
    return made


@pytest.fixture
def split(monkeypatch):
    """Tokens are split over programs from 32 tokens on."""
    from spot_kernels.gpu import slot_attention_plan

    monkeypatch.setattr(slot_attention_plan, "LEAST_TOKENS", (32, 32))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(shape, dtype):
    check(*inputs(*shape, dtype))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_any_shape(batch, heads, tokens, slots, width, side_by_side):
    """In bfloat16, where PyTorch's own error does not hinge on the last bit."""
    tensors, grads = inputs(batch, heads, tokens, slots, width, torch.bfloat16)
    check(tensors if side_by_side else [x.contiguous() for x in tensors], grads, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 257, 11, 16), (1, 4, 196, 7, 16), (1, 2, 150, 33, 16)], ids=str)
def test_tokens_split_over_programs(shape, dtype, split, plans):
    tensors, grads = inputs(*shape, dtype)
    first = check(tensors, grads)
    assert len(plans) == 2 and all(number > 1 for _, number in plans)
    assert all(map(torch.equal, first, results(kernels, tensors, grads, EPS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_wider_than_a_tile(heads, dtype, monkeypatch, plans, split):
    """As on a chip with little shared memory: three programs for 40 channels, each one part of the columns."""
    from spot_kernels.gpu import slot_attention_plan

    size = 2 if dtype == torch.bfloat16 else 4
    monkeypatch.setitem(slot_attention_plan.TILE_BYTES, launch.architecture(DEVICE), 16 * 16 * size // 2)
    monkeypatch.setitem(slot_attention_plan.TILE_BYTES, "interpreter", 16 * 16 * size)
    check(*inputs(1, heads, 70, 7, 40, dtype))
    assert all(not plan.whole and plan.joint == (heads > 1) for plan, _ in plans)


def test_weights_rounded_to_tf32(monkeypatch):
    """Tensor cores get fp16 and tf32 weights rounded to nearest, by at most half a unit of 2^-10."""
    from spot_kernels.gpu import slot_attention_plan as module

    tensors, grads = inputs(2, 2, 49, 7, 24)
    exact = results(kernels, tensors, grads, EPS)
    precisions = module.precisions
    monkeypatch.setattr(module, "precisions", lambda *args: precisions(*args) | {"ROUND": "tf32"})
    for value, expected in zip(results(kernels, tensors, grads, EPS), exact, strict=True):
        error = (value - expected).abs().max()
        assert error <= 2**-10 * expected.abs().max()
    updates, expected = kernels(*tensors)[0], exact[0]
    assert not torch.equal(updates, expected)


@pytest.mark.parametrize("heads, slots", [(1, 7), (4, 7), (4, 33)])
@pytest.mark.parametrize("wanted", ["updates", "attn", "logits", "updates and logits"])
def test_gradients_of_some_results(wanted, heads, slots):
    tensors, grads = inputs(1, heads, 20, slots, 16)
    names = "updates", "attn", "logits"
    check(tensors, [grad if name in wanted else None for name, grad in zip(names, grads, strict=True)])


def test_which_heads_share_a_tile(plans):
    """Four heads side by side do; in another layout, with many slots or wide heads, each has programs of its own."""
    for slots, width, contiguous, joint in ((7, 16, False, False), (7, 16, True, True), (24, 16, False, True)):
        tensors, _ = inputs(1, 4, 9, slots, width)
        kernels(*[x.contiguous() for x in tensors] if contiguous else tensors)
        assert plans[-1][0].joint is joint, (slots, width, contiguous)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, heads):
    """Logits of ±10,000 give weights of 0, 1 and equal shares; every other slot has ordinary logits."""
    tensors, grads = inputs(1, heads, 40, 6, 16, dtype)
    q, k, v = (torch.where(x > 0, 25.0, -25.0).to(dtype) for x in tensors)
    q[:, :, 0], q[:, :, 2] = k[:, :, 0], -k[:, :, 0]
    q[:, :, 3] = q[:, :, 0]
    q[:, :, 1::4] /= 4096
    assert (q @ k.transpose(2, 3)).aminmax() == (-10_000, 10_000)
    check([q, k, tensors[2]], grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_shift_of_all_logits_changes_nothing(dtype):
    """Small whole numbers make the shift exact, so the results must agree to the last bit."""
    (q, k, v), _ = inputs(1, 1, 40, 7, 16, dtype)
    q, k = q.round(), (4 * k).round()
    k[..., -1] = 1
    shifted = q.clone()
    shifted[..., -1] += 64
    updates, attn, logits = kernels(q, k, v)
    assert torch.equal(kernels(shifted, k, v)[2], logits + 64)
    assert all(map(torch.equal, kernels(shifted, k, v)[:2], (updates, attn)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_slot_without_tokens_averages_all_tokens(heads, dtype):
    """eps = 1e-8 is below the smallest fp16 number, and must not be lost there."""
    (q, k, v), grads = inputs(1, heads, 33, 3, 16, dtype)
    k = torch.full_like(k, 4.0)
    q[:, :, 0], q[:, :, 1:] = 4.0, -4.0
    updates, attn, *_ = check([q, k, v], grads)
    assert attn[..., 1].max() == 0
    torch.testing.assert_close(updates[:, :, 1], v.float().mean(2).to(dtype))


@pytest.mark.parametrize("shape", [(2, 1, 49, 7, 24), (2, 4, 49, 7, 16), (2, 2, 49, 33, 16)], ids=str)
def test_same_bits_every_time_and_in_any_batch(shape):
    tensors, grads = inputs(*shape)
    together = results(kernels, tensors, grads, EPS)
    assert all(map(torch.equal, together, results(kernels, tensors, grads, EPS)))
    alone = results(kernels, [x[1:] for x in tensors], [x[1:] for x in grads], EPS)
    assert all(torch.equal(one[0], both[1]) for one, both in zip(alone, together, strict=True))


def test_empty_batch(split):
    check(*inputs(0, 4, 70, 7, 16))


def test_results_have_the_layout_of_merged_heads():
    tensors, grads = inputs(2, 3, 9, 7, 16)
    updates, _, _, *gradients = results(kernels, [x.contiguous() for x in tensors], grads, EPS)
    assert all(x.transpose(1, 2).is_contiguous() for x in (updates, *gradients))


@needs_gpu
@pytest.mark.parametrize("shape", [(64, 1, 196, 7, 256), (2, 1, 16384, 11, 64), (4, 4, 196, 33, 64)], ids=str)
def test_captured_in_a_graph_without_a_sync(shape):
    tensors, grads = inputs(*shape, torch.bfloat16)
    assert_graph_replays(lambda: results(kernels, tensors, grads, EPS), lambda seed: redraw(tensors, seed))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes_as_exact_as_pytorch(shape, dtype):
    check(*inputs(*shape, dtype))
