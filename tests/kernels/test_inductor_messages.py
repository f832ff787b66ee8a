"""A deep stack of `add_norm` compiles: Inductor does not format all that an argument was computed from."""

from __future__ import annotations

import torch

from spot_kernels import add_norm, dispatch, inductor_messages


class Argument:
    """As an argument of Inductor: printed with what it was computed from, here twice."""

    def __init__(self, before=None):
        self.before = before

    def __str__(self):
        return f"({self.before}, {self.before})"


def test_a_message_does_not_grow_with_what_an_argument_was_computed_from(monkeypatch):
    from torch._inductor import exc

    monkeypatch.setattr(exc.OperatorIssue, "operator_str", exc.OperatorIssue.operator_str)
    monkeypatch.setattr(inductor_messages, "_done", False)
    monkeypatch.setattr(inductor_messages, "_formats_at_once", lambda graph: True)
    compiled = torch.compile(_deep, backend="eager", fullgraph=True)
    x, w = torch.randn(4, 16), torch.ones(16)
    torch.testing.assert_close(compiled(x, w), _deep(x, w))
    argument = Argument()
    for _ in range(64):  # 2^64 parts if it were printed
        argument = Argument(argument)
    text = exc.OperatorIssue.operator_str("spot_kernels.add_norm", [argument], {})
    assert "spot_kernels.add_norm" in text and len(text) < 200


def test_versions_that_format_when_they_log_are_left_alone(monkeypatch):
    from torch._inductor import exc, graph

    monkeypatch.setattr(graph, "LazyString", object, raising=False)
    monkeypatch.setattr(inductor_messages, "_done", False)
    before = exc.OperatorIssue.operator_str
    torch.compile(_deep, backend="eager", fullgraph=True)(torch.randn(4, 16), torch.ones(16))
    assert exc.OperatorIssue.operator_str is before


def _deep(x, w):
    bias = torch.zeros_like(w)
    with dispatch.use_backend("triton" if dispatch.INTERPRETED else "torch"):
        for _ in range(3):
            x, normed, _ = add_norm(x, w, bias, 1e-5, x)
    return normed
