"""add_norm: residual addition and LayerNorm against PyTorch's own; streams of 24 bits; the kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
from spot_kernels import add_norm
from spot_kernels.add_norm import _backward, _forward
from spot_kernels.dispatch import use_backend
from spot_kernels.reference import add_norm as reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# x, delta, LayerNorm, normed: one dtype throughout, and what autocast mixes
DTYPES = (
    (F32, F32, F32, F32),
    (BF16, BF16, F32, BF16),
    (F16, F16, F16, F16),
    (F32, BF16, F32, BF16),
    (BF16, F32, F32, F32),
)
NAMES = ("sum", "normed", "grad x", "grad delta", "grad weight", "grad bias")
FACTORS = (OUTPUT, OUTPUT, *[GRADIENT] * 4)
EPS = 1e-5


def inputs(rows=6, width=5, dtypes=(F64,) * 4, size=1.0, device="cpu"):
    """x, delta, weight, bias, and gradients of sum and normed."""
    generator = torch.Generator().manual_seed(rows + 1000 * width)
    x, delta, norm, normed = dtypes
    shapes = (
        ((rows, width), x),
        ((rows, width), delta),
        ((width,), norm),
        ((width,), norm),
        ((rows, width), x),
        ((rows, width), normed),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=F64) for shape, _ in shapes]
    tensors[:2] = [size * t + size for t in tensors[:2]]
    tensors = [t.to(device, dtype) for t, (_, dtype) in zip(tensors, shapes, strict=True)]
    return [t.requires_grad_() for t in tensors[:4]], tensors[4:]


def run(backend, arguments, given, dtype=None, exact=False, **options):
    """sum, normed and the gradients of all arguments; `given` holds gradients, or None."""
    arguments = [None if t is None else (t.to(F64) if exact else t).detach().requires_grad_() for t in arguments]
    x, delta, weight, bias = arguments
    with use_backend(backend):
        total, normed, _ = add_norm(x, weight, bias, EPS, delta, dtype=F64 if exact else dtype, **options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((total, normed), given, strict=True) if g is not None]
    outputs, grads = zip(*pairs, strict=True)
    leaves = [t for t in arguments if t is not None]
    return total, normed, *torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


def check(arguments, given, dtype):
    names = [name for name, t in zip(NAMES, (1, 1, *arguments), strict=True) if t is not None]
    results = [
        run(backend, arguments, given, dtype, exact) for backend, exact in (("triton", 0), ("torch", 1), ("torch", 0))
    ]
    for name, ours, exact, plain in zip(names, *results, strict=True):
        assert_as_exact(name, ours, exact, plain, FACTORS[NAMES.index(name)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 17), st.floats(1e-6, 0.1), st.booleans(), st.booleans())
def test_equals_torchs_layer_norm(rows, width, eps, adds, affine):
    (x, delta, weight, bias), _ = inputs(rows, width)
    delta = delta if adds else None
    weight, bias = (weight, bias) if affine else (None, None)
    total, normed, low = add_norm(x, weight, bias, eps, delta)
    expected = x if delta is None else x + delta
    assert low is None and torch.equal(total, expected)
    torch.testing.assert_close(normed, F.layer_norm(expected, (width,), weight, bias, eps))


def test_gradients_of_the_reference():
    (x, delta, weight, bias), _ = inputs(3, 4)
    assert gradcheck(lambda *t: add_norm(t[0], t[2], t[3], EPS, t[1])[:2], (x, delta, weight, bias))


@pytest.mark.parametrize("which", [(True, True), (False, True)])
def test_written_out_gradients_are_those_of_autograd(which):
    arguments, given = inputs()
    given = [g if wanted else None for g, wanted in zip(given, which, strict=True)]
    total = arguments[0] + arguments[1]
    with torch.no_grad():
        grad, *others = reference.gradients(
            *given, total, *reference.statistics(total, None, None, EPS, None), arguments[2]
        )
    torch.testing.assert_close((grad, grad, *others), run("torch", arguments, given)[2:])


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 16), (21, 256), (300, 20), (5, 768), (2, 4096)])
def test_as_exact_as_pytorch(rows, width, dtypes):
    check(*inputs(rows, width, dtypes, device=DEVICE), dtypes[-1])


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
@pytest.mark.parametrize("parts", ["nothing added", "no weight", "neither"])
def test_without_an_addition_or_a_weight(parts, dtypes):
    (x, delta, weight, bias), given = inputs(9, 24, dtypes, device=DEVICE)
    delta = delta if parts == "no weight" else None
    weight, bias = (weight, bias) if parts == "nothing added" else (None, None)
    check([x, delta, weight, bias], [given[0] if delta is not None else None, given[1]], dtypes[-1])


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_gradient_of_one_result(which, dtypes):
    arguments, given = inputs(9, 24, dtypes, device=DEVICE)
    check(arguments, [g if wanted else None for g, wanted in zip(given, which, strict=True)], dtypes[-1])


@needs_triton
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_large_and_tiny_streams(size):
    """Whose mean is not small beside their deviation."""
    for dtypes in DTYPES[:2]:
        check(*inputs(9, 24, dtypes, size, DEVICE), dtypes[-1])


@needs_triton
def test_one_gradient_serves_both_summands():
    (x, delta, weight, bias), _ = inputs(4, 8, DTYPES[0], device=DEVICE)
    with use_backend("triton"):
        total, normed, _ = add_norm(x, weight, bias, EPS, delta)
    grads = torch.autograd.grad((total.sum() + normed.square().sum()), (x, delta))
    assert grads[0].data_ptr() == grads[1].data_ptr() or torch.equal(*grads)


@needs_triton
def test_the_patches_of_longer_sequences_are_read_in_place(monkeypatch):
    """[B, prefix + N, D] without its prefix tokens, whose rows are two strides apart."""
    from spot_kernels.gpu import add_norm as kernels

    (tokens, _, weight, bias), (_, grad) = inputs(15, 16, DTYPES[0], device=DEVICE)
    found = []
    launch = kernels.launch.launch
    monkeypatch.setattr(kernels.launch, "launch", lambda *a, **k: found.append(a[2]) or launch(*a, **k))
    for backend in ("torch", "triton"):
        leaf = tokens.detach().view(3, 5, 16).requires_grad_()
        with use_backend(backend):
            _, normed, _ = add_norm(leaf[:, 1:], weight, bias, EPS)
        found.append(torch.autograd.grad(normed, (leaf, weight), grad.view(3, 5, 16)[:, 1:]))
    torch.testing.assert_close(found[0], found[-1])
    assert found[1].data_ptr() == leaf[:, 1:].data_ptr()


# ---- 24 bits


def test_split_and_join():
    values = torch.randn(4096).exp() * torch.randn(4096)
    values[:5] = torch.tensor([float("nan"), 0.0, -0.0, 1e-30, 3.3e38])
    high, low = reference.split(values)
    assert (high.dtype, low.dtype) == (BF16, torch.int8) and torch.equal(high[1:], values[1:].bfloat16())
    torch.testing.assert_close(reference.join(high, low), values, rtol=2.0**-15, atol=0, equal_nan=True)
    assert reference.join(high, None) is high


@needs_triton
@pytest.mark.parametrize("low_of, replaces", [("sum", False), ("normed", True)])
@pytest.mark.parametrize("with_low", [True, False])
@pytest.mark.parametrize("rows, width", [(5, 24), (3, 768)])
def test_a_stream_of_24_bits(rows, width, with_low, low_of, replaces):
    """As near to float64 as one in float32 is, to 16 bits; its gradients are as exact as any in bfloat16."""
    dtypes = (F32, BF16, F32, BF16)
    (wide, delta, weight, bias), given = inputs(rows, width, dtypes, device=DEVICE)
    high, low = reference.split(wide.detach())
    low = low if with_low else None
    value = reference.join(high, low).double()
    arguments = [high, None if replaces else delta, weight, bias]
    given = [None if replaces else given[0].bfloat16(), given[1]]
    exact = run("torch", [value, *arguments[1:]], given, exact=True)
    with use_backend("triton"):
        results = add_norm(high, weight, bias, EPS, arguments[1], low=low, low_of=low_of, dtype=BF16)
    assert results.low.dtype == torch.int8 and (results.sum.dtype, results.normed.dtype) == (BF16, BF16)
    stored = reference.join(results.normed if replaces else results.sum, results.low)
    torch.testing.assert_close(stored.double(), exact[int(replaces)], rtol=2.0**-15, atol=1e-6)
    ours = run("triton", arguments, given, BF16, low=low, low_of=low_of)
    plain = run("torch", arguments, given, BF16)
    names = [name for name, t in zip(NAMES, (1, 1, *arguments), strict=True) if t is not None]
    for name, *parts in zip(names, ours, exact, plain, strict=True):
        assert_as_exact(name, *parts, FACTORS[NAMES.index(name)])


@needs_triton
def test_a_float32_stream_becomes_one_of_24_bits():
    (x, delta, weight, bias), given = inputs(5, 24, (F32, BF16, F32, BF16), device=DEVICE)
    ours = run("triton", [x, delta, weight, bias], given, BF16, low_of="sum")
    assert [t.dtype for t in ours] == [BF16, BF16, F32, BF16, F32, F32]
    exact = run("torch", [x, delta, weight, bias], given, exact=True)
    plain = run("torch", [x.bfloat16(), delta, weight, bias], given, BF16)
    for name, own, *others, factor in zip(NAMES, ours, exact, plain, FACTORS, strict=True):
        assert_as_exact(name, own.to(others[1].dtype), *others, factor)


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_low_without_an_addition(backend):
    (x, _, weight, bias), _ = inputs(3, 8, DTYPES[1], device=DEVICE)
    low = torch.ones(x.shape, dtype=torch.int8, device=DEVICE)
    with use_backend(backend):
        for low_of in (None, "sum"):
            total, _, same = add_norm(x, weight, bias, low=low, low_of=low_of)
            assert total is x and same is low
        assert add_norm(x, weight, bias, EPS, x, low=low).low is None


# ---- the operator


@needs_triton
@pytest.mark.parametrize("low_of", [None, "sum"])
def test_nan_propagates(low_of):
    (x, delta, weight, bias), _ = inputs(3, 8, DTYPES[0], device=DEVICE)
    with torch.no_grad():
        x[0, 0], delta[1, 7] = float("nan"), float("nan")
    with use_backend("triton"):
        total, normed, low = add_norm(x, weight, bias, EPS, delta, low_of=low_of)
    assert reference.join(total, low).isnan().sum(1).tolist() == [1, 1, 0]
    assert normed.isnan().sum(1).tolist() == [8, 8, 0]


@needs_triton
def test_repeats_bit_for_bit():
    arguments, given = inputs(300, 20, DTYPES[3], device=DEVICE)
    first, second = (run("triton", arguments, given, BF16, low_of="sum") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("low_of", [None, "sum", "normed"])
def test_opcheck(backend, low_of):
    (x, delta, weight, bias), (grad_sum, grad_normed) = inputs(5, 4, DTYPES[3], device=DEVICE)
    delta = None if low_of == "normed" else delta.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(_forward, (x, None, delta, weight, bias, EPS, low_of, BF16, backend))
    total, weight = (x if low_of is None else x.bfloat16()).detach(), weight.detach()
    statistics = reference.statistics(total, None, None, EPS, None)
    for wanted in ((F32, BF16, True), (None, None, True), (F32, None, False)):
        given = None if wanted[0] is None else grad_sum.to(total.dtype)
        torch.library.opcheck(_backward, (given, grad_normed, total, *statistics, weight, *wanted, backend))


@needs_triton
def test_compiled_in_one_graph_gives_the_same():
    arguments, given = inputs(5, 8, DTYPES[3], device=DEVICE)

    def loss(x, delta, weight, bias):
        total, normed, low = add_norm(x, weight, bias, EPS, delta, low_of="sum")
        total, again, _ = add_norm(total, weight, bias, EPS, normed, low=low, low_of="sum")
        return sum((result * weight).sum() for result, weight in zip((total, again), given, strict=True))

    with use_backend("triton"):
        expected = torch.autograd.grad(loss(*arguments), arguments)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, torch.autograd.grad(compiled(*arguments), arguments), expected))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_says_what_the_next_product_wants(backend):
    (x, delta, weight, bias), _ = inputs(5, 8, DTYPES[0], device=DEVICE)
    with use_backend(backend):
        plain = add_norm(x, weight, bias, EPS, delta)
        with torch.autocast(DEVICE.type, dtype=BF16):
            total, normed, _ = add_norm(x, weight, bias, EPS, delta)
            wide = add_norm(x, weight, bias, EPS, delta, dtype=F32).normed
    assert (total.dtype, normed.dtype) == (F32, BF16)
    assert torch.equal(total, plain.sum) and torch.equal(wide, plain.normed)
    torch.testing.assert_close(normed, plain.normed.bfloat16(), rtol=2**-7, atol=0)


@needs_triton
def test_inputs_beyond_the_kernels_limits():
    (x, delta, weight, bias), _ = inputs(1, 4097, DTYPES[0], device=DEVICE)
    with use_backend("triton"), pytest.raises(ValueError, match=r"x \(1, 4097\) is wider than 4096"):
        add_norm(x, weight, bias, EPS, delta)
    assert add_norm(x, weight, bias, EPS, delta).sum.shape == (1, 4097)
    (x, delta, weight, bias), _ = inputs(2, 4, (F32, F64, F32, F32), device=DEVICE)
    with use_backend("triton"), pytest.raises(ValueError, match="weight, delta or dtype is float64"):
        add_norm(x, weight, bias, EPS, delta)
    assert add_norm(x, weight, bias, EPS, delta).sum.dtype == F32


def test_bad_arguments_are_named():
    (x, delta, weight, bias), _ = inputs()
    low = torch.zeros(6, 5, dtype=torch.int8)
    for message, arguments, options in (
        (r"x \(\) needs a last axis", (x[0, 0],), {}),
        ("x is torch.int64", (x.long(),), {}),
        ("weight and bias, or neither", (x, weight), {}),
        (r"weight \(4,\) does not fit", (x, weight[:4], bias), {}),
        ("bias is torch.float32 but weight is torch.float64", (x, weight, bias.float()), {}),
        (r"delta \(5, 5\) must have the shape of x \(6, 5\)", (x, weight, bias, EPS, delta[:5]), {}),
        ("weight is on meta but x on cpu", (x, weight.to("meta"), bias.to("meta")), {}),
        ("low is torch.int8 and x torch.float64", (x,), {"low": low}),
        (r"low \(6, 4\) must have the shape", (x.bfloat16(),), {"low": low[:, :4]}),
        ("low_of='x' is unknown", (x.float(),), {"low_of": "x"}),
        ("low_of='sum' needs x in bfloat16 or float32", (x,), {"low_of": "sum"}),
        ("dtype=torch.int8", (x,), {"dtype": torch.int8}),
    ):
        with pytest.raises(ValueError, match=f"add_norm: .*{message}"):
            add_norm(*arguments, **options)


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    arguments, given = inputs(448, 256, DTYPES[3], device=DEVICE)
    assert_graph_replays(
        lambda: run("triton", arguments, given, BF16, low_of="sum"), lambda seed: redraw(arguments, seed)
    )
