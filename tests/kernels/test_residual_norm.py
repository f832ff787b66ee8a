"""The residual stream of the modules: additions wait for the next LayerNorm, and one kernel does both on a GPU."""

import sys

import pytest
import torch
from torch import nn

from kernel_tier import DEVICE, GRADIENT, OUTPUT, assert_as_exact, joined, needs_triton
from spot_kernels import PermutedDecoder, use_backend
from spot_kernels.dispatch import without
from spot_kernels.modules import layers
from spot_kernels.modules.layers import Stream, layer_norm, residual_norm

BF16 = torch.bfloat16


@pytest.fixture
def fused(monkeypatch):
    """The arguments of every call of the kernel."""
    calls, own = [], layers.add_norm
    monkeypatch.setattr(
        layers, "add_norm", lambda *given, **options: calls.append((given, options)) or own(*given, **options)
    )
    return calls


def decoder_and_inputs(**settings):
    torch.manual_seed(4)
    decoder = PermutedDecoder(32, **({"blocks": 3, "heads": 2} | settings)).to(DEVICE)
    return decoder, torch.randn(2, 9, 32, device=DEVICE), torch.randn(2, 5, 32, device=DEVICE)


def run(decoder, tokens, slots, *, fuse, backend="triton", precision=None):
    """Prediction, map, and the gradients of tokens, slots and parameters by name."""
    order = torch.arange(9, device=DEVICE).flip(0)
    leaves = [t.detach().clone().requires_grad_() for t in (tokens, slots)]
    with use_backend(backend), without(*([] if fuse else ["residual_norm"])):
        with torch.autocast(DEVICE.type, dtype=precision or BF16, enabled=precision is not None):
            out, mean_map = decoder(*leaves, order)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    loss = (out.float() * weight).sum() + mean_map.square().sum()
    names = ["tokens", "slots", *(name for name, _ in decoder.named_parameters())]
    found = torch.autograd.grad(loss, [*leaves, *decoder.parameters()])
    return out.detach(), mean_map.detach(), dict(zip(names, found, strict=True))


@needs_triton
@pytest.mark.parametrize("settings", [{}, {"final_norm": False}, {"blocks": 1}], ids=str)
def test_decoder_is_as_exact_with_the_kernel(settings, fused):
    decoder, tokens, slots = decoder_and_inputs(**settings)
    ours = run(decoder, tokens, slots, fuse=True)
    blocks = len(decoder.blocks)
    assert len(fused) == 3 * blocks + settings.get("final_norm", True)
    # nothing is added before the first two LayerNorms' inputs; every other one does the addition before it
    assert sum(given[4] is None for given, _ in fused) == 1
    plain = run(decoder, tokens, slots, fuse=False, backend="torch")
    assert len(fused) == 3 * blocks + settings.get("final_norm", True)
    exact = run(decoder.double(), tokens.double(), slots.double(), fuse=False, backend="torch")
    for name, *parts in zip(("out", "map"), ours, exact, plain, strict=False):
        assert_as_exact(name, *parts, 2 * OUTPUT)
    assert_as_exact("gradients", *(joined(one[2], exact[2]) for one in (ours, exact, plain)), GRADIENT)


@needs_triton
def test_autocast_keeps_the_error_of_a_float32_stream(fused, monkeypatch):
    """Streams have 24 bits there, and products are given bfloat16; the prediction is float32, as of a LayerNorm."""
    # computed by the reference: the interpreter truncates where a GPU rounds
    operator = sys.modules["spot_kernels.add_norm"]
    forward = operator._forward
    monkeypatch.setattr(operator, "_forward", lambda *given: forward(*given[:-1], "torch"))
    decoder, tokens, slots = decoder_and_inputs(blocks=4)
    exact = run(decoder, tokens, slots, fuse=False, backend="torch")
    errors = []
    for fuse in (False, True):
        out, mean_map, found = run(decoder, tokens, slots, fuse=fuse, precision=BF16)
        assert out.dtype == mean_map.dtype == torch.float32
        parts = (out, exact[0]), (mean_map, exact[1]), (joined(found, exact[2]), joined(exact[2], exact[2]))
        errors.append([((a - b).norm() / b.norm()).item() for a, b in parts])
    assert {options["low_of"] for _, options in fused} == {"sum", "normed"}
    assert [options["low_of"] for _, options in fused].count("normed") == 1
    assert all(given[0].dtype == BF16 for given, _ in fused[1:])
    assert all(with_kernel <= 1.1 * without_it for without_it, with_kernel in zip(*errors, strict=True)), errors


@needs_triton
def test_float16_and_models_in_bfloat16(fused):
    """No 24 bits: under autocast to float16 the stream is float32, in a bfloat16 model bfloat16, as without kernels."""
    decoder, tokens, slots = decoder_and_inputs()
    out, _, _ = run(decoder, tokens, slots, fuse=True, precision=torch.float16)
    assert {given[0].dtype for given, _ in fused} == {torch.float32} and out.dtype == torch.float32
    fused.clear()
    out, _, _ = run(decoder.bfloat16(), tokens.bfloat16(), slots.bfloat16(), fuse=True)
    assert {given[0].dtype for given, _ in fused} == {BF16} and out.dtype == BF16
    assert {options["low_of"] for _, options in fused} == {None}


@needs_triton
def test_masks_and_several_orders_are_those_of_forward():
    decoder, tokens, slots = decoder_and_inputs()
    order = torch.arange(9, device=DEVICE).flip(0)
    with use_backend("triton"), torch.no_grad(), torch.autocast(DEVICE.type, dtype=BF16):
        out, mean_map = decoder(tokens, slots, order)
        assert torch.equal(decoder.masks(tokens, slots, order), mean_map)
        source = torch.arange(9, device=DEVICE)
        ((again, again_map),) = decoder.decode_orders(tokens, slots, order[None], source[None])
    assert torch.equal(again, out) and torch.equal(again_map, mean_map)


@needs_triton
def test_layers_that_are_more_run_as_they_are(fused):
    """A hook on a LayerNorm, or on a block, sees what it saw before, and results stay what they are."""
    decoder, tokens, slots = decoder_and_inputs(blocks=2)
    expected = run(decoder, tokens, slots, fuse=False)[0]
    seen = []
    decoder.blocks[0].norm_ffn.register_forward_hook(lambda *given: seen.append(given[2]))
    decoder.blocks[1].register_forward_hook(lambda *given: seen.append(given[2][0]))
    out = run(decoder, tokens, slots, fuse=True)[0]
    torch.testing.assert_close(out, expected)
    assert len(fused) == 6 and [t.shape for t in seen] == [(2, 9, 32)] * 2


@needs_triton
def test_compiles_in_one_graph():
    decoder, tokens, slots = decoder_and_inputs(blocks=2)
    order = torch.arange(9, device=DEVICE)
    with use_backend("triton"), torch.autocast(DEVICE.type, dtype=BF16):
        expected = decoder(tokens, slots, order)
        torch._dynamo.reset()
        compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(tokens, slots, order), expected))


def test_on_a_cpu_the_layers_run(fused):
    norm, tokens, delta = nn.LayerNorm(8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    stream, normed = residual_norm(norm, Stream(tokens, delta))
    if DEVICE.type == "cpu":
        assert not fused
    assert torch.equal(stream.total(), tokens + delta) and torch.equal(normed, norm(tokens + delta))
    stream, normed = residual_norm(norm, Stream(tokens), replaces=True)
    assert stream.total() is normed and torch.equal(normed, layer_norm(norm, tokens))


@needs_triton
@pytest.mark.parametrize("norm", [nn.LayerNorm(8, bias=False), nn.LayerNorm((3, 8)), nn.LayerNorm(8).double()], ids=str)
def test_norms_that_the_kernel_does_not_take(norm, fused):
    dtype = next(norm.parameters()).dtype
    tokens = torch.randn(2, 3, 8, device=DEVICE, dtype=dtype)
    with use_backend("auto" if dtype == torch.float64 else "triton"):
        assert torch.equal(layer_norm(norm.to(DEVICE), tokens), norm(tokens))
    assert not fused
