"""Order layout: tokens that lie in the order give what raster layout gives, gradients included."""

import pytest
import torch

from forced_layout import in_order_layout
from kernel_tier import needs_gpu
from spot_kernels import PermutedDecoder, dispatch
from spot_kernels.modules.order_layout import (
    SEQUENCE,
    from_sequence,
    prefers_order_layout,
    put_rows,
    take_rows,
    to_sequence,
)


def orders(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    return order if kind == "each" else order[0]


@pytest.fixture(params=["shared", "each"])
def order(request):
    return orders(request.param)


def decoder_and_inputs(dtype=torch.float64):
    torch.manual_seed(4)
    decoder = PermutedDecoder(24, blocks=3, heads=4, cross_heads=2).to(dtype)
    return decoder, torch.randn(2, 9, 24, dtype=dtype).requires_grad_(), torch.randn(2, 5, 24, dtype=dtype)


def results(function, decoder, tokens, slots, order):
    slots = slots.detach().requires_grad_()
    outputs = function(tokens, slots, order)
    loss = sum((output.float().sin() if output.dtype == torch.bfloat16 else output.sin()).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [tokens, slots, *decoder.parameters()])]


def test_results_and_gradients_are_those_of_raster_layout(order, monkeypatch):
    decoder, tokens, slots = decoder_and_inputs()
    expected = results(decoder, decoder, tokens, slots, order)
    in_order_layout(monkeypatch)
    moved = results(decoder, decoder, tokens, slots, order)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)
    assert not all(map(torch.equal, moved, expected))  # it did take the other way
    with dispatch.without("order_layout"):
        assert all(map(torch.equal, results(decoder, decoder, tokens, slots, order), expected))


def test_compiled_in_one_graph(order, monkeypatch):
    in_order_layout(monkeypatch)
    torch._dynamo.reset()
    decoder, tokens, slots = decoder_and_inputs(torch.float32)
    expected = results(decoder, decoder, tokens, slots, order)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, decoder, tokens, slots, order), expected)
    torch._dynamo.reset()


def test_under_autocast(order, monkeypatch):
    decoder, tokens, slots = decoder_and_inputs(torch.float32)
    exact = results(decoder, decoder, tokens, slots, order)
    with torch.autocast("cpu", torch.bfloat16):
        raster = results(decoder, decoder, tokens, slots, order)
        in_order_layout(monkeypatch)
        moved = results(decoder, decoder, tokens, slots, order)
    assert [one.dtype for one in moved] == [one.dtype for one in raster]
    # a ReLU that falls on the other side moves single gradients: they are compared as one vector
    for part, room in ((slice(0, 2), 2), (slice(2, None), 3)):
        ours, other, true = (
            torch.cat([one.float().flatten() for one in all_[part]]) for all_ in (moved, raster, exact)
        )
        assert (ours - true).norm() <= room * (other - true).norm()


def test_masks_alone_and_several_orders(monkeypatch):
    decoder, tokens, slots = decoder_and_inputs()
    order, other = orders("each")
    alone = [decoder(tokens, slots, one) for one in (order, other)]
    sources = torch.arange(9).expand(2, 9)
    in_order_layout(monkeypatch)
    for one, (_, expected) in zip((order, other), alone, strict=True):
        torch.testing.assert_close(decoder.masks(tokens, slots, one), expected)
    together = list(decoder.decode_orders(tokens, slots, torch.stack([order, other]), sources))
    torch.testing.assert_close(together, alone)
    # without a causal mask there is nothing to move
    torch.testing.assert_close(decoder(tokens[:, order], slots, None)[0], decoder(tokens, slots, None)[0][:, order])


def test_a_sequence_is_the_order_of_its_rows():
    decoder, tokens, slots = decoder_and_inputs()
    torch.testing.assert_close(decoder(tokens, slots, SEQUENCE), decoder(tokens, slots, torch.arange(9)))
    with pytest.raises(ValueError, match="order 'raster' is unknown: pass an int64 tensor, 'sequence' or None"):
        decoder(tokens, slots, "raster")


def test_rows_are_moved_and_moved_back(order):
    tokens = torch.randn(2, 9, 3, dtype=torch.float64)
    moved = torch.stack([row[one] for row, one in zip(tokens, order.expand(2, 9), strict=True)])
    leaf = tokens.clone().requires_grad_()
    for given in (tokens, leaf):  # with and without gradients they move in two ways
        assert torch.equal(to_sequence(given, order), moved)
        assert torch.equal(from_sequence(to_sequence(given, order), order), tokens)
    assert torch.equal(take_rows(tokens, order), moved) and torch.equal(put_rows(moved, order), tokens)
    assert torch.autograd.gradcheck(lambda x: to_sequence(x, order), leaf)
    assert torch.autograd.gradcheck(lambda x: from_sequence(x, order), leaf)


def test_a_backward_pass_gathers(order):
    """No addition to zeros, which on a GPU would be atomic."""
    leaf = torch.randn(2, 9, 3, requires_grad=True)
    for move in (to_sequence, from_sequence):
        names = []
        node = move(leaf, order).grad_fn
        while node is not None:
            names.append(node.name())
            node = node.next_functions[-1][0] if node.next_functions else None
        assert not any("IndexSelect" in name or "Gather" in name for name in names), names


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(order, dtype):
    """By PyTorch's causal attention, as near to float64 as raster layout; nothing waits for the device."""
    decoder, tokens, slots = decoder_and_inputs()
    exact = results(decoder, decoder, tokens, slots, order)
    decoder, order = decoder.to("cuda", torch.float32), order.cuda()
    tokens, slots = (x.detach().to("cuda", torch.float32).requires_grad_() for x in (tokens, slots))
    assert prefers_order_layout(tokens)
    found = []
    for techniques in ((), ("order_layout",)):
        with dispatch.without(*techniques), torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            torch.cuda.set_sync_debug_mode("error")
            try:
                found.append(results(decoder, decoder, tokens, slots, order))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    moved, raster, true = (
        torch.cat([one.detach().double().cpu().flatten() for one in all_]) for all_ in (*found, exact)
    )
    assert (moved - true).norm() <= 3 * (raster - true).norm()


def test_which_devices_prefer_it():
    assert not prefers_order_layout(torch.empty(1, 9, 24))
    assert not prefers_order_layout(torch.empty(1, 9, 24, device="meta"))


def test_a_debug_switch_checks_the_order(monkeypatch):
    monkeypatch.setattr("spot_kernels.checks.CHECK_ORDERS", True)
    with pytest.raises(ValueError, match="order layout: order .* is not a permutation of 0 to 8"):
        to_sequence(torch.randn(1, 9, 3), torch.zeros(9, dtype=torch.int64))


def test_a_cpu_orders_gathered_tokens_without_a_backward_pass(monkeypatch):
    tokens = torch.empty(1, 9, 24)
    assert not prefers_order_layout(tokens, gathered=True)
    with torch.no_grad():
        assert prefers_order_layout(tokens, gathered=True) and not prefers_order_layout(tokens)
        assert not prefers_order_layout(tokens.bfloat16(), gathered=True)
        monkeypatch.setattr("spot_kernels.dispatch.uses", lambda name: name != "order_layout")
        assert not prefers_order_layout(tokens, gathered=True)
