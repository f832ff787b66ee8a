"""gru_norm: GRU cell without its products, and LayerNorm, against torch's modules; the kernels against float64."""

import pytest
import torch
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
from spot_kernels import gru_norm
from spot_kernels.dispatch import use_backend
from spot_kernels.gru_norm import _backward, _forward
from spot_kernels.reference import gru_norm as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# gates, hidden, LayerNorm: one dtype throughout, and what autocast makes of float32 slots and parameters
DTYPES = ((F32, F32, F32), (BF16, F32, F32), (F16, F32, F32), (BF16, BF16, BF16), (F16, F16, F16))
NAMES = ("new", "normed", "grad gates_input", "grad gates_hidden", "grad hidden", "grad weight", "grad bias")
FACTORS = (OUTPUT, OUTPUT, *[GRADIENT] * 5)


def inputs(rows=6, units=5, dtypes=(torch.float64,) * 3, size=1.0, device="cpu"):
    """The five arguments and gradients of both results."""
    generator = torch.Generator().manual_seed(rows + 1000 * units)
    gates, hidden, norm = dtypes
    shapes = (
        ((rows, 3 * units), gates),
        ((rows, 3 * units), gates),
        ((rows, units), hidden),
        ((units,), norm),
        ((units,), norm),
        ((rows, units), hidden),
        ((rows, units), gates),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape, dtype in shapes]
    tensors[:2] = [t * size for t in tensors[:2]]
    tensors = [t.to(device) for t in tensors]
    return [t.requires_grad_() for t in tensors[:5]], tensors[5:]


def run(backend, arguments, given, dtype=None):
    """new, normed and the gradients of all arguments; `given` holds gradients, or None."""
    arguments = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in arguments]
    with use_backend(backend):
        results = gru_norm(*arguments)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(results, given, strict=True) if g is not None]
    outputs, grads = zip(*pairs, strict=True)
    return *results, *torch.autograd.grad(outputs, arguments, grads, materialize_grads=True)


def check(arguments, given):
    exact, plain = run("torch", arguments, given, torch.float64), run("torch", arguments, given)
    for parts in zip(NAMES, run("triton", arguments, given), exact, plain, FACTORS, strict=True):
        assert_as_exact(*parts)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 17), st.floats(1e-6, 0.1))
def test_equals_torchs_modules(rows, units, eps):
    (_, _, hidden, weight, bias), _ = inputs(rows, units)
    cell = nn.GRUCell(units, units, dtype=torch.float64)
    x = torch.randn(rows, units, dtype=torch.float64)
    expected = cell(x, hidden)
    gates_input = nn.functional.linear(x, cell.weight_ih, cell.bias_ih)
    gates_hidden = nn.functional.linear(hidden, cell.weight_hh, cell.bias_hh)
    new, normed = gru_norm(gates_input, gates_hidden, hidden, weight, bias, eps)
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(normed, nn.functional.layer_norm(expected, (units,), weight, bias, eps))


def test_gradients_of_the_reference():
    arguments, _ = inputs(3, 4)
    assert gradcheck(gru_norm, arguments)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_written_out_gradients_are_those_of_autograd(which):
    arguments, given = inputs()
    given = [g if wanted else None for g, wanted in zip(given, which, strict=True)]
    with torch.no_grad():
        written_out = reference.gradients(*given, *arguments[:4], 1e-5)
    torch.testing.assert_close(written_out, run("torch", arguments, given)[2:])


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rows, units", [(1, 1), (7, 16), (21, 256), (300, 20), (5, 600), (2, 1024)])
def test_as_exact_as_pytorch(rows, units, dtypes):
    check(*inputs(rows, units, dtypes, device=DEVICE))


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e-3])
def test_saturated_and_tiny_gates(dtypes, size):
    check(*inputs(9, 24, dtypes, size, DEVICE))


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_tanh_is_accurate_near_zero():
    # z ≈ 0 and no hidden gates: h' is the tanh of the given values
    values = torch.cat([torch.logspace(-6, 1, 200), -torch.logspace(-6, 1, 200)]).to(DEVICE).unsqueeze(1)
    zero, one = torch.zeros_like(values), torch.ones(1, device=DEVICE)
    gates = torch.cat((zero, zero - 100, values), 1)
    with use_backend("triton"):
        new, _ = gru_norm(gates, torch.zeros_like(gates), zero, one, one)
    torch.testing.assert_close(new.double(), values.double().tanh(), rtol=4e-7, atol=0)


@needs_triton
@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_gradient_of_one_result(which):
    arguments, given = inputs(9, 24, DTYPES[0], device=DEVICE)
    check(arguments, [g if wanted else None for g, wanted in zip(given, which, strict=True)])


@needs_triton
def test_nan_propagates():
    arguments, _ = inputs(3, 8, DTYPES[0], device=DEVICE)
    with torch.no_grad():
        arguments[0][0, 0], arguments[0][1, 17] = float("nan"), float("nan")
    with use_backend("triton"):
        new, normed = gru_norm(*arguments)
    assert new.isnan().sum(1).tolist() == [1, 1, 0] and normed.isnan().sum(1).tolist() == [8, 8, 0]


@needs_triton
def test_repeats_bit_for_bit():
    arguments = inputs(300, 20, DTYPES[1], device=DEVICE)
    first, second = run("triton", *arguments), run("triton", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_opcheck(backend, dtypes):
    arguments, (grad_new, grad_normed) = inputs(5, 4, dtypes, device=DEVICE)
    if dtypes[0] == torch.bfloat16:
        grad_new, arguments = None, [t.detach().t().contiguous().t().requires_grad_() for t in arguments]
    torch.library.opcheck(_forward, (*arguments, 1e-5, backend))
    detached = [t.detach() for t in arguments[:4]]
    torch.library.opcheck(_backward, (grad_new, grad_normed, *detached, 1e-5, backend))


@needs_triton
def test_compiled_in_one_graph_gives_the_same():
    arguments, given = inputs(5, 8, DTYPES[0], device=DEVICE)

    def loss(*tensors):
        return sum((result * weight).sum() for result, weight in zip(gru_norm(*tensors), given, strict=True))

    with use_backend("triton"):
        expected = torch.autograd.grad(loss(*arguments), arguments)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, torch.autograd.grad(compiled(*arguments), arguments), expected))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend):
    arguments, _ = inputs(5, 8, DTYPES[1], device=DEVICE)
    with use_backend(backend):
        plain = gru_norm(*arguments)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            new, normed = gru_norm(*arguments)
    assert (new.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(new, plain[0]) and torch.equal(normed, plain[1])


@needs_triton
def test_inputs_beyond_the_kernels_limits():
    arguments, _ = inputs(1, 1025, DTYPES[0], device=DEVICE)
    with use_backend("triton"), pytest.raises(ValueError, match=r"hidden \(1, 1025\) is wider than 1024"):
        gru_norm(*arguments)
    assert gru_norm(*arguments)[0].shape == (1, 1025)
    arguments, _ = inputs(2, 4, (F32, torch.float64, F32), device=DEVICE)
    with use_backend("triton"), pytest.raises(ValueError, match="hidden is torch.float64"):
        gru_norm(*arguments)
    assert gru_norm(*arguments)[0].dtype == torch.float64


def test_bad_arguments_are_named():
    (i, h, hidden, weight, bias), _ = inputs()
    with pytest.raises(ValueError, match=r"gates_input \(6, 14\) does not fit"):
        gru_norm(i[:, :14], h, hidden, weight, bias)
    with pytest.raises(ValueError, match=r"gates_hidden \(5, 15\) does not fit"):
        gru_norm(i, h[:5], hidden, weight, bias)
    with pytest.raises(ValueError, match="gates_hidden is torch.float32 but gates_input is torch.float64"):
        gru_norm(i, h.float(), hidden, weight, bias)
    with pytest.raises(ValueError, match=r"hidden \(1, 6, 5\) must have the layout \[M, U\]"):
        gru_norm(i, h, hidden[None], weight, bias)
    with pytest.raises(ValueError, match=r"weight \(4,\) does not fit"):
        gru_norm(i, h, hidden, weight[:4], bias)
    with pytest.raises(ValueError, match="hidden is torch.int64"):
        gru_norm(i, h, hidden.long(), weight, bias)
    with pytest.raises(ValueError, match="weight is on meta but gates_input on cpu"):
        gru_norm(i, h, hidden, weight.to("meta"), bias.to("meta"))


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    arguments, given = inputs(448, 256, DTYPES[1], device=DEVICE)
    assert_graph_replays(lambda: run("triton", arguments, given), lambda seed: redraw(arguments, seed))
