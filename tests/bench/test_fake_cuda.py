"""The study that traces the CUDA path without a GPU: it finds what it is for, and finds nothing in a step."""

import fake_cuda
import pytest
import torch
from fake_cuda import COPY, CUDA, ERROR, WAIT, Section, Watch
from torch._subclasses.fake_tensor import FakeTensorMode

import spot_kernels
from spot_kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.TRITON, reason="needs triton")


@pytest.fixture
def traced():
    """A section in which tensors may be on a GPU that is not there."""
    section = Section("here")
    with fake_cuda.as_if_there_was_a_gpu(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Watch(section):
        yield section


def kinds(section):
    return [finding.kind for finding in section.findings]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x.sum().tolist(),
        lambda x: x.to("cpu", torch.float64),
    ],
)
def test_what_waits_is_found(traced, wait):
    wait(torch.empty(3, 4, device=CUDA))
    assert kinds(traced) == [WAIT]


def test_copies_are_told_apart(traced):
    torch.zeros(3).to(CUDA)
    assert kinds(traced) == [COPY]
    torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    torch.full((), 3.0, device=CUDA).add_(1)
    assert kinds(traced) == [COPY]


def test_two_devices_in_one_operator_are_an_error(traced):
    with pytest.raises(RuntimeError, match="two different devices|two devices"):
        torch.empty(3, 4, device=CUDA) @ torch.empty(4, 5)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    tensors = [[torch.empty(3, device=CUDA)] for _ in range(4)]
    torch._fused_adam_(*tensors, [], [torch.zeros(())], **options, amsgrad=False, maximize=False)
    assert kinds(traced) == [ERROR] and "cpu, cuda:0" in traced.findings[0].what


def test_every_operator_runs_its_kernels_on_a_gpu(traced):
    """By itself, without a wait, and with results on the GPU."""

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=CUDA)

    q, k, v, tokens = tensor(2, 6, 7, 64), tensor(2, 6, 196, 64), tensor(2, 6, 196, 64), tensor(2, 196, 384)
    order, labels = tensor(196, dtype=torch.int64), tensor(2, 196, dtype=torch.int64)
    folded = tensor(2, 6, 7, 384)
    gates, weight = tensor(14, 192), tensor(64, dtype=torch.float32)
    flat, scalar = tensor(1024, dtype=torch.float32), tensor(dtype=torch.float32)
    calls = {
        "infinity_norm": ([flat, flat.bfloat16()],),
        "clipped_adam": (flat, [flat.bfloat16()], flat.clone(), flat.clone(), scalar.view(1), scalar),
        "slot_attention_step": (q, k, v),
        "slot_cross_attention": (k, q, q),
        "slot_cross_map": (k, q),
        "folded_cross_attention": (tokens, folded, folded),
        "folded_cross_map": (tokens, folded),
        "permuted_causal_attention": (k, k, v, order),
        "shift_by_order": (tokens, tensor(384), order),
        "gru_norm": (gates, gates, tensor(14, 64, dtype=torch.float32), weight, weight),
        "add_norm": (tokens, *[tensor(384, dtype=torch.float32)] * 2, 1e-5, tokens),
        "linear_relu": (tokens, tensor(1536, 384), tensor(1536)),
        "linear_assignment": (tensor(2, 7, 7, dtype=torch.float32),),
        "assign_masks": (labels, labels, 7),
        "match_masks": (labels, labels, 7),
        "overlap_counts": (labels, labels, 7, 7),
    }
    assert calls.keys() == {name for name, support in dispatch.SUPPORT.items() if "triton" in support}
    with spot_kernels.use_backend("auto"):
        for name, arguments in calls.items():
            results = getattr(spot_kernels, name)(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            # an operator that works in place has no result
            assert {result.device for result in results if result is not None} <= {CUDA}, name
    assert traced.findings == [] and traced.operators == dict.fromkeys(calls, "triton")


# Autograd ends the process of a CPU build at a tensor on "cuda". Builds for CUDA run this, without a GPU too.
CPU_BUILD = 'on a CPU build of PyTorch autograd ends with "PyTorch is not linked with support for cuda devices"'


@pytest.mark.skipif(torch.version.cuda is None, reason=CPU_BUILD)
def test_no_step_waits_and_no_tensor_is_left_behind(capsys):
    assert fake_cuda.main(["--tiny"]) == 0
    assert ", 0 findings that should not be there" in capsys.readouterr().out


def test_a_cpu_build_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert fake_cuda.main([]) == 2
    assert capsys.readouterr().err.startswith("error: PyTorch")
