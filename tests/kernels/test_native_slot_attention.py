"""The native slot-attention step, forward and backward, on every instruction set of this processor.

Its error against float64 may be at most twice (gradients: three times) that of plain PyTorch in the same dtype. Batches
are large enough that the largest error of either is not a matter of luck.
"""

import math

import pytest
import torch

from kernel_tier import GRADIENT, OUTPUT, assert_as_exact
from spot_kernels import native
from spot_kernels.reference import slot_attention as reference

LEVELS = native.slot_attention_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason=native.describe())
DTYPES = [torch.float32, torch.bfloat16]
NAMES = "updates", "attn", "logits", "dq", "dk", "dv"


@pytest.fixture(params=native._LEVELS)
def level(request, monkeypatch):
    if request.param not in LEVELS:
        pytest.skip(f"no {request.param} here")
    monkeypatch.setattr(native, "_level", native._LEVELS[request.param])
    return request.param


def inputs(batch, heads, tokens, slots, width, dtype=torch.float32, scale=1.0):
    """q, k, v and gradients of updates, attn and logits; logits have a standard deviation of `scale`."""
    generator = torch.Generator().manual_seed(tokens + 1000 * slots + width)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(batch, heads, slots, width) * scale * width**-0.5
    k, v = normal(batch, heads, tokens, width), normal(batch, heads, tokens, width)
    gradients = normal(batch, heads, slots, width), normal(batch, tokens, slots), normal(batch, heads, tokens, slots)
    return [x.to(dtype) for x in (q, k, v)], [gradients[0].to(dtype), *gradients[1:]]


def plain(tensors, gradients, eps, dtype):
    """The reference in `dtype`: its three results and three gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    results = reference.slot_attention_step(*leaves, eps)
    wanted = [(result, grad) for result, grad in zip(results, gradients, strict=True) if grad is not None]
    found = torch.autograd.grad(
        [result for result, _ in wanted], leaves, [grad.to(result.dtype) for result, grad in wanted], allow_unused=True
    )
    return *results, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))


def run(tensors, gradients, eps=1e-8):
    updates, attn, logits, exact, sums = native.slot_attention_forward(*tensors, eps, True, True)
    return updates, attn, logits, *native.slot_attention_backward(*gradients, *tensors, exact, sums, eps)


def assert_correct(tensors, gradients, eps=1e-8, slack=1.0):
    found = run(tensors, gradients, eps)
    baseline = plain(tensors, gradients, eps, tensors[0].dtype)
    exact = plain(tensors, gradients, eps, torch.float64)
    for name, value, true, rough in zip(NAMES, found, exact, baseline, strict=True):
        assert_as_exact(name, value, true, rough, slack * (GRADIENT if name.startswith("d") else OUTPUT))


def allowance(level):
    """Without fused multiply-adds, which PyTorch has here, a product is rounded once more."""
    return 1.5 if level == "baseline" else 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 2, 6, 7, 11, 16, 24, 33, 64, 100])
def test_number_of_slots(level, dtype, slots):
    """Every way in which slots fill vectors and register tiles, one head and four."""
    assert_correct(*inputs(16, 1, 49, slots, 64, dtype), slack=allowance(level))
    assert_correct(*inputs(32, 4, 15, slots, 16, dtype), slack=allowance(level))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 32, 49, 196, 257])
def test_number_of_tokens(level, dtype, tokens):
    """Whole and partial blocks of tokens."""
    assert_correct(*inputs(16, 1, tokens, 7, 96, dtype), slack=allowance(level))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 17, 64, 96, 256, 300])
@pytest.mark.parametrize("heads", [1, 4])
def test_width(level, dtype, width, heads):
    """Widths that are, and are not, whole vectors; odd ones have no bfloat16 pairs."""
    assert_correct(*inputs(16, heads, 33, 7, width, dtype), slack=allowance(level))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_many_tokens(level, dtype, batch):
    """A batch entry cut into several work items, whose partial sums are added up."""
    assert_correct(*inputs(batch, 1, 5000, 11, 16, dtype), slack=allowance(level))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 24])
def test_layouts(level, dtype, width):
    """Heads side by side, parts of rows, odd strides, expanded inputs, gradients of stride 0: the same numbers."""
    tensors, gradients = inputs(2, 4, 49, 7, width, dtype)
    expected = run(tensors, gradients)
    layouts = {
        "heads side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "part of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
        "width not last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, layout in layouts.items():
        grads = [layout(gradients[0]), gradients[1].mT.contiguous().mT, gradients[2]]
        changed = run([layout(x) for x in tensors], grads)
        for result, value, true in zip(NAMES, changed, expected, strict=True):
            torch.testing.assert_close(value, true, msg=lambda text, at=(name, result): f"{at}: {text}")
    expanded = [x[:1, :1].expand_as(x) for x in tensors]
    constant = [torch.ones((), dtype=grad.dtype).expand_as(grad) for grad in gradients]
    copies = run([x.contiguous() for x in expanded], [grad.contiguous() for grad in constant])
    assert all(map(torch.equal, run(expanded, constant), copies))


def test_results_have_heads_side_by_side():
    """Merging heads afterwards copies nothing."""
    tensors, gradients = inputs(2, 4, 9, 7, 16)
    updates, _, _, dq, dk, dv = run(tensors, gradients)
    assert all(x.transpose(1, 2).is_contiguous() for x in (updates, dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_absent_gradients(level, dtype, present):
    """None stands for zero, and is not looked at."""
    tensors, gradients = inputs(16, 2, 49, 7, 32, dtype)
    kept = [grad if keep else None for grad, keep in zip(gradients, present, strict=True)]
    zeros = [grad if keep else torch.zeros_like(grad) for grad, keep in zip(gradients, present, strict=True)]
    for name, value, true in zip(NAMES, run(tensors, kept), run(tensors, zeros), strict=True):
        torch.testing.assert_close(value, true, msg=name)
    if any(present):
        assert_correct(tensors, kept, slack=allowance(level))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(level, dtype):
    """Nothing overflows; the softmax is a choice of one slot, so an update is the mean of the tokens that chose it."""
    tensors, gradients = inputs(2, 1, 49, 7, 16, dtype, scale=1e4)
    found = run(tensors, gradients)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert found[2].abs().max() > 1e4
    chosen = torch.nn.functional.one_hot(found[2].squeeze(1).argmax(-1), 7).double()
    means = chosen.mT @ tensors[2].squeeze(1).double() / chosen.sum(1)[..., None]
    used = chosen.sum(1) > 0
    torch.testing.assert_close(found[0].squeeze(1).double()[used], means[used], rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_shift_invariance(level):
    """A constant added to all logits of a token changes nothing: here through a channel in which all slots agree."""
    (q, k, v), _ = inputs(2, 1, 49, 7, 16)
    q[..., 0] = 1.0
    moved = k.clone()
    moved[..., 0] = 64.0 * torch.randint(-4, 5, moved.shape[:-1], generator=torch.Generator().manual_seed(0))
    k[..., 0] = 0.0
    for value, true in zip(
        native.slot_attention_forward(q, moved, v, 1e-8, True, False)[:2],
        native.slot_attention_forward(q, k, v, 1e-8, True, False)[:2],
        strict=True,
    ):
        torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-4)


def test_exponential(level):
    """Two slots with logits 0 and x: attention is exp(x) / (1 + exp(x)); to two units in the last place, down to 0."""
    x = torch.cat([torch.linspace(-110, 0, 20001), torch.tensor([-87.3366, -103.97, -1e30, -0.0])])
    q, k = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), x.view(1, 1, -1, 1)
    _, attn, _, _, _ = native.slot_attention_forward(q, k, k, 1e-8, True, False)
    exact = x.double().sigmoid()
    unit = torch.maximum(exact * torch.finfo(torch.float32).eps, torch.tensor(2.0**-149).double())
    assert ((attn[0, :, 1].double() - exact).abs() / unit).max() <= 2
    assert attn[0, x.argmin(), 1] == 0


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3, 1.0])
def test_eps(level, eps):
    assert_correct(*inputs(16, 2, 49, 7, 16), eps=eps, slack=allowance(level))


def test_not_a_number_stays_with_its_token(level):
    (q, k, v), _ = inputs(1, 1, 49, 7, 16)
    k[0, 0, 5] = math.nan
    _, attn, logits, _, _ = native.slot_attention_forward(q, k, v, 1e-8, True, True)
    bad = torch.arange(49) == 5
    assert torch.equal(attn.isnan().any(-1)[0], bad) and torch.equal(logits.isnan().all(-1)[0, 0], bad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 4000, 24, 64), (40, 2, 257, 11, 64)])
def test_threads_change_nothing(level, dtype, shape):
    """Work is cut by shape alone: bit for bit the same on 1, 2, 3 and 8 threads, and when repeated."""
    tensors, gradients = inputs(*shape, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            results.append(run(tensors, gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("shape", [(0, 1, 9, 7, 16), (2, 1, 9, 7, 0)])
def test_empty(level, shape):
    """An empty batch; heads without width, whose logits are 0."""
    tensors, gradients = inputs(*shape[:4], max(shape[4], 1))
    tensors, gradients = [x[..., : shape[4]] for x in tensors], [gradients[0][..., : shape[4]], *gradients[1:]]
    updates, attn, logits, dq, dk, dv = run(tensors, gradients)
    assert [x.shape for x in (updates, dq, dk, dv)] == [tensors[0].shape, *(x.shape for x in tensors)]
    assert torch.equal(logits, torch.zeros_like(logits))
    torch.testing.assert_close(attn, torch.full_like(attn, 1 / 7))


def test_without_tokens_gradients_are_zero(level):
    """No token: 0 / 0, as in PyTorch, and nothing that q could change."""
    tensors, gradients = inputs(2, 1, 0, 7, 16)
    updates, _, _, dq, _, _ = run(tensors, [None, *gradients[1:]])
    assert bool(updates.isnan().all()) and not dq.any()


def test_attention_and_logits_only_when_asked():
    tensors, _ = inputs(2, 1, 9, 7, 16)
    updates, attn, logits, _, _ = native.slot_attention_forward(*tensors, 1e-8, False, False)
    assert attn is None and logits is None
    assert torch.equal(updates, native.slot_attention_forward(*tensors, 1e-8, True, True)[0])


def test_where_it_wins():
    """The rule is about dtype and slots; it holds under torch.compile, where tensors have no data."""
    (q, k, _), _ = inputs(2, 1, 9, 11, 16)
    fast = LEVELS[0] != "baseline"
    assert native.slot_attention_wins(q, k) is native.slot_attention_wins(q.bfloat16(), k.bfloat16()) is fast
    assert not native.slot_attention_wins(q.double(), k.double()) and not native.slot_attention_wins(q.half(), k.half())
    assert not native.slot_attention_wins(q.repeat(1, 1, 2, 1), k)

    def rule(q, k):
        return q + 1 if native.slot_attention_wins(q, k) else q

    assert torch.equal(torch.compile(rule, backend="eager", fullgraph=True)(q, k), q + fast)


def test_unknown_level_is_refused(monkeypatch):
    monkeypatch.setattr(native, "_level", 99)
    with pytest.raises(RuntimeError, match="code 5"):
        native.slot_attention_forward(*inputs(1, 1, 9, 7, 16)[0], 1e-8, False, False)


def test_torchs_own_threads_and_started_ones_give_the_same(monkeypatch):
    """GOMP_parallel of torch's OpenMP where there is one, std::thread elsewhere; large enough for several threads."""
    (q, k, v), gradients = inputs(8, 1, 196, 7, 64)
    before = torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(3)
        for team in (native._team(), None):
            monkeypatch.setattr(native, "_team", lambda team=team: team)
            updates, attn, logits, exact, sums = native.slot_attention_forward(q, k, v, 1e-8, True, True)
            found = native.slot_attention_backward(*gradients, q, k, v, exact, sums, 1e-8)
            results.append((updates, attn, logits, *found))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
