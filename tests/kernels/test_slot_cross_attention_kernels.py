"""The Triton kernels of slot_cross_attention: exactness, layouts, extreme values, the custom operators around them."""

import pytest
import torch

from kernel_tier import DEVICE, GRADIENT, OUTPUT, assert_as_exact, assert_graph_replays, needs_gpu, needs_triton, redraw
from spot_kernels import dispatch
from spot_kernels.dispatch import chosen_backend, use_backend
from spot_kernels.modules import PermutedDecoderBlock
from spot_kernels.slot_cross_attention import (
    _backward,
    _forward,
    _map,
    _map_backward,
    slot_cross_attention,
    slot_cross_map,
)

if dispatch.TRITON:
    from spot_kernels.gpu import slot_cross_attention as kernels

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# slots, tokens, heads, width: every number of slots, and every number of tokens and heads with several of them
SHAPES = (
    (1, 257, 1, 16),
    (2, 1, 4, 5),
    (6, 15, 6, 32),
    (7, 49, 1, 8),
    (11, 196, 4, 24),
    (16, 257, 6, 1),
    (24, 1, 1, 16),
    (33, 15, 4, 40),
    (64, 49, 6, 16),
    (7, 196, 6, 16),
)


def inputs(batch=1, heads=2, tokens=40, slots=7, width=16, dtype=torch.float32, grad=True):
    """q, k, v and gradients of out and map, on the device, with values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((tokens, width), (slots, width), (slots, width), (tokens, width))
    q, k, v, grad_out = (torch.randn(batch, heads, *s, generator=generator).to(dtype).to(DEVICE) for s in shapes)
    grad_map = torch.randn(batch, tokens, slots, generator=generator).to(DEVICE)
    return [t.requires_grad_(grad) for t in (q, k, v)], grad_out, grad_map


def run(backend, tensors, grad_out, grad_map, dtype=None):
    """out, map and the gradients of q, k and v; in another dtype where one is given."""
    tensors = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
    with use_backend(backend):
        out, mean_map = slot_cross_attention(*tensors)
    grads = [g if g is None else g.to(o.dtype) for g, o in ((grad_out, out), (grad_map, mean_map))]
    results, grads = zip(*((o, g) for o, g in zip((out, mean_map), grads, strict=True) if g is not None), strict=True)
    return out, mean_map, *torch.autograd.grad(results, tensors, grads, allow_unused=True)


NAMES = ("out", "map", "grad q", "grad k", "grad v")
FACTORS = (OUTPUT, OUTPUT, GRADIENT, GRADIENT, GRADIENT)


def check(tensors, grad_out, grad_map):
    exact = run("torch", tensors, grad_out, grad_map, torch.float64)
    plain = run("torch", tensors, grad_out, grad_map)
    results = run("triton", tensors, grad_out, grad_map)
    for name, ours, true, theirs, factor in zip(NAMES, results, exact, plain, FACTORS, strict=True):
        if theirs is None:  # no path to v from the map alone: the kernels say zero
            assert not ours.any()
        else:
            assert_as_exact(name, ours, true, theirs, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots, tokens, heads, width", SHAPES)
def test_as_exact_as_pytorch(slots, tokens, heads, width, dtype):
    check(*inputs(1, heads, tokens, slots, width, dtype))


@pytest.mark.parametrize("dtype, width", [(torch.float32, 80), (torch.bfloat16, 160), (torch.float16, 129)])
def test_heads_wider_than_a_tile(dtype, width):
    check(*inputs(1, 1, 20, 7, width, dtype))


def run_map(backend, tensors, grad_map, dtype=None):
    """map and the gradients of q and k, of slot_cross_map."""
    q, k = ((t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors[:2])
    with use_backend(backend):
        mean_map = slot_cross_map(q, k)
    return mean_map, *torch.autograd.grad(mean_map, (q, k), grad_map.to(mean_map.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots, tokens, heads, width", [*SHAPES, (7, 20, 1, 160), (11, 90, 1, 16)])
def test_the_map_alone(slots, tokens, heads, width, dtype):
    """As exact as PyTorch, forward and backward, and the bits of the map that comes with an output."""
    tensors, _, grad_map = inputs(1, heads, tokens, slots, width, dtype)
    exact, plain, kernel = (
        run_map(backend, tensors, grad_map, wide)
        for backend, wide in (("torch", torch.float64), ("torch", None), ("triton", None))
    )
    for parts in zip(NAMES[1:4], kernel, exact, plain, FACTORS[1:4], strict=True):
        assert_as_exact(*parts)
    assert all(map(torch.equal, kernel, run("triton", tensors, None, grad_map)[1:4]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_map_keeps_its_promises(backend, permuted):
    (q, k, _), _, grad_map = inputs(1, 2, 9, 3, 4)
    if permuted:
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        grad_map = grad_map.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(_map, (q, k, backend))
    torch.library.opcheck(_map_backward, (grad_map, q.detach(), k.detach(), backend))


def test_the_map_compiles():
    (q, k, _), _, _ = inputs(tokens=5)
    with use_backend("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(slot_cross_map, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k), slot_cross_map(q, k))


def test_a_teachers_last_block_runs_the_kernel(monkeypatch):
    """The whole of a teacher's pass is on kernels: its last cross-attention gives the map and nothing else."""
    block = PermutedDecoderBlock(32, 2, 2, gain=1.0, first=False).to(DEVICE).requires_grad_(False)
    tokens, slots = torch.randn(2, 9, 32, device=DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    order = torch.randperm(9, device=DEVICE)
    with dispatch.without("folded_cross_attention"):
        expected = block(tokens, slots, order, return_map=True)[1]
    seen = []
    monkeypatch.setattr(kernels, "forward", lambda *given, run=kernels.forward: seen.append(given) or run(*given))
    with use_backend("triton"), dispatch.without("folded_cross_attention"):
        torch.testing.assert_close(block.map(tokens, slots, order), expected, rtol=1e-4, atol=1e-5)
    ((_, _, v, out, _),) = seen
    assert v is None and out is None


@pytest.mark.parametrize("batch, heads, tokens", [(5, 1, 33), (1, 1, 90), (2, 2, 0)])
def test_tokens_split_over_programs_or_not(batch, heads, tokens):
    check(*inputs(batch, heads, tokens))


@pytest.mark.parametrize("which", ["out", "map"])
def test_gradient_of_one_result(which):
    tensors, grad_out, grad_map = inputs()
    check(tensors, grad_out if which == "out" else None, grad_map if which == "map" else None)


def test_without_the_map_the_output_and_its_gradients_are_the_same():
    tensors, grad_out, _ = inputs()
    with_map = run("triton", tensors, grad_out, None)
    with use_backend("triton"):
        out, nothing = slot_cross_attention(*tensors, return_map=False)
    assert nothing is None and torch.equal(out, with_map[0])
    assert all(map(torch.equal, torch.autograd.grad(out, tensors, grad_out), with_map[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(dtype, size):
    (q, k, v), grad_out, grad_map = inputs(width=16, dtype=dtype)
    with torch.no_grad():
        # a logit of ± 1e4 in the first slot; half of the tokens see ∓ 1e4 instead
        q[..., 0], k[..., 0] = 200, 0
        q[:, :, ::2, 0] = -200
        k[:, :, 0, 0] = size / 200 * 16**0.5
    check((q, k, v), grad_out, grad_map)


def test_a_shift_of_all_logits_changes_nothing():
    (q, k, v), grad_out, grad_map = inputs()
    # whole numbers: every logit is exact, so that the softmax has to be the same to the last bit
    q, k = (q.detach() * 4).round(), (k.detach() * 4).round()
    before, after = (run("triton", (q, keys, v), grad_out, grad_map) for keys in (k, k + 1024))
    for name, a, b in zip(NAMES[:2] + NAMES[3:], before[:2] + before[3:], after[:2] + after[3:], strict=True):
        assert torch.equal(a, b), name


def test_the_map_is_a_distribution_over_the_slots_that_are_there():
    tensors, _, _ = inputs(slots=33)
    with torch.no_grad():
        tensors[1].sub_(100)  # padded slots of logit 0 would take everything
    with use_backend("triton"):
        _, mean_map = slot_cross_attention(*tensors)
    torch.testing.assert_close(mean_map.sum(-1), torch.ones_like(mean_map[..., 0]))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 16), (2, 2, 0, 7, 16)])
def test_nothing_to_do(shape):
    tensors, grad_out, grad_map = inputs(*shape)
    out, mean_map, *gradients = run("triton", tensors, grad_out, grad_map)
    assert out.shape == grad_out.shape and mean_map.shape == grad_map.shape
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("batch", [1, 5])
def test_repeats_bit_for_bit(batch):
    arguments = inputs(batch, 1, 90, 11, 16, torch.bfloat16)
    first, second = run("triton", *arguments), run("triton", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(backend, permuted):
    tensors, grad_out, grad_map = inputs(1, 2, 9, 3, 4)
    if permuted:
        tensors = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors]
        grad_out = grad_out.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(_forward, (*tensors, not permuted, backend))
    torch.library.opcheck(_backward, (grad_out, None if permuted else grad_map, *detached, backend))


@pytest.mark.parametrize("return_map", [True, False])
def test_compiled_whole_with_the_same_numbers(return_map):
    tensors, grad_out, grad_map = inputs(2, 2, 9, 3, 8)

    def loss(q, k, v):
        out, mean_map = slot_cross_attention(q, k, v, return_map=return_map)
        return (out * grad_out).sum() + ((mean_map * grad_map).sum() if return_map else 0)

    with use_backend("triton"):
        expected = torch.autograd.grad(loss(*tensors), tensors)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, torch.autograd.grad(compiled(*tensors), tensors), expected))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_takes_and_gives_its_dtype(backend):
    tensors, grad_out, grad_map = inputs()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), use_backend(backend):
        out, mean_map = slot_cross_attention(*tensors)
        half, half_map = slot_cross_attention(*(t.bfloat16() for t in tensors))
    assert (out.dtype, mean_map.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, half) and torch.equal(mean_map, half_map)
    gradients = torch.autograd.grad((out, mean_map), tensors, (grad_out.bfloat16(), grad_map))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_inputs_beyond_the_kernels_limits():
    (q, k, v), _, _ = inputs(slots=65, tokens=3, width=4, grad=False)
    with use_backend("triton"), pytest.raises(ValueError, match=r"k \(1, 2, 65, 4\) has more than 64 slots"):
        slot_cross_attention(q, k, v)
    assert slot_cross_attention(q, k, v)[1].shape == (1, 3, 65)
    with use_backend("triton"), pytest.raises(ValueError, match="do not take torch.float64"):
        slot_cross_attention(q.double(), k.double(), v.double())
    assert chosen_backend("slot_cross_attention", q.cpu()) == "torch"


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    tensors, *grads = inputs(4, 6, 196, 7, 128, torch.bfloat16)
    assert_graph_replays(lambda: run("triton", tensors, *grads), lambda seed: redraw(tensors, seed))
