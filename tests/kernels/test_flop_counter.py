"""torch.utils.flop_counter: the operators count as their references do, whichever backend runs."""

import os
import subprocess
import sys

import pytest
from torch.utils.flop_counter import FlopCounterMode

from kernel_tier import NATIVE, TRITON
from operator_calls import INTEGERS, calls, results_of
from spot_kernels import use_backend

ONE_RESULT = ("slot_cross_map", "folded_cross_map", "permuted_causal_attention", "shift_by_order")


def counted(function, tensors, through=slice(None)):
    """FLOPs of forward, and of forward and backward through some of the results."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with FlopCounterMode(display=False) as counter:
        results = results_of(function(*leaves))
        forward = counter.get_total_flops()
        sum(result.sum() for result in results[through]).backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
@pytest.mark.parametrize("operator", [name for name in calls() if name not in INTEGERS])
def test_every_backend_counts_what_the_reference_does(operator, backend):
    function, tensors = calls()[operator]
    for through in (slice(None), slice(0, 1), slice(1, 2)):
        if through.start and len(results_of(function(*tensors))) == 1:
            continue
        with use_backend("torch"):
            expected = counted(function, tensors, through)
        with use_backend(backend):
            assert counted(function, tensors, through) == expected, through
        assert (expected[0] > 0) is (operator not in ("gru_norm", "add_norm", "shift_by_order"))


def test_a_counter_imported_later_knows_the_operators():
    """In a process of its own; the counter imports Triton, so importing the operators must not import it."""
    code = """
import sys, torch, spot_kernels
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.device("meta"):
    torch.ops.spot_kernels.slot_attention_step(
        torch.empty(2, 1, 7, 64), torch.empty(2, 1, 196, 64), torch.empty(2, 1, 196, 64), 1e-8, False, False, "torch")
assert counter.get_total_flops() == 4 * 2 * 7 * 196 * 64, counter.get_total_flops()
assert not any(type(finder).__module__.startswith("spot_kernels") for finder in sys.meta_path)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
