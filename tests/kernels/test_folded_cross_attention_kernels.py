"""The Triton kernels of folded_cross_attention: exactness, layouts, extreme values, the operators around them."""

import pytest
import torch

from kernel_tier import DEVICE, GRADIENT, OUTPUT, assert_as_exact, assert_graph_replays, needs_gpu, needs_triton, redraw
from spot_kernels import dispatch
from spot_kernels.dispatch import use_backend
from spot_kernels.folded_cross_attention import (
    _backward,
    _forward,
    _map,
    _map_backward,
    folded_cross_attention,
    folded_cross_map,
)
from spot_kernels.modules import PermutedDecoderBlock

if dispatch.TRITON:
    from spot_kernels.gpu import folded_cross_attention as kernels

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.35
# slots, tokens, heads, width: every size of tile, tokens and channels that fill none of theirs
SHAPES = (
    (1, 257, 1, 16),
    (2, 1, 4, 5),
    (6, 15, 6, 32),
    (7, 49, 1, 8),
    (11, 196, 4, 24),
    (16, 65, 3, 1),
    (24, 3, 1, 16),
    (33, 15, 1, 40),
    (64, 49, 1, 16),
    (7, 196, 6, 144),
)


def inputs(batch=1, heads=2, tokens=40, slots=7, width=16, dtype=torch.float32, grad=True):
    """x, a, v and gradients of out and map, on the device, with values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * slots)
    shapes = ((batch, tokens, width), *[(heads, batch, slots, width)] * 2, (batch, tokens, width))
    x, a, v, grad_out = (torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in shapes)
    grad_map = torch.randn(batch, tokens, slots, generator=generator).to(DEVICE)
    # as the module makes them: [B, H, K, D] laid out as [H, B, K, D]
    a, v = (t.transpose(0, 1) for t in (a, v))
    return [t.requires_grad_(grad) for t in (x, a, v)], grad_out, grad_map


def run(backend, tensors, grad_out, grad_map, dtype=None):
    """out, map and the gradients of x, a and v; in another dtype where one is given."""
    tensors = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
    with use_backend(backend):
        out, mean_map = folded_cross_attention(*tensors, scale=SCALE)
    grads = [g if g is None else g.to(o.dtype) for g, o in ((grad_out, out), (grad_map, mean_map))]
    results, grads = zip(*((o, g) for o, g in zip((out, mean_map), grads, strict=True) if g is not None), strict=True)
    return out, mean_map, *torch.autograd.grad(results, tensors, grads, allow_unused=True)


NAMES = ("out", "map", "grad x", "grad a", "grad v")
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


@pytest.mark.parametrize("heads, slots", [(6, 11), (3, 24), (1, 128)])
def test_the_widest_tile_of_half_precision(heads, slots):
    check(*inputs(2, heads, 70, slots, 20, torch.bfloat16))


def run_map(backend, tensors, grad_map, dtype=None):
    """map and the gradients of x and a, of folded_cross_map."""
    x, a = ((t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors[:2])
    with use_backend(backend):
        mean_map = folded_cross_map(x, a, scale=SCALE)
    return mean_map, *torch.autograd.grad(mean_map, (x, a), grad_map.to(mean_map.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots, tokens, heads, width", SHAPES)
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


@pytest.mark.parametrize("batch, heads, tokens", [(5, 1, 33), (3, 2, 90), (2, 2, 0), (0, 2, 5)])
def test_samples_and_blocks_of_tokens(batch, heads, tokens):
    tensors, grad_out, grad_map = inputs(batch, heads, tokens)
    if batch and tokens:
        check(tensors, grad_out, grad_map)
        return
    out, mean_map, *gradients = run("triton", tensors, grad_out, grad_map)
    assert out.shape == grad_out.shape and mean_map.shape == grad_map.shape
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 196, 1024])
def test_blocks_of_tokens_cover_all_and_are_equal(tokens):
    problem = kernels._Problem(1, 6, tokens, 7, 768, 8, 8)
    for block in (16, 32, 64, 128):
        blocks, rows = problem.blocks(block)
        assert rows <= block and (blocks - 1) * rows < tokens <= blocks * rows and blocks == -(-tokens // block)


@pytest.mark.parametrize("which", ["out", "map"])
def test_gradient_of_one_result(which):
    tensors, grad_out, grad_map = inputs()
    check(tensors, grad_out if which == "out" else None, grad_map if which == "map" else None)


def test_without_the_map_the_output_and_its_gradients_are_the_same():
    tensors, grad_out, _ = inputs()
    with_map = run("triton", tensors, grad_out, None)
    with use_backend("triton"):
        out, nothing = folded_cross_attention(*tensors, scale=SCALE, return_map=False)
        with torch.no_grad():
            constant, _ = folded_cross_attention(*tensors, scale=SCALE)
    assert nothing is None and torch.equal(out, with_map[0]) and torch.equal(constant, out)
    assert all(map(torch.equal, torch.autograd.grad(out, tensors, grad_out), with_map[2:]))


@pytest.mark.parametrize("layout", ["strided", "expanded gradient", "transposed"])
def test_layouts(layout):
    (x, a, v), grad_out, grad_map = inputs(2, 2, 20, 5, 12)
    if layout == "strided":
        x = torch.stack([x, -x], 2).flatten(2)[..., ::2].detach()
        a, v = (torch.stack([t, -t], 3)[..., 0, :].detach() for t in (a, v))
    elif layout == "expanded gradient":
        grad_out, grad_map = (torch.ones((), device=DEVICE).expand_as(t) for t in (grad_out, grad_map))
    else:
        x, grad_out, grad_map = (
            t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad_out, grad_map)
        )
        a = a.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    check((x, a, v), grad_out, grad_map)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(dtype, size):
    (x, a, v), grad_out, grad_map = inputs(width=16, dtype=dtype)
    with torch.no_grad():
        # a logit of ± 1e4 in the first slot; half of the tokens see ∓ 1e4 instead
        x[..., 0], a[..., 0] = 200, 0
        x[:, ::2, 0] = -200
        a[:, :, 0, 0] = size / 200 / SCALE
    check((x, a, v), grad_out, grad_map)


def test_a_shift_of_all_logits_changes_nothing():
    (x, a, v), grad_out, grad_map = inputs()
    # whole numbers: every logit is exact, so that the softmax has to be the same to the last bit
    x, a = (x.detach() * 4).round(), (a.detach() * 4).round()
    before, after = (run("triton", (x, keys, v), grad_out, grad_map) for keys in (a, a + 1024))
    for name, one, two in zip(NAMES[:2] + NAMES[3:], before[:2] + before[3:], after[:2] + after[3:], strict=True):
        assert torch.equal(one, two), name


def test_the_map_is_a_distribution_over_the_slots_that_are_there():
    tensors, _, _ = inputs(slots=11, heads=3)
    with torch.no_grad():
        tensors[1].sub_(100)  # padded slots of logit 0 would take everything
    with use_backend("triton"):
        _, mean_map = folded_cross_attention(*tensors)
    torch.testing.assert_close(mean_map.sum(-1), torch.ones_like(mean_map[..., 0]))


def test_repeats_bit_for_bit():
    arguments = inputs(3, 3, 90, 11, 40, torch.bfloat16)
    first, second = run("triton", *arguments), run("triton", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(backend, permuted):
    (x, a, v), grad_out, grad_map = inputs(1, 2, 9, 3, 4)
    if permuted:
        x = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        grad_out = grad_out.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.library.opcheck(_forward, (x, a, v, SCALE, not permuted, True, backend))
    torch.library.opcheck(_map, (x, a, SCALE, True, backend))
    x, a, v = (t.detach() for t in (x, a, v))
    saved = _forward(x, a, v, SCALE, False, True, backend)[2]
    torch.library.opcheck(_forward, (x, a, v, SCALE, permuted, False, backend))
    torch.library.opcheck(_backward, (grad_out, None if permuted else grad_map, x, a, v, saved, SCALE, backend))
    torch.library.opcheck(_map_backward, (grad_map, x, a, saved, SCALE, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_on_pytorch_is_its_reference(dtype):
    """Called with backend torch, as only opcheck does: the saved p goes through the kernels' padded layout."""
    (x, a, v), grad_out, grad_map = inputs(2, 3, 9, 5, 8, dtype)
    expected = run("torch", (x, a, v), grad_out, grad_map)
    out, mean_map, _ = _forward(x, a, v, SCALE, True, True, "torch")
    gradients = torch.autograd.grad((out, mean_map), (x, a, v), (grad_out, grad_map))
    close = {} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 2e-3}
    torch.testing.assert_close((out, mean_map, *gradients), expected, **close)


@pytest.mark.parametrize("return_map", [True, False])
def test_compiled_whole_with_the_same_numbers(return_map):
    tensors, grad_out, grad_map = inputs(2, 2, 9, 3, 8)

    def loss(x, a, v):
        out, mean_map = folded_cross_attention(x, a, v, scale=SCALE, return_map=return_map)
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
        out, mean_map = folded_cross_attention(*tensors)
        half, half_map = folded_cross_attention(*(t.bfloat16() for t in tensors))
    assert (out.dtype, mean_map.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, half) and torch.equal(mean_map, half_map)
    gradients = torch.autograd.grad((out, mean_map), tensors, (grad_out.bfloat16(), grad_map))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_inputs_beyond_the_kernels_limits():
    (x, a, v), _, _ = inputs(slots=17, heads=3, tokens=3, width=4, grad=False)
    with use_backend("triton"), pytest.raises(ValueError, match="3 heads of 17 slots, each padded .* than 64 columns"):
        folded_cross_attention(x, a, v)
    assert folded_cross_attention(x, a, v)[1].shape == (1, 3, 17)
    with use_backend("triton"), pytest.raises(ValueError, match="do not take torch.float64"):
        folded_cross_attention(x.double(), a.double(), v.double())


@pytest.mark.parametrize("with_map", [False, True])
def test_a_decoders_block_runs_the_kernels(monkeypatch, with_map):
    """Forward, backward and a teacher's map, with the numbers of the unfolded block."""
    torch.manual_seed(0)
    block = PermutedDecoderBlock(64, 2, 2, gain=1.0, first=False).to(DEVICE)
    tokens, slots = torch.randn(2, 9, 64, device=DEVICE), torch.randn(2, 3, 64, device=DEVICE)
    order = torch.randperm(9, device=DEVICE)

    def results():
        out, mean_map = block(tokens, slots, order, return_map=with_map)
        given = out.square().sum() + (mean_map.square().sum() if with_map else 0)
        return out, block.map(tokens, slots, order), *torch.autograd.grad(given, list(block.parameters()))

    with dispatch.without("folded_cross_attention"):
        expected = results()
    seen = []
    for name in ("forward", "backward"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *given, name=name, run=original: seen.append((name, given[2] is None)) or run(*given)
        )
    with use_backend("triton"):
        torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-4)
    assert seen == [("forward", False), ("forward", True), ("backward", False)]


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    tensors, *grads = inputs(4, 6, 196, 7, 768, torch.bfloat16)
    assert_graph_replays(lambda: run("triton", tensors, *grads), lambda seed: redraw(tensors, seed))
