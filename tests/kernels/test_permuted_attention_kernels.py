"""The kernels of permuted_causal_attention, forward and backward, against float64; the operator around them."""

import pytest
import torch
import torch.nn.functional as F

import kernel_tier
from kernel_tier import DEVICE, GRADIENT, OUTPUT, assert_as_exact, assert_graph_replays, needs_gpu, needs_triton
from spot_fast.model.patch_orders import patch_orders
from spot_kernels import chosen_backend, permuted_causal_attention, use_backend
from spot_kernels import permuted_attention as operator
from spot_kernels.reference import permuted_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batch, heads, tokens, head width: one token; less than a tile; padded widths; rows that end just after a tile.
SHAPES = [(2, 2, 1, 16), (2, 4, 15, 20), (1, 2, 49, 96), (1, 1, 65, 32), (1, 1, 196, 64), (1, 1, 257, 128)]

pytestmark = needs_triton


def random_order(tokens, batch=None, seed=0):
    return kernel_tier.random_order(tokens, batch, seed).to(DEVICE)


def inputs(batch, heads, tokens, width, dtype=torch.float32, grad=False):
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(1000 * tokens + width)
    return [
        torch.randn(batch, heads, tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
        for _ in range(4)
    ]


def results(function, tensors, grad, order):
    """out, dq, dk, dv."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, order)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def kernels(q, k, v, order):
    with use_backend("triton"):
        return permuted_causal_attention(q, k, v, order)


def check(q, k, v, grad, order):
    exact = results(reference.permuted_causal_attention, [x.double() for x in (q, k, v)], grad.double(), order)
    return check_against(exact, q, k, v, grad, order)


def check_against(exact, q, k, v, grad, order):
    ours = results(kernels, (q, k, v), grad, order)
    plain = results(reference.permuted_causal_attention, (q, k, v), grad, order)
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        assert_as_exact(name, *values, OUTPUT if name == "out" else GRADIENT)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(shape, dtype):
    check(*inputs(*shape, dtype), random_order(shape[2], seed=shape[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_order_for_each_sample(dtype):
    check(*inputs(3, 2, 40, 16, dtype), random_order(40, 3))


def test_all_nine_orders():
    """One order for each sample, which must equal a call of that sample alone to the last bit."""
    orders = patch_orders(6).to(DEVICE)
    tensors = inputs(9, 1, 36, 16)
    together = check(*tensors, orders)
    for i, order in enumerate(orders):
        *alone, grad = (x[i : i + 1] for x in tensors)
        for one, all_of_them in zip(results(kernels, alone, grad, order), together, strict=True):
            assert torch.equal(one[0], all_of_them[i])


@pytest.mark.parametrize("which", [4, 8])
def test_equals_moving_the_tokens(which):
    """Gather into the sequence, PyTorch's causal attention, scatter back: an oracle without ranks."""

    def moved(q, k, v, order):
        out = F.scaled_dot_product_attention(*(x.index_select(2, order) for x in (q, k, v)), is_causal=True)
        return torch.zeros_like(out).index_copy(2, order, out)

    order = patch_orders(14)[which].to(DEVICE)
    *tensors, grad = inputs(1, 1, 196, 32)
    check_against(results(moved, [x.double() for x in tensors], grad.double(), order), *tensors, grad, order)


def test_a_token_sees_its_predecessors_and_itself_alone():
    q, k, v, _ = inputs(1, 2, 70, 16)
    order = random_order(70)
    before = kernels(q, k, v, order)
    assert torch.equal(before[:, :, order[0]], v[:, :, order[0]])
    for place in (1, 31, 32, 33, 63, 64, 69):
        later = order[place:]
        changed_k, changed_v = (x.index_fill(2, later, 100.0) for x in (k, v))
        after = kernels(q, changed_k, changed_v, order)
        assert torch.equal(before[:, :, order[:place]], after[:, :, order[:place]])
        assert (before[:, :, later] != after[:, :, later]).any(-1).all()


def test_orders_in_any_layout():
    *tensors, grad = inputs(3, 1, 20, 16)
    orders = random_order(20, 3)
    expected = results(kernels, tensors, grad, orders)
    for order in (orders.t().contiguous().t(), torch.stack([orders, orders], 2)[..., 0]):
        assert not order.is_contiguous()
        assert all(map(torch.equal, results(kernels, tensors, grad, order), expected))
    one = results(kernels, tensors, grad, orders[0])
    assert all(map(torch.equal, results(kernels, tensors, grad, orders[:1].expand(3, -1)), one))


def test_the_output_has_the_layout_of_merged_heads():
    *tensors, grad = inputs(2, 3, 9, 16)
    for tensor in results(kernels, tensors, grad, random_order(9)):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    """Logits of ±10,000: most weights are 0, equal keys share the rest. Every other row has ordinary logits."""
    q, k, v, grad = inputs(1, 2, 50, 16)
    k = torch.where(k > 0, 50.0, -50.0)[:, :, torch.arange(50, device=DEVICE) % 5]
    q = torch.where(q > 0, 50.0, -50.0)
    q[:, :, 0], q[:, :, 2] = k[:, :, 0], -k[:, :, 0]
    q[:, :, 1::2] /= 4096
    assert (q @ k.transpose(2, 3) / 4).aminmax() == (-10_000, 10_000)
    check(*(x.to(dtype) for x in (q, k, v, grad)), random_order(50))


def test_the_same_vector_added_to_every_key_changes_nothing():
    q, k, v, grad = inputs(1, 2, 40, 16)
    order = random_order(40)
    exact = results(reference.permuted_causal_attention, [x.double() for x in (q, k, v)], grad.double(), order)
    # the gradient of q is Σ ds (k + 30) = Σ ds k, by cancellation that costs kernels and PyTorch the same
    check_against(exact, q, k + 30, v, grad, order)


def test_repeats_to_the_last_bit():
    *tensors, grad = inputs(2, 2, 70, 16, torch.bfloat16)
    order = random_order(70)
    first = results(kernels, tensors, grad, order)
    for _ in range(2):
        assert all(map(torch.equal, results(kernels, tensors, grad, order), first))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout, backend):
    q, k, v, grad = inputs(2, 2, 17, 16, grad=True)
    if layout == "permuted":
        q, k, v, grad = (
            x.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_() for x in (q, k, v, grad)
        )
    order = random_order(17, 2 if layout == "permuted" else None)
    torch.library.opcheck(operator._forward, (q, k, v, order, backend))
    saved = [x.detach() for x in operator._forward(q, k, v, order, backend)]
    arguments = [x.detach() for x in (grad, q, k, v)]
    torch.library.opcheck(operator._backward, (*arguments, order, *saved, backend))


def test_the_operator_on_pytorch_is_the_reference():
    *tensors, grad = inputs(2, 2, 17, 16)
    order = random_order(17)
    ours = results(lambda *a: operator._forward(*a, "torch")[0], tensors, grad, order)
    torch.testing.assert_close(ours, results(reference.permuted_causal_attention, tensors, grad, order))


def test_compiled_gives_the_same_and_takes_a_new_order_as_it_is():
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(permuted_causal_attention, fullgraph=True, backend=graphs)
    *tensors, grad = inputs(2, 2, 20, 16)
    with use_backend("triton"):
        for seed in range(3):
            order = random_order(20, seed=seed)
            expected = results(permuted_causal_attention, tensors, grad, order)
            assert all(map(torch.equal, results(compiled, tensors, grad, order), expected))
    assert graphs.frame_count == 1


def test_autocast():
    *tensors, grad = inputs(1, 2, 20, 16)
    order = random_order(20)
    low = [x.bfloat16() for x in tensors]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = results(kernels, tensors, grad, order)
        mixed = kernels(tensors[0], *low[1:], order)
    expected = results(kernels, low, grad.bfloat16(), order)
    assert [x.dtype for x in cast] == [torch.bfloat16] + 3 * [torch.float32]
    assert all(map(torch.equal, cast, [expected[0], *(x.float() for x in expected[1:])]))
    assert torch.equal(mixed, expected[0])


def test_inputs_beyond_the_kernels_limits():
    q, k, v, _ = inputs(1, 1, 9, 129)
    order = random_order(9)
    with pytest.raises(ValueError, match=r"triton was requested, but q \(1, 1, 9, 129\) is wider than 128 a head"):
        kernels(q, k, v, order)
    with pytest.raises(ValueError, match=r"do not take torch.float64: use float32, bfloat16, float16"):
        kernels(q.double(), k.double(), v.double(), order)
    wide = permuted_causal_attention(q, k, v, order)
    assert torch.equal(wide, reference.permuted_causal_attention(q, k, v, order))
    assert chosen_backend("permuted_causal_attention", q) == ("triton" if DEVICE.type == "cuda" else "torch")


@needs_gpu
def test_captured_in_a_graph_and_without_waiting():
    *tensors, grad = inputs(2, 2, 70, 64, torch.bfloat16)
    order = random_order(70)
    assert_graph_replays(
        lambda: results(permuted_causal_attention, tensors, grad, order),
        lambda seed: order.copy_(random_order(70, seed=seed)),
    )
