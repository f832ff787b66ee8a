"""What the kernels cost to start: compiled once, in the first step of a run, however orders and draws change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spot_kernels import dispatch

SCRIPT = Path(__file__).with_name("count_compilations.py")


@pytest.mark.skipif(not dispatch.TRITON, reason="needs triton")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_compiles_a_few_kernels_and_the_next_ones_none(stage):
    """No autotuning, and nothing that is drawn is a compile-time constant."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(SCRIPT), str(stage)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 10 <= found["first"] <= 24 and found["later"] == 0
