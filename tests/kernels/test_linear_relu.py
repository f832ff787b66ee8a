"""linear_relu: linear layer and ReLU against PyTorch's; the kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from kernel_tier import (
    DEVICE,
    GRADIENT,
    OUTPUT,
    assert_as_exact,
    assert_graph_replays,
    needs_gpu,
    needs_triton,
    redraw,
)
from spot_kernels import dispatch, linear_relu
from spot_kernels.dispatch import use_backend
from spot_kernels.linear_relu import _backward, _forward
from spot_kernels.modules import layers
from spot_kernels.reference import linear_relu as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "grad x", "grad weight", "grad bias")


def inputs(shape=(6, 5), outputs=7, dtype=torch.float64, device="cpu"):
    """x, weight, bias, and a gradient of the result.

    Products are sums of multiples of 1/64 and biases odd multiples of 1/128: no sum is next to zero, so that which ones
    the ReLU keeps does not depend on rounding.
    """
    generator = torch.Generator().manual_seed(outputs)

    def multiples(*shape, of):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / (4 * of)).round() * of

    x, weight = multiples(*shape, of=1 / 4), multiples(outputs, shape[-1], of=1 / 16)
    bias = torch.randint(-32, 32, (outputs,), generator=generator) / 64.0 + 1 / 128
    grad = torch.randn(*shape[:-1], outputs, generator=generator, dtype=torch.float64)
    x, weight, bias, grad = (t.to(device, dtype) for t in (x, weight, bias, grad))
    return [t.requires_grad_() for t in (x, weight, bias)], grad


def run(backend, arguments, grad, dtype=None):
    """The result and the gradients of all arguments."""
    arguments = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in arguments]
    with use_backend(backend):
        out = linear_relu(*arguments)
    return out, *torch.autograd.grad(out, arguments, grad.to(out.dtype))


def check(arguments, grad):
    exact, plain = run("torch", arguments, grad, torch.float64), run("torch", arguments, grad)
    for name, ours, true, theirs in zip(NAMES, run("triton", arguments, grad), exact, plain, strict=True):
        assert_as_exact(name, ours, true, theirs, OUTPUT if name == "out" else GRADIENT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 17))
def test_is_pytorchs_layers_bit_for_bit_on_a_cpu(rows, width, outputs):
    arguments, grad = inputs((rows, width), outputs, torch.float32)
    with use_backend("auto"):
        out = linear_relu(*arguments)
    expected = F.relu(F.linear(*arguments))
    assert torch.equal(out, expected)
    got, wanted = (torch.autograd.grad(result, arguments, grad) for result in (out, expected))
    assert all(map(torch.equal, got, wanted))


def test_gradients_of_the_reference():
    arguments, _ = inputs((2, 3, 4))
    assert gradcheck(linear_relu, arguments)


def test_written_out_gradients_are_those_of_autograd():
    arguments, grad = inputs()
    sums = F.linear(*arguments).detach()
    out, *_, grad_bias = run("torch", arguments, grad)
    grad_sum, written_out = reference.gradients(grad, out.detach())
    torch.testing.assert_close(written_out, grad_bias)
    assert torch.equal(grad_sum, grad * (sums > 0))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, outputs",
    [((1, 1), 1), ((7, 16), 17), ((2, 21, 20), 256), ((300, 3), 40), ((33, 8), 600), ((5, 2, 3, 4), 9)],
)
def test_as_exact_as_pytorch(shape, outputs, dtype):
    check(*inputs(shape, outputs, dtype, DEVICE))


@needs_triton
@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other"])
def test_gradients_in_other_layouts(layout):
    arguments, grad = inputs((70, 5), 24, torch.float32, DEVICE)
    grad = {
        "transposed": lambda: grad.t().contiguous().t(),
        "expanded": lambda: torch.ones((), device=DEVICE).expand(70, 24),
        "every other": lambda: torch.stack((grad, grad), -1)[..., 0],
    }[layout]()
    check(arguments, grad)


@needs_triton
def test_more_rows_than_one_program_walks_over(monkeypatch):
    """Several blocks a program and several programs a column, both unevenly, and outputs that are written whole."""
    from spot_kernels.gpu import linear_relu as kernels

    monkeypatch.setattr(kernels, "_backward_config", lambda columns: kernels._Config(4, 16, 1, 4))
    grad, out = torch.randn(90, 36, device=DEVICE), torch.randn(90, 36, device=DEVICE)
    results = [torch.full(shape, torch.nan, device=DEVICE) for shape in ((90, 36), (36,))]
    kernels.backward(grad, out, *results)
    torch.testing.assert_close(results, [*reference.gradients(grad, out)])


@needs_triton
def test_nan_propagates():
    arguments, grad = inputs((3, 4), 5, torch.float32, DEVICE)
    with torch.no_grad():
        arguments[0][1, 2] = float("nan")
    out, *_, grad_bias = run("triton", arguments, grad)
    assert out.isnan().sum(1).tolist() == [0, 5, 0]
    # as PyTorch's ReLU, which passes gradients on where its result is not a number
    torch.testing.assert_close(grad_bias, run("torch", arguments, grad)[3])


@needs_triton
def test_repeats_bit_for_bit():
    arguments = inputs((300, 20), 24, torch.bfloat16, DEVICE)
    first, second = run("triton", *arguments), run("triton", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(backend, dtype):
    arguments, grad = inputs((5, 4), 6, dtype, DEVICE)
    if dtype == torch.bfloat16:
        arguments = [t.detach().t().contiguous().t().requires_grad_() for t in arguments]
    torch.library.opcheck(_forward, (*arguments, backend))
    torch.library.opcheck(_backward, (grad, grad.roll(1), backend))


@needs_triton
def test_compiled_in_one_graph_gives_the_same():
    arguments, grad = inputs((2, 5, 8), 6, torch.float32, DEVICE)

    def loss(*tensors):
        return (linear_relu(*tensors) * grad).sum()

    with use_backend("triton"):
        expected = torch.autograd.grad(loss(*arguments), arguments)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, torch.autograd.grad(compiled(*arguments), arguments), expected))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_casts_as_a_linear_layer(backend):
    arguments, grad = inputs((5, 8), 6, torch.float32, DEVICE)
    with use_backend(backend), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, expected = linear_relu(*arguments), F.relu(F.linear(*arguments))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, arguments, grad.bfloat16())
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, arguments, grad.bfloat16()))


def test_bad_arguments_are_named():
    (x, weight, bias), _ = inputs()
    with pytest.raises(ValueError, match=r"weight \(7, 4\)|x \(6, 5\) does not fit"):
        linear_relu(x, weight[:, :4], bias)
    with pytest.raises(ValueError, match=r"linear_relu: x \(5,\) must have the layout \[…, I\]"):
        linear_relu(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"bias \(6,\) does not fit"):
        linear_relu(x, weight, bias[:6])
    with pytest.raises(ValueError, match="weight is torch.float32 but x is torch.float64"):
        linear_relu(x, weight.float(), bias)
    with pytest.raises(ValueError, match="x is torch.int64"):
        linear_relu(x.long(), weight, bias)


# ---- the modules' MLPs


@pytest.fixture
def count(monkeypatch):
    """Calls of the operator by modules."""
    calls = []
    monkeypatch.setattr(layers, "linear_relu", lambda *arguments: calls.append(1) or linear_relu(*arguments))
    return calls


@needs_triton
def test_an_mlp_calls_it_where_its_layers_are_plain(count):
    torch.manual_seed(0)
    mlp, x = layers.mlp(8, 24, 8).to(DEVICE), torch.randn(2, 5, 8, device=DEVICE)
    with use_backend("torch"):
        expected = mlp(x)
    assert isinstance(mlp, nn.Sequential) and list(mlp.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    with use_backend("triton"):
        torch.testing.assert_close(mlp(x), expected)
        assert len(count) == 1
        with dispatch.without("linear_relu"):
            assert torch.equal(mlp(x), expected)
        seen = []
        handle = mlp[1].register_forward_hook(lambda *_: seen.append(1))
        mlp(x)
        handle.remove()
        layers.mlp(8, 24, 8, activation="gelu").to(DEVICE)(x)
        assert len(count) == 1 and seen == [1]
        layers.mlp(8, 24, 8, dropout=0.5).to(DEVICE)(x)
        assert len(count) == 2


def test_an_mlp_on_a_cpu_calls_its_layers(count):
    mlp, x = layers.mlp(8, 24, 8), torch.randn(2, 5, 8)
    with use_backend("auto"):
        assert torch.equal(mlp(x), nn.Sequential(*mlp)(x)) and not count


@needs_triton
def test_an_mlp_is_traced_as_one_graph():
    torch._dynamo.reset()
    mlp, x = layers.mlp(8, 24, 8).to(DEVICE), torch.randn(5, 8, device=DEVICE)
    with use_backend("triton"):
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    arguments, grad = inputs((448, 256), 1024, torch.bfloat16, DEVICE)
    assert_graph_replays(lambda: run("triton", arguments, grad), lambda seed: redraw(arguments, seed))
