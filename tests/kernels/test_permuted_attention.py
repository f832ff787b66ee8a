"""permuted_causal_attention equals permute → causal attention → unpermute for any permutation; gradients; bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import spot_kernels
from kernel_tier import random_order
from spot_kernels import permuted_causal_attention
from spot_kernels.reference import permuted_attention as reference

PERMUTATIONS = st.integers(1, 33).flatmap(lambda tokens: st.permutations(range(tokens)))


def inputs(batch=2, heads=3, tokens=9, width=4, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens)
    return [
        torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for _ in range(3)
    ]


def in_sequence(q, k, v, order):
    """The same by moving the data: to sequence order, plain causal attention, back to raster order."""
    q, k, v = (x[:, :, order] for x in (q, k, v))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(len(order), len(order)).triu(1).bool()
    out = torch.einsum("bhij,bhjd->bhid", logits.masked_fill(future, float("-inf")).softmax(-1), v)
    raster = torch.empty_like(out)
    raster[:, :, order] = out
    return raster


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 8), PERMUTATIONS)
def test_equals_permuting_the_data(batch, heads, width, permutation):
    q, k, v = inputs(batch, heads, len(permutation), width)
    order = torch.tensor(permutation)
    torch.testing.assert_close(permuted_causal_attention(q, k, v, order), in_sequence(q, k, v, order))


def test_an_order_for_each_sample():
    q, k, v = inputs(batch=3)
    orders = random_order(9, 3)
    together = permuted_causal_attention(q, k, v, orders)
    for i, order in enumerate(orders):
        alone = permuted_causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], order)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_token_does_not_see_its_successors():
    q, k, v = inputs()
    order = random_order(9)
    changed = v.clone()
    changed[:, :, order[5:]] += 100.0
    before, after = (permuted_causal_attention(q, k, x, order) for x in (v, changed))
    assert torch.equal(before[:, :, order[:5]], after[:, :, order[:5]])
    assert (before[:, :, order[5:]] != after[:, :, order[5:]]).all()


def test_gradients():
    order = random_order(5, 2)
    assert gradcheck(lambda q, k, v: permuted_causal_attention(q, k, v, order), inputs(tokens=5, width=2, grad=True))


def test_written_out_gradients_are_those_of_autograd():
    for order in (random_order(9), random_order(9, 2)):
        tensors = inputs(grad=True)
        out = permuted_causal_attention(*tensors, order)
        grad = torch.randn_like(out)
        expected = torch.autograd.grad(out, tensors, grad)
        with torch.no_grad():
            torch.testing.assert_close(reference.gradients(grad, *tensors, order), expected)


def test_autocast():
    q, k, v = inputs(dtype=torch.float32)
    order = random_order(9)
    with torch.autocast("cpu", torch.bfloat16):
        out = permuted_causal_attention(q, k.bfloat16(), v, order)
    expected = permuted_causal_attention(*(x.bfloat16() for x in (q, k, v)), order)
    assert torch.equal(out, expected)


def test_half_precision():
    q, k, v = inputs(dtype=torch.bfloat16)
    order = random_order(9)
    out = permuted_causal_attention(q, k, v, order)
    expected = in_sequence(q.double(), k.double(), v.double(), order)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * v.abs().max()


def test_the_order_is_never_read_on_the_host():
    """Fake tensors have no values: anything that would wait for the device fails on them."""
    with FakeTensorMode():
        q = torch.randn(2, 3, 9, 4)
        for shape in ((9,), (2, 9)):
            order = torch.zeros(shape, dtype=torch.int64)
            assert permuted_causal_attention(q, q, q, order).shape == q.shape


def test_a_new_order_does_not_recompile():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(permuted_causal_attention, backend=backend, fullgraph=True)
    q, k, v = inputs()
    for order in random_order(9, 4):
        torch.testing.assert_close(compiled(q, k, v, order), in_sequence(q, k, v, order))
    assert len(graphs) == 1


def test_bad_arguments_are_named():
    q, k, v = inputs()
    order = torch.arange(9)
    with pytest.raises(ValueError, match=r"k \(2, 3, 8, 4\) does not fit"):
        permuted_causal_attention(q, k[:, :, :8], v, order)
    with pytest.raises(ValueError, match="order is torch.float32"):
        permuted_causal_attention(q, k, v, order.float())
    with pytest.raises(ValueError, match=r"order \(8,\) must be \[9\] or \[2, 9\]"):
        permuted_causal_attention(q, k, v, order[:8])
    with pytest.raises(ValueError, match="k is torch.float32 but q is torch.float64"):
        permuted_causal_attention(q, k.float(), v, order)
    with pytest.raises(ValueError, match=r"q \(2, 3, 9, 0\) needs at least one head and a width of one"):
        permuted_causal_attention(*(x[..., :0] for x in (q, k, v)), order)
    with pytest.raises(ValueError, match="order is on meta but the tokens are on cpu"):
        permuted_causal_attention(q, k, v, order.to("meta"))


def test_an_order_is_checked_on_request():
    q, k, v = inputs()
    good, twice, outside = torch.arange(9).flip(0), torch.arange(9) // 2, torch.arange(1, 10)
    for order in (good, torch.stack([good, good])):
        assert torch.equal(
            permuted_causal_attention(q, k, v, order, check=True), permuted_causal_attention(q, k, v, order)
        )
    for order in (twice, outside, torch.stack([good, twice])):
        with pytest.raises(ValueError, match="permuted_causal_attention: order .* is not a permutation of 0 to 8"):
            permuted_causal_attention(q, k, v, order, check=True)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = {"PYTHONPATH": str(Path(spot_kernels.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_a_debug_switch_checks_the_orders_of_whole_models():
    """SPOT_KERNELS_CHECK=1 reaches calls inside modules; without it nothing is checked."""
    code = """if True:
        import torch
        from spot_kernels import PermutedDecoder
        decoder = PermutedDecoder(8, blocks=1, heads=2).requires_grad_(False)
        tokens, slots = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
        decoder(tokens, slots, torch.tensor([3, 1, 0, 2]))
        print("a permutation passes")
        decoder(tokens, slots, torch.tensor([0, 1, 1, 3]))
        print("nothing was checked")"""
    assert _run(code, SPOT_KERNELS_CHECK="").stdout.splitlines()[-1] == "nothing was checked"
    checked = _run(code, SPOT_KERNELS_CHECK="1")
    assert checked.stdout == "a permutation passes\n"
    assert checked.stderr.splitlines()[-1].endswith("order (4,) is not a permutation of 0 to 3")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_check_asserts_on_the_device(backend):
    """One graph, no wait; the assertion is not optimised away."""
    torch._dynamo.reset()
    q, k, v = inputs(tokens=4)
    function = torch.compile(
        lambda order: permuted_causal_attention(q, k, v, order, check=True), fullgraph=True, backend=backend
    )
    right = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(function(right), permuted_causal_attention(q, k, v, right))
    with pytest.raises(RuntimeError, match=r"order \(4,\) is not a permutation of 0 to 3"):
        function(torch.tensor([2, 0, 2, 1]))
