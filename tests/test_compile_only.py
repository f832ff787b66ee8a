"""Every kernel in every configuration that a launcher can choose compiles for the chips we name, and fits them.

Needs no GPU: see compile_kernels.py. Shared memory within the chip's limit (Triton would raise only at launch), nothing
spilled on sm_90, and no float64 arithmetic but where it is meant.
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
# The assignment is exact, with the same rounding as the library on the CPU: it computes in double precision.
FLOAT64 = ("assign",)

pytestmark = [pytest.mark.skipif(not dispatch.TRITON, reason="needs triton"), pytest.mark.slow]


def compiled(architecture: str, tmp_path: Path) -> list[dict]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), architecture], env=environment, text=True,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(architecture, tmp_path):
    rows = compiled(architecture, tmp_path)
    assert {row["case"].split(":")[0] for row in rows} == {path.stem for path in HERE.glob("compile_cases/[!_]*.py")}
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    meant = [row for row in rows if any(part in row["kernel"] for part in FLOAT64)]
    assert [row for row in rows if row["float64"] and row not in meant] == []
    if architecture == "sm_90":
        assert [row for row in rows if row["spilled"]] == []
