"""Keys and values of all cross-attentions by one product: the same results, and only where layers are plain ones."""

import pytest
import torch
from torch import nn

from spot_kernels import PermutedDecoder, dispatch
from spot_kernels.modules.permuted_decoder import joins_projections


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    def joins(slots: torch.Tensor) -> bool:
        return dispatch.uses("joined_projections")

    monkeypatch.setattr("spot_kernels.modules.permuted_decoder.joins_projections", joins)


def decoder_and_inputs(**options):
    torch.manual_seed(0)
    decoder = PermutedDecoder(24, **({"blocks": 3, "heads": 4, "cross_heads": 2} | options)).double()
    tokens, slots = torch.randn(2, 9, 24).double(), torch.randn(2, 5, 24).double()
    return decoder, tokens.requires_grad_(), slots.requires_grad_()


def results(decoder, tokens, slots):
    out, mean_map = decoder(tokens, slots, torch.arange(9))
    loss = out.sin().sum() + mean_map.sin().sum()
    return [out, mean_map, *torch.autograd.grad(loss, [tokens, slots, *decoder.parameters()])]


@pytest.mark.parametrize("blocks", [1, 3])
def test_results_and_gradients_are_the_same(blocks, monkeypatch):
    decoder, tokens, slots = decoder_and_inputs(blocks=blocks)
    with dispatch.without("joined_projections"):
        expected = results(decoder, tokens, slots)
        masks = decoder.masks(tokens, slots, torch.arange(9))
        orders = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
        several = list(decoder.decode_orders(tokens, slots, orders, orders))
    called = []
    forward = nn.Linear.forward

    def counted(layer, inputs):
        called.append(layer)
        return forward(layer, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    torch.testing.assert_close(results(decoder, tokens, slots), expected, rtol=1e-10, atol=1e-12)
    separate = [getattr(b.cross_attention, name) for b in decoder.blocks for name in ("project_k", "project_v")]
    assert called and not any(layer is one for layer in called for one in separate)
    # a teacher's last block has no use for values
    called.clear()
    torch.testing.assert_close(decoder.masks(tokens, slots, torch.arange(9)), masks)
    assert [one for one in separate if any(layer is one for layer in called)] == separate[-2:-1]
    torch.testing.assert_close(list(decoder.decode_orders(tokens, slots, orders, orders)), several)


def test_whatever_is_more_than_a_plain_layer_is_called():
    decoder, tokens, slots = decoder_and_inputs()
    expected = results(decoder, tokens, slots)
    attention = decoder.blocks[1].cross_attention
    for module in (decoder.blocks[2], attention, attention.project_v):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        torch.testing.assert_close(results(decoder, tokens, slots), expected)
        # blocks call methods of the attention, not itself
        assert seen or module is attention
        handle.remove()


def test_compiled_in_one_graph_and_under_autocast():
    torch._dynamo.reset()
    decoder, tokens, slots = decoder_and_inputs()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, slots, torch.arange(9)), decoder(tokens, slots, torch.arange(9)))
    torch._dynamo.reset()
    decoder, tokens, slots = decoder.float(), tokens.detach().float(), slots.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        joined = decoder(tokens, slots, torch.arange(9))
        with dispatch.without("joined_projections"):
            torch.testing.assert_close(joined, decoder(tokens, slots, torch.arange(9)), rtol=2e-2, atol=2e-2)


def test_a_cpu_does_without():
    assert not joins_projections(torch.empty(1, 5, 24))
