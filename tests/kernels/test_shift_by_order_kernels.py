"""The kernels of shift_by_order, forward and backward: rows are copied, so results are those of PyTorch bit for bit."""

import itertools

import pytest
import torch

import kernel_tier
from kernel_tier import DEVICE, GRADIENT, assert_as_exact, assert_graph_replays, needs_gpu, needs_triton
from spot_fast.model.patch_orders import patch_orders
from spot_kernels import chosen_backend, shift_by_order, use_backend
from spot_kernels.reference import shift_by_order as reference
from spot_kernels.shift_by_order import _backward, _forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batch, tokens, width: one token; a width below a tile's; several tiles of rows and of columns.
SHAPES = [(2, 1, 5), (3, 15, 70), (2, 49, 300)]

pytestmark = needs_triton


def random_order(tokens, batch=None, seed=0):
    return kernel_tier.random_order(tokens, batch, seed).to(DEVICE)


def inputs(batch, tokens, width, shared=True, dtype=torch.float32, bos_dtype=None):
    """tokens, bos, the gradient of the result."""
    generator = torch.Generator().manual_seed(1000 * tokens + width)
    shapes = ((batch, tokens, width), (width,) if shared else (batch, width), (batch, tokens, width))
    dtypes = (dtype, bos_dtype or dtype, dtype)
    return [torch.randn(shape, generator=generator).to(DEVICE, of) for shape, of in zip(shapes, dtypes, strict=True)]


def results(function, tokens, bos, grad, order):
    """out, dtokens, dbos."""
    leaves = [tensor.detach().requires_grad_() for tensor in (tokens, bos)]
    out = function(*leaves, order)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def kernels(tokens, bos, order):
    with use_backend("triton"):
        return shift_by_order(tokens, bos, order)


def check(tokens, bos, grad, order):
    ours = results(kernels, tokens, bos, grad, order)
    plain = results(reference.shift_by_order, tokens, bos, grad, order)
    assert all(map(torch.equal, ours[: bos.dim() + 1], plain))  # a shared bos has the rounding of a sum
    exact = results(reference.shift_by_order, tokens.double(), bos.double(), grad.double(), order)
    assert_as_exact("dbos", ours[2], exact[2], plain[2], GRADIENT)
    return ours


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "for each sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_rows(shape, shared):
    for order in (random_order(shape[1]), random_order(shape[1], shape[0])):
        check(*inputs(*shape, shared), order)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_tokens_and_bos_of_any_dtype(dtypes):
    for shared in (True, False):
        out, *gradients = check(*inputs(3, 9, 20, shared, *dtypes), random_order(9, 3))
        assert (out.dtype, *(gradient.dtype for gradient in gradients)) == (dtypes[0], *dtypes)


def test_all_nine_orders():
    orders = patch_orders(5).to(DEVICE)
    check(*inputs(9, 25, 16, shared=False), orders)


def test_a_shared_bos_gets_the_sum_over_samples():
    """More samples than a tile has; in bfloat16, in which a running sum would lose the small ones."""
    tokens, bos, grad = inputs(70, 3, 20, dtype=torch.bfloat16)
    grad[0] = 256
    order = random_order(3, 70)
    _, _, grad_bos = results(kernels, tokens, bos, grad, order)
    exact = grad[torch.arange(70, device=DEVICE), order[:, 0]].double().sum(0)
    # one rounding, of the result
    assert torch.equal(grad_bos, exact.float().bfloat16())
    assert all(torch.equal(grad_bos, results(kernels, tokens, bos, grad, order)[2]) for _ in range(2))


def test_any_layout():
    tokens, bos, grad = inputs(3, 15, 20, shared=False)
    order = random_order(15, 3)
    expected = results(kernels, tokens, bos, grad, order)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (tokens, bos, grad, order)]
    assert not any(x.is_contiguous() for x in strided)
    assert all(map(torch.equal, results(kernels, *strided), expected))
    spread = torch.full((1, 1, 1), 0.5, device=DEVICE).expand_as(grad)
    for one in (tokens[:1].expand(3, -1, -1), tokens[..., :1].expand(-1, -1, 20)):
        check(one, bos[:1].expand(3, -1), spread, order[:1].expand(3, -1))


def test_only_the_gradient_that_is_needed():
    tokens, bos, grad = inputs(2, 9, 20)
    order = random_order(9)
    _, *expected = results(kernels, tokens, bos, grad, order)
    for i in range(2):
        leaves = [x.detach().requires_grad_(j == i) for j, x in enumerate((tokens, bos))]
        assert torch.equal(torch.autograd.grad(kernels(*leaves, order), leaves[i], grad)[0], expected[i])
        empty = _backward(grad, order, True, torch.float32, i == 0, i == 1, "triton")[1 - i]
        assert empty.shape == (0,)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout, backend):
    shared = layout == "compact"
    tokens, bos, grad = inputs(2, 7, 20, shared, bos_dtype=torch.bfloat16)
    order = random_order(7, None if shared else 2)
    if not shared:
        tensors = tokens, bos, grad, order
        tokens, bos, grad, order = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors)
    torch.library.opcheck(_forward, (tokens.requires_grad_(), bos.requires_grad_(), order, backend))
    torch.library.opcheck(_backward, (grad, order, shared, torch.bfloat16, True, True, backend))


def test_the_operator_on_pytorch_is_the_reference():
    for shared, order in itertools.product((True, False), (random_order(9), random_order(9, 2))):
        arguments = (*inputs(2, 9, 20, shared), order)
        ours = results(lambda *a: _forward(*a, "torch"), *arguments)
        assert all(map(torch.equal, ours, results(reference.shift_by_order, *arguments)))


def test_compiled_gives_the_same_and_takes_a_new_order_as_it_is():
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(shift_by_order, fullgraph=True, backend=graphs)
    tensors = inputs(2, 9, 20)
    with use_backend("triton"):
        for seed in range(3):
            order = random_order(9, seed=seed)
            expected = results(shift_by_order, *tensors, order)
            assert all(map(torch.equal, results(compiled, *tensors, order), expected))
    assert graphs.frame_count == 1


def test_autocast_keeps_dtypes():
    tensors = inputs(2, 9, 20)
    order = random_order(9)
    expected = results(kernels, *tensors, order)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert all(map(torch.equal, results(kernels, *tensors, order), expected))


def test_inputs_beyond_the_kernels_limits():
    tokens, bos, _ = inputs(1, 9, 20)
    order = random_order(9)
    with pytest.raises(ValueError, match="triton was requested, but bos is torch.float64: use backend torch"):
        kernels(tokens, bos.double(), order)
    with pytest.raises(ValueError, match=r"triton was requested, but tokens \(1, 0, 20\) has no tokens"):
        kernels(tokens[:, :0], bos, order[:0])
    with pytest.raises(ValueError, match="do not take torch.float64: use float32, bfloat16, float16"):
        kernels(tokens.double(), bos, order)
    for of_tokens, of_bos in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        out = shift_by_order(tokens.to(of_tokens), bos.to(of_bos), order)
        assert out.dtype == of_tokens and torch.equal(out[:, order[0]], bos[None].to(of_tokens))
    assert chosen_backend("shift_by_order", tokens) == ("triton" if DEVICE.type == "cuda" else "torch")


@needs_gpu
def test_captured_in_a_graph_and_without_waiting():
    tensors, order = inputs(3, 40, 300), random_order(40)
    assert_graph_replays(
        lambda: results(shift_by_order, *tensors, order), lambda seed: order.copy_(random_order(40, seed=seed))
    )
