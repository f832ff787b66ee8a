"""Every kernel in every configuration that a launcher can choose compiles for the supported chips and fits them.

Needs no GPU: see compile_kernels.py. Shared memory within the chip's limit (Triton would raise only at launch), no
spills beyond SPILLED, and no float64 arithmetic but where it is meant. All of that with the installed Triton and with
those in the folders that $COMPILE_ALSO_WITH names (separated by a colon): each PyTorch release brings another. CI adds
3.6.0, the oldest that is supported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spot_kernels import dispatch
from spot_kernels.gpu.launch import ARCHITECTURES, SHARED_MEMORY

HERE = Path(__file__).resolve().parent
# The assignment computes in double precision, with the same rounding as the native library.
FLOAT64 = ("assign",)

pytestmark = [pytest.mark.skipif(not dispatch.TRITON, reason="needs triton"), pytest.mark.slow]


# Spilled bytes allowed a thread: none on H100, H200 and MI300X. On the other chips a dozen registers may be spilled
# around a loop; which kernels do so changes with every Triton.
SPILLED = {"sm_80": 48, "sm_89": 48, "sm_90": 0, "sm_100": 48, "gfx942": 0}
# The compiler of CUDA builds of PyTorch 2.13 puts up to four registers aside in float32 backward passes of the
# cross-attention; those of float16 and bfloat16, which training uses, keep to SPILLED.
SPILLED_FLOAT32 = {("3.7.1", "sm_90"): 16}
# Where a Triton is: "" is the installed one.
TRITONS = ["", *filter(None, os.environ.get("COMPILE_ALSO_WITH", "").split(os.pathsep))]


@pytest.mark.parametrize("triton", TRITONS, ids=lambda folder: Path(folder).name or "installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(architecture, triton, tmp_path):
    rows = compiled(architecture, triton, tmp_path)
    if triton:  # that the folder's Triton came before the installed one
        version = next(Path(triton).glob("triton-*.dist-info")).name.split("-")[1].removesuffix(".dist")
        assert {row["triton"] for row in rows} == {version}
    assert {row["case"].split(":")[0] for row in rows} == {path.stem for path in HERE.glob("compile_cases/[!_]*.py")}
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    meant = [row for row in rows if any(part in row["kernel"] for part in FLOAT64)]
    assert [row for row in rows if row["float64"] and row not in meant] == []
    assert [row for row in rows if row["spilled"] > allowed_to_spill(row)] == []


def allowed_to_spill(row: dict) -> int:
    """Bytes."""
    more = SPILLED_FLOAT32.get((row["triton"], row["architecture"]), 0) if "float32" in row["case"] else 0
    return max(SPILLED[row["architecture"]], more)


def compiled(architecture: str, triton: str, cache: Path) -> list[dict]:
    """The rows of compile_kernels.py, which runs without the interpreter and with an empty cache."""
    path = os.pathsep.join(filter(None, (triton, os.environ.get("PYTHONPATH", ""))))
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    # under pytest-xdist the other core has tests of its own
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), architecture, "--jobs", jobs],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
