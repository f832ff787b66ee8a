"""Launches: the compile-only tests compile what a GPU would get, and new orders and draws compile nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spot_kernels import dispatch
from spot_kernels.gpu.launch import ARCHITECTURES

HERE = Path(__file__).parent
# Folders of further Tritons, as test_compile_only.py has them.
TRITONS = ["", *filter(None, os.environ.get("COMPILE_ALSO_WITH", "").split(os.pathsep))]
pytestmark = pytest.mark.skipif(not dispatch.TRITON, reason="needs triton")


def run(script: str, *words: str, triton: str = "") -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (triton, os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return subprocess.run([sys.executable, str(HERE / script), *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("triton", TRITONS, ids=lambda folder: Path(folder).name or "installed")
def test_the_launcher_binds_what_the_compile_only_tests_compile(triton):
    """Arguments, constants and specialisation agree with Triton's own compiler, for every launch and chip.

    It would reject a misnamed constant or an extra argument, and reveal a dtype that the compile-only tests assume.
    """
    done = run("compile_kernels.py", *ARCHITECTURES, "--bind", triton=triton)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} launches, 0 differ", done.stdout.strip())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_compiles_a_few_kernels_and_the_next_ones_none(stage):
    """No autotuning, and nothing that is drawn is a compile-time constant."""
    done = run("count_compilations.py", str(stage))
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert 10 <= compiled["first"] <= 48 and compiled["later"] == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["compile_kernels.py", "sm_90", "--csv", f"{__file__}/x.csv"], "x.csv cannot be written: "),
        (["count_compilations.py", "3"], "argument stage: invalid choice"),
    ],
)
def test_wrong_arguments_are_a_sentence_before_anything_is_compiled(words, says):
    done = run(*words)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and done.stdout == ""
