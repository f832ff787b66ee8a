"""The decoder's input path and its layout of tokens: the same results with less work, gradients of everything."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from forced_layout import in_order_layout
from spot_fast.model.decoders import AutoregressiveDecoder
from spot_fast.model.spot import reconstruction_loss
from spot_kernels import dispatch

PLAIN = ("order_layout", "input_path")
INDICES = {"none": None, "shared": torch.tensor(8), "each": torch.tensor([3, 8])}


@pytest.fixture(autouse=True)
def _in_order_layout(monkeypatch):
    """Unless a test does without it."""
    in_order_layout(monkeypatch)


def autoregressive(**settings):
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(24, 16, 4, **({"blocks": 2, "heads": 4} | settings)).double()
    slots, target = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 16, 24, dtype=torch.float64)
    return decoder, slots.requires_grad_(), target


def results(decoder, slots, target, index, **options):
    """Prediction, masks and gradients by the slots and all parameters."""
    prediction, masks = decoder(slots, target, index, **options)
    loss = reconstruction_loss(prediction, target) + masks.sin().sum()
    gradients = torch.autograd.grad(loss, [slots, *decoder.parameters()], allow_unused=True)
    return [prediction, masks, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("without", [(), ("order_layout",), ("input_path",)], ids=["both", "raster", "plain input"])
@pytest.mark.parametrize("index", INDICES)
def test_every_way_gives_the_same(index, without):
    decoder, slots, target = autoregressive()
    with dispatch.without(*PLAIN):
        expected = results(decoder, slots, target, INDICES[index])
    with dispatch.without(*without):
        found = results(decoder, slots, target, INDICES[index])
        masks = decoder.masks(slots, target, INDICES[index])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(masks, expected[1], rtol=1e-10, atol=1e-13)
    assert not torch.equal(found[0], expected[0]) or without == ("order_layout",)


@pytest.mark.parametrize("parallel", [False, True])
def test_cappa_adds_positions_in_either_layout(parallel):
    decoder, slots, target = autoregressive(orders="standard", cappa=0.25)
    with dispatch.without(*PLAIN):
        expected = results(decoder, slots, target, None, parallel=parallel)
    torch.testing.assert_close(results(decoder, slots, target, None, parallel=parallel), expected)


def test_all_orders_are_those_of_raster_layout():
    decoder, slots, target = autoregressive()
    with dispatch.without(*PLAIN):
        expected = list(decoder.all_orders(slots, target))
    torch.testing.assert_close(list(decoder.all_orders(slots, target)), expected)


@pytest.mark.parametrize("without", [(), ("order_layout",)])
def test_the_projection_has_a_gradient_by_bos_alone(without):
    """One product of all tokens less, three of one row more: [BOS] forward, its gradient, its share of the weight's."""
    flops = []
    for techniques in (PLAIN, without):
        decoder, slots, target = autoregressive()
        with dispatch.without(*techniques), FlopCounterMode(display=False) as counter:
            tokens, _ = decoder._prepare(slots, target, torch.tensor(3), False)
            tokens[0].sin().sum().backward()
        flops.append(counter.get_total_flops())
        assert decoder.bos.grad[3].abs().sum() > 0 and not decoder.bos.grad[[0, 1, 2, 4, 5, 6, 7, 8]].any()
    rows, width = 2 * 16, 24
    assert flops[0] - flops[1] == (rows - 3) * 2 * width * width


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    decoder, slots, target = autoregressive()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for index in (torch.tensor(8), torch.tensor([3, 8])):
        expected = results(decoder, slots, target, index)
        prediction, masks = compiled(slots, target, index)
        torch.testing.assert_close([prediction, masks], expected[:2])
    torch._dynamo.reset()
