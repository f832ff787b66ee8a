"""shift_by_order gives every token its predecessor in the order; gradients, orders for each sample, bad input."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from kernel_tier import random_order
from spot_kernels import shift_by_order
from spot_kernels.reference import shift_by_order as reference


def test_gives_every_token_its_predecessor():
    tokens, bos = torch.randn(2, 9, 4), torch.randn(4)
    for order in random_order(9, 3):
        shifted = shift_by_order(tokens, bos, order)
        assert torch.equal(shifted[:, order[0]], bos.expand(2, 4))
        assert torch.equal(shifted[:, order[1:]], tokens[:, order[:-1]])


def test_an_order_and_bos_for_each_sample():
    tokens, bos, orders = torch.randn(3, 9, 4), torch.randn(3, 4), random_order(9, 3)
    shifted = shift_by_order(tokens, bos, orders)
    for i in range(3):
        assert torch.equal(shifted[i], shift_by_order(tokens[i : i + 1], bos[i], orders[i])[0])


def test_gradients_and_one_token():
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    bos = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for order in (random_order(4), random_order(4, 2)):
        assert gradcheck(lambda t, b, order=order: shift_by_order(t, b, order), (tokens, bos))
    assert torch.equal(shift_by_order(torch.randn(2, 1, 3), torch.ones(3), torch.tensor([0])), torch.ones(2, 1, 3))


def test_written_out_gradients_are_those_of_autograd():
    tokens, bos = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    grad = torch.randn(2, 9, 4)
    for order in (random_order(9), random_order(9, 2)):
        expected = torch.autograd.grad(shift_by_order(tokens, bos, order), (tokens, bos), grad)
        assert all(map(torch.equal, reference.gradients(grad, order), expected))


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert shift_by_order(torch.randn(2, 9, 4), torch.randn(4), torch.arange(9)).dtype == torch.float32


def test_the_order_is_never_read_on_the_host():
    """Fake tensors have no values: anything that would wait for the device fails on them."""
    with FakeTensorMode():
        for shape in ((9,), (2, 9)):
            order = torch.zeros(shape, dtype=torch.int64)
            assert shift_by_order(torch.randn(2, 9, 4), torch.randn(4), order).shape == (2, 9, 4)


def test_a_new_order_does_not_recompile():
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(shift_by_order, backend=graphs, fullgraph=True)
    tokens, bos = torch.randn(2, 9, 4), torch.randn(4)
    for order in random_order(9, 4):
        assert torch.equal(compiled(tokens, bos, order), shift_by_order(tokens, bos, order))
    assert graphs.frame_count == 1


def test_bad_arguments_are_named():
    tokens, bos, order = torch.randn(2, 9, 4), torch.randn(4), torch.arange(9)
    with pytest.raises(ValueError, match=r"bos \(3,\) must be \[4\] or \[2, 4\]"):
        shift_by_order(tokens, torch.randn(3), order)
    with pytest.raises(ValueError, match=r"tokens \(9, 4\) must have the layout"):
        shift_by_order(tokens[0], bos, order)
    with pytest.raises(ValueError, match="tokens is torch.int64: pass a floating dtype"):
        shift_by_order(tokens.long(), bos, order)
    with pytest.raises(ValueError, match="bos is on meta but tokens on cpu"):
        shift_by_order(tokens, bos.to("meta"), order)


def test_an_order_is_checked_on_request():
    tokens, bos = torch.randn(2, 9, 4), torch.randn(4)
    good, twice, outside = torch.arange(9).flip(0), torch.arange(9) // 2, torch.arange(1, 10)
    for order in (good, torch.stack([good, good])):
        assert torch.equal(shift_by_order(tokens, bos, order, check=True), shift_by_order(tokens, bos, order))
    for order in (twice, outside, torch.stack([good, twice])):
        with pytest.raises(ValueError, match="shift_by_order: order .* is not a permutation of 0 to 8"):
            shift_by_order(tokens, bos, order, check=True)
