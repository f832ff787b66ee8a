"""Gradients go out in pieces during backward: which, when, in which sequence, and what a parameter without one gets.

Here the exchange with another process, whose gradients are the same, is a stand-in; real ones are in
test_distributed.py.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spot_fast.training.shared_gradients import SharedGradients
from spot_kernels.clipped_adam import UNIT

LAYER_BYTES = 4 * (16 + 4)
LAYER, TOKEN, LOSSES = 2 * UNIT, UNIT, 8  # elements: weight and bias, the token, the losses; each from a new unit on


class Exchanged:
    def wait(self):
        pass


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: ("sent", elements) and ("backward", layer)."""
    found = []

    def all_reduce(buffer, group=None, async_op=False):
        assert async_op
        found.append(("sent", buffer.numel()))
        buffer *= 2
        return Exchanged()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return found


class Model(nn.Module):
    """Three layers, and a parameter that is not always used."""

    def __init__(self, events):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.token = nn.Parameter(torch.randn(4))
        self.events = events

    def forward(self, x, token=False):
        for number, layer in enumerate(self.layers):
            x = layer(x + self.token if token and number == 0 else x)
            x.register_hook(lambda grad, number=number: self.events.append(("backward", number)))
        return x.square().sum()


def step(model, gradients, batches, token=False):
    gradients.start()
    for number, batch in enumerate(batches, 1):
        if number == len(batches):
            gradients.last_pass()
        loss = model(batch, token)
        loss.backward()
    return gradients.finish([loss, loss * 2])


def shared(model, piece_bytes=LAYER_BYTES):
    return SharedGradients(list(model.parameters()), 2, None, contextlib.nullcontext, piece_bytes=piece_bytes)


def assert_means(model, batches, token=False):
    loss = sum(model(batch, token) for batch in batches)
    wanted = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected)


def test_a_piece_goes_out_before_backward_is_over(events):
    model, batch = Model(events), torch.randn(2, 4)
    gradients = shared(model)
    losses = step(model, gradients, [batch], token=True)
    names = [what for what, _ in events]
    assert names.index("sent") < max(place for place, event in enumerate(events) if event == ("backward", 0))
    # the token alone, as it comes before a layer that would not fit beside it; every layer; the losses
    assert sorted(size for what, size in events if what == "sent") == sorted([LAYER] * 3 + [TOKEN, LOSSES])
    assert torch.equal(losses[0] * 2, losses[1])
    assert_means(model, [batch], token=True)


def test_passes_before_the_last_one_send_nothing(events):
    model, batches = Model(events), [torch.randn(2, 4) for _ in range(3)]
    step(model, shared(model), batches)
    before = [what for what, _ in events[: events.index(("backward", 0)) + 1]]
    assert "sent" not in before
    assert_means(model, batches)


def test_a_parameter_without_a_gradient_has_none_and_holds_nobody_up(events):
    """Adam then leaves it alone, as in one process."""
    model, batch = Model(events), torch.randn(2, 4)
    gradients = shared(model)
    for _ in range(2):
        events.clear()
        step(model, gradients, [batch])
        assert model.token.grad is None
        assert_means(model, [batch])
    # it was in the way of nobody in the second step
    assert events.index(("sent", LAYER)) < events.index(("backward", 0))
    step(model, gradients, [batch], token=True)
    assert_means(model, [batch], token=True)
    step(model, gradients, [batch])
    assert_means(model, [batch])


def test_gradients_lie_in_one_buffer(events):
    """Nothing is gathered before the exchange nor copied back."""
    model, batch = Model(events), torch.randn(2, 4)
    gradients = shared(model, piece_bytes=2**20)
    addresses = []
    for _ in range(2):
        step(model, gradients, [batch], token=True)
        addresses.append([parameter.grad.data_ptr() for parameter in model.parameters()])
    assert addresses[0] == addresses[1]
    assert max(addresses[0]) - min(addresses[0]) < 4 * (3 * LAYER + TOKEN)
    assert not any(address % 64 for address in addresses[0] if min(addresses[0]) % 64 == 0)
    assert [size for what, size in events if what == "sent"][:2] == [3 * LAYER + TOKEN, LOSSES]


def test_what_fails_in_an_exchange_is_turned_into_the_callers_error(monkeypatch, events):
    class Gone(Exception):
        pass

    @contextlib.contextmanager
    def exchanging():
        try:
            yield
        except RuntimeError as error:
            raise Gone from error

    def broken(*arguments, **options):
        raise RuntimeError("connection closed")

    monkeypatch.setattr(dist, "all_reduce", broken)
    model = Model(events)
    gradients = SharedGradients(list(model.parameters()), 2, None, exchanging, piece_bytes=LAYER_BYTES)
    with pytest.raises(Gone):
        step(model, gradients, [torch.randn(2, 4)])
