"""clipped_adam and infinity_norm: the formula against torch's fused Adam, the kernels against float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernel_tier import DEVICE, OUTPUT, assert_as_exact, assert_graph_replays, every_backend, needs_gpu, needs_triton
from spot_kernels import clipped_adam, infinity_norm, use_backend
from spot_kernels.clipped_adam import UNIT, _clipped_adam, _infinity_norm, bias_corrections
from spot_kernels.reference import clipped_adam as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
BETAS = (0.9, 0.999)


def state(sizes, dtypes=(F32,), device="cpu", seed=0):
    """weights, gradients, moments, step counts, rate and owners of parameters of `sizes` units.

    The last unit is not full. The first tensor of gradients has the first half of the parameters if there are two.
    """
    generator = torch.Generator().manual_seed(seed)
    units = sum(sizes)
    size = units * UNIT - 24

    def normal():
        return torch.randn(size, generator=generator)

    half = UNIT * sum(sizes[: len(sizes) // 2])
    parts = normal().split([size] if len(dtypes) == 1 else [half, size - half])
    gradients = [(part * 0.1).to(dtype).to(device) for part, dtype in zip(parts, dtypes, strict=True)]
    moments = (normal() * 0.1).to(device), (normal().square() * 0.01).to(device)
    steps = torch.randint(0, 30, (len(sizes),), generator=generator).float().to(device)
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(device)
    return normal().to(device), gradients, *moments, steps, torch.tensor(1e-2, device=device), owners


def changed(arguments, copy=BF16, **options):
    """What a call changes: weights, moments, steps and the copy of all but the last 100 weights."""
    weights, gradients, *moments, steps, rate, owners = arguments
    weights, steps, moments = weights.clone(), steps.clone(), [moment.clone() for moment in moments]
    copied = None if copy is None else torch.full((len(weights) - 100,), NAN, dtype=copy, device=weights.device)
    clipped_adam(weights, gradients, *moments, steps, rate, owners=owners, copy=copied, **options)
    return weights, *moments, steps, copied


def exact(arguments, limit=0.0, norm=None, bad=None, present=None):
    """The same in float64, by the reference."""
    weights, gradients, *moments, steps, rate, owners = arguments
    weights, *moments = (tensor.double() for tensor in (weights, *moments))
    betas = torch.tensor(BETAS, dtype=F32, device=weights.device).double()
    powers = betas[:, None] ** torch.arange(40, device=weights.device)
    corrections = torch.stack([1 - powers[0], (1 - powers[1]).sqrt()])
    norm = None if norm is None else norm.double()
    gradients = [gradient.double() for gradient in gradients]
    fixed = (rate.double(), owners, corrections, None, norm, bad, present, None, limit, BETAS, 1e-8)
    reference.clipped_adam(weights, gradients, *moments, steps, *fixed)
    return weights, *moments


def test_equals_torchs_fused_adam():
    """Whose formula on a CPU weights the moments by 1 − β in float64."""
    weights, (gradient,), first, second, _, rate, _ = state([2])
    theirs = [tensor.clone() for tensor in (weights, first, second)]
    steps, count = torch.zeros(1), torch.zeros(())
    for _ in range(5):
        norm = infinity_norm([gradient])
        clipped_adam(weights, [gradient], first, second, steps, rate, norm=norm, limit=0.3)
        count += 1
        clipped = gradient * (0.3 / (norm + 1e-6)).clamp(max=1.0)
        options = dict(lr=0.01, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
        torch._fused_adam_([theirs[0]], [clipped], [theirs[1]], [theirs[2]], [], [count], **options)
        gradient = -0.5 * gradient
    for ours, other in zip((weights, first, second), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=3e-5)
    assert steps.item() == 5


def test_bias_corrections_end_at_one():
    for betas in (BETAS, (0.0, 0.99), (0.5, 0.5)):
        table = bias_corrections(betas, torch.device("cpu"))
        assert (table[:, -1] == 1).all() and (table[:, 0] == (betas[0] == betas[1] == -1)).all()
        beta = torch.tensor(betas, dtype=F32).double()
        assert torch.equal(table[:, 3], torch.stack([1 - beta[0] ** 3, (1 - beta[1] ** 3).sqrt()]).float())


@needs_triton
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (BF16, F32), (F16, F32)], ids=str)
@pytest.mark.parametrize("sizes", [[1], [1, 1], [3, 1, 2], [1, 5, 1, 1]], ids=str)
def test_as_exact_as_pytorch(sizes, dtypes):
    arguments = state(sizes, dtypes[: len(sizes)], DEVICE)
    options = {"norm": infinity_norm(arguments[1]), "limit": 0.05}
    with use_backend("triton"):
        ours = changed(arguments, **options)
    with use_backend("torch"):
        plain = changed(arguments, **options)
    for name, *parts in zip(
        ("weights", "exp_avg", "exp_avg_sq"), ours, exact(arguments, **options), plain, strict=False
    ):
        assert_as_exact(name, *parts, OUTPUT)
    assert torch.equal(ours[3], plain[3])
    if DEVICE.type == "cuda":
        assert torch.equal(ours[4], ours[0][:-100].bfloat16())
    else:  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(ours[4].float(), ours[0][:-100], rtol=2**-7, atol=0)


@every_backend
def test_parameters_without_gradient_and_bad_steps_change_nothing(backend):
    arguments = state([2, 1, 1], (BF16, F32), DEVICE)
    arguments[1][0][7] = NAN
    arguments[1][1][-1] = INF
    before = (*arguments[:1], *arguments[2:5])
    with use_backend(backend):
        ours = changed(arguments, copy=None, bad=torch.ones((), device=DEVICE))
        assert all(map(torch.equal, ours[:4], before))
        present = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
        ours = changed(arguments, present=present, bad=torch.zeros((), device=DEVICE))
    for new, old in zip(ours[:3], before, strict=False):
        kept = torch.cat([new[: 2 * UNIT] == old[: 2 * UNIT], new[3 * UNIT :] == old[3 * UNIT :]])
        assert kept.all() and (new[2 * UNIT : 3 * UNIT] != old[2 * UNIT : 3 * UNIT]).any()
    assert torch.equal(ours[3], before[3] + present)
    assert ours[4].isnan()[: 2 * UNIT].all() and not ours[4].isnan()[2 * UNIT : 3 * UNIT].any()


@every_backend
def test_zero_padding_stays_zero(backend):
    arguments = [state([1, 1], device=DEVICE)[number] for number in range(7)]
    for tensor in (arguments[0], *arguments[1], *arguments[2:4]):
        tensor[100:UNIT] = 0
    with use_backend(backend):
        ours = changed(arguments, norm=infinity_norm(arguments[1]), limit=0.3)
    assert not any(tensor[100:UNIT].any() for tensor in (*ours[:3], ours[4]))


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1, 3, 4096, 70_000])
def test_norm_is_exact_and_keeps_nan(size, dtype, backend):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype).to(DEVICE)
    values[-1] = -9.0
    others = torch.randn(5, device=DEVICE)
    with use_backend(backend):
        assert infinity_norm([values]).item() == 9 and infinity_norm([others, values]).item() == 9
        assert infinity_norm([torch.zeros_like(values)]).item() == 0
        for bad in (NAN, -NAN, INF, -INF):
            values[size // 2] = bad
            norm = infinity_norm([values, others])
            assert norm.dtype == F32 and (norm.isnan() if bad != bad else norm == INF)


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_in_another_sequence(dtype, backend):
    arguments = state([2, 1, 1], (dtype,), DEVICE)
    units = torch.nn.functional.pad(arguments[1][0], (0, 24)).split(UNIT)
    # one unit begins at 16, and rubbish lies between
    rubbish = torch.full((UNIT - 16,), NAN, dtype=dtype, device=DEVICE)
    moved = torch.cat([rubbish[:16], units[3], rubbish, units[1], units[0], units[2]])
    places = torch.tensor([3 * UNIT, 2 * UNIT, 4 * UNIT, 16], device=DEVICE)
    with use_backend(backend):
        expected = changed(arguments)
        found = changed([arguments[0], [moved], *arguments[2:]], places=places)
    assert all(map(torch.equal, found, expected))


@needs_triton
def test_repeats_bit_for_bit():
    arguments = state([3, 2], (BF16, F32), DEVICE)
    with use_backend("triton"):
        first, second = changed(arguments), changed(arguments)
    assert all(map(torch.equal, first, second))


@every_backend
def test_opcheck(backend):
    weights, gradients, *moments, steps, rate, owners = state([1, 2], (BF16, F32), DEVICE)
    copy = torch.zeros(UNIT, dtype=BF16, device=DEVICE)
    tensors = (weights, gradients, *moments, steps, rate, owners, bias_corrections(BETAS, DEVICE), copy, rate)
    arguments = (*tensors, None, None, None, 0.3, list(BETAS), 1e-8)
    backend = "torch" if backend == "native" else backend
    torch.library.opcheck(_clipped_adam, (*arguments, backend))
    torch.library.opcheck(_infinity_norm, (gradients, backend))


def test_without_data():
    """On the meta device and with fake tensors, which leave no table behind."""
    bias_corrections.cache_clear()
    mode = FakeTensorMode()
    given = [
        [mode.from_tensor(t) for t in one] if isinstance(one, list) else mode.from_tensor(one) for one in state([1, 1])
    ]
    with mode:
        changed(given)
    changed([[t.to("meta") for t in one] if isinstance(one, list) else one.to("meta") for one in state([1, 1])])
    assert type(changed(state([1, 1]))[0]) is torch.Tensor


def test_bad_arguments_are_named():
    weights, gradients, first, second, steps, rate, owners = state([1, 1])
    for options, message in (
        ({"gradients": []}, "gradients are 0 tensors: pass one or two"),
        ({"gradients": [gradients[0][:-1]]}, r"gradients have \[2023\] elements and weights 2024"),
        ({"gradients": list(gradients[0].split(1012))}, r"gradients have \[1012, 1012\] elements"),
        ({"gradients": [gradients[0].double()]}, "gradients are torch.float64: pass float32, bfloat16 or float16"),
        ({"gradients": [gradients[0].view(2, -1)]}, r"gradients \(2, 1012\) must have the layout \[T\]"),
        ({"weights": weights.double()}, r"weights is torch.float64 \(2024,\) on cpu: pass torch.float32 \(2024,\)"),
        ({"owners": owners[:1]}, r"owners is torch.int32 \(1,\) on cpu: pass torch.int32 \(2,\)"),
        ({"rate": rate.to("meta")}, r"rate is torch.float32 \(\) on meta"),
        (
            {"places": owners, "gradients": list(gradients[0].split(UNIT))},
            "gradients are two tensors, which places cannot",
        ),
        ({"places": owners}, r"places is torch.int32 \(2,\) on cpu: pass torch.int64 \(2,\)"),
        ({"present": steps[:1]}, r"present is torch.float32 \(1,\)"),
        ({"copy": torch.zeros(3000)}, r"copy is \(3000,\) on cpu: pass at most \[2024\]"),
        ({"limit": 0.3}, "limit is 0.3 and norm None: pass the gradients' norm"),
    ):
        given = dict(weights=weights, gradients=gradients, exp_avg=first, exp_avg_sq=second, steps=steps, rate=rate)
        with pytest.raises(ValueError, match=f"clipped_adam: {message}"):
            clipped_adam(**{**given, "owners": owners, **options})
    with pytest.raises(ValueError, match=r"infinity_norm: tensors \(0,\) must be contiguous, not empty"):
        infinity_norm([weights[:0]])


@needs_gpu
def test_captured_graph_replays_the_same_numbers_without_a_sync():
    arguments = state([40, 3, 60], (BF16, F32), DEVICE)

    def redraw(seed):
        other = state([40, 3, 60], (BF16, F32), DEVICE, seed=seed)
        for tensor, new in zip(arguments[1], other[1], strict=True):
            tensor.copy_(new)

    assert_graph_replays(lambda: changed(arguments, norm=infinity_norm(arguments[1]), limit=0.3), redraw)
