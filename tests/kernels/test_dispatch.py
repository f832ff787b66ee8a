"""The choice of a backend: the default, a block of code, the environment, and the message when it cannot run."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import spot_kernels
from paths import ROOT
from spot_kernels import chosen_backend, dispatch, use_backend

KERNELS = ROOT / "kernels"
X = torch.zeros(1, 1, 2, 4)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    base = {key: value for key, value in os.environ.items() if not key.startswith(("SPOT_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=base | {"PYTHONPATH": str(KERNELS)} | environment,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


def test_every_name_is_a_public_operator():
    for operator in dispatch.SUPPORT:
        assert callable(getattr(spot_kernels, operator)), operator


def test_on_a_cpu_auto_takes_the_library_where_it_has_the_operator(monkeypatch):
    with use_backend("auto"):
        for there, expected in ((True, "native"), (False, "torch")):
            monkeypatch.setattr(dispatch, "NATIVE", there)
            assert chosen_backend("linear_assignment", X[0]) == expected
            assert chosen_backend("linear_assignment", X[0].bfloat16()) == expected
            assert chosen_backend("overlap_counts", X[0, 0].long()) == expected
        monkeypatch.setattr(dispatch, "NATIVE", True)
        assert chosen_backend("overlap_counts", X[0, 0]) == "torch"
        assert chosen_backend("slot_attention_step", X) == "torch"


def test_on_a_gpu_auto_takes_the_kernels_within_their_limits(monkeypatch):
    """With a stand-in for a GPU tensor: only device and dtype matter."""

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    monkeypatch.setattr(dispatch, "TRITON", True)
    with use_backend("auto"):
        for operator, support in dispatch.SUPPORT.items():
            OnGpu.dtype = support.get("triton", (torch.float32,))[-1]
            if "triton" not in support:
                assert chosen_backend(operator, OnGpu) == "torch"
                continue
            assert chosen_backend(operator, OnGpu) == "triton"
            assert dispatch.choose(operator, OnGpu, "q has more than 64 slots") == "torch"
        OnGpu.dtype = torch.float64
        assert chosen_backend("slot_attention_step", OnGpu) == "torch"
        with use_backend("triton"):
            assert chosen_backend("mask_labels", OnGpu) == "torch"  # it has no kernel
        monkeypatch.setattr(dispatch, "TRITON", False)
        assert chosen_backend("slot_attention_step", OnGpu) == "torch"
    with use_backend("native"), pytest.raises(ValueError, match="but the tensors are on cuda: use auto"):
        chosen_backend("slot_attention_step", OnGpu)


def test_blocks_nest_and_end_with_an_error():
    with use_backend("torch"):
        with pytest.raises(RuntimeError, match="inside"), use_backend("auto"):
            raise RuntimeError("inside")
        assert chosen_backend("linear_assignment", X[0]) == "torch"


def in_a_thread(function):
    """The result of `function` in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_block_holds_for_its_own_thread_alone():
    """Two models in two threads, one of them compared on backend torch: neither changes what the other runs."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> str:
        with use_backend("torch"):
            inside.set()
            assert leave.wait(60)
            return dispatch._choice.requested

    with use_backend("native"), ThreadPoolExecutor(1) as pool:
        chosen = pool.submit(other)
        assert inside.wait(60)
        assert dispatch._choice.requested == "native"
        assert in_a_thread(lambda: dispatch._choice.requested) == dispatch._DEFAULT
        leave.set()
        assert chosen.result() == "torch"


def test_a_compiled_function_follows_the_choice_of_the_thread_that_calls_it():
    """The choice is guarded: neither a block nor another thread gets a graph traced for another choice."""
    traced = []

    def backend(graph, inputs):
        traced.append([str(node.target) for node in graph.graph.nodes if "spot_kernels" in str(node.target)])
        return graph

    torch._dynamo.reset()
    function = torch.compile(spot_kernels.slot_cross_attention, fullgraph=True, backend=backend)

    def call(name: str) -> int:
        with use_backend(name):
            function(X, X, X)
        return len(traced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON", True)
        patch.setattr(dispatch, "INTERPRETED", True)
        assert [call(name) for name in ("torch", "triton", "torch")] == [1, 2, 2]
        assert [in_a_thread(lambda name=name: call(name)) for name in ("torch", "triton")] == [2, 2]
    assert not traced[0] and traced[1]
    torch._dynamo.reset()


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: 'cuda' is unknown: use one of auto, triton, native, torch"):
        with use_backend("cuda"):
            pass
    with pytest.raises(ValueError, match="operator 'softmax' is unknown: use one of slot_attention_step"):
        chosen_backend("softmax", X)
    with use_backend("triton"):
        monkeypatch.setattr(dispatch, "TRITON", True)
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(ValueError, match="the tensors are on cpu: move them to a GPU or set TRITON_INTERPRET=1"):
            chosen_backend("shift_by_order", X)
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
        with pytest.raises(ValueError, match="do not take torch.float64: use float32, bfloat16, float16, or backend"):
            chosen_backend("slot_attention_step", X.double())
        with pytest.raises(ValueError, match="q has more than 64 slots: use backend torch"):
            dispatch.choose("slot_attention_step", X, "q has more than 64 slots")
        monkeypatch.setattr(dispatch, "TRITON", False)
        with pytest.raises(ValueError, match="triton is not installed"):
            chosen_backend("shift_by_order", X)
    with use_backend("native"):
        monkeypatch.setattr(dispatch, "NATIVE", False)
        with pytest.raises(ValueError, match="backend native was requested, but there is"):
            chosen_backend("linear_assignment", X[0])


def test_native_leaves_the_rest_to_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE", True)
    with use_backend("native"):
        assert chosen_backend("slot_attention_step", X) == "torch"


def test_the_environment_sets_the_default():
    code = "import torch, spot_kernels as s; print(s.chosen_backend('linear_assignment', torch.zeros(1, 2, 2)))"
    assert run(code, SPOT_KERNELS_BACKEND="torch").stdout == "torch\n"
    wrong = run(code, SPOT_KERNELS_BACKEND="fast")
    assert wrong.returncode and "SPOT_KERNELS_BACKEND 'fast' is unknown: use one of auto" in wrong.stderr


def test_importing_does_not_import_triton():
    code = "import sys, spot_kernels; print('triton' in sys.modules)"
    assert run(code).stdout == "False\n"
