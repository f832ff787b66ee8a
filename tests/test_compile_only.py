"""Every kernel in every configuration that a launcher can choose compiles for the chips we name, and fits them.

Needs no GPU: see compile_kernels.py. Shared memory within the chip's limit (Triton would raise only at launch), nothing
spilled on sm_90, and no float64 arithmetic but where it is meant.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from spot_kernels import dispatch
from spot_kernels.gpu.launch import ARCHITECTURES, SHARED_MEMORY

HERE = Path(__file__).resolve().parent
# The assignment is exact, with the same rounding as the library on the CPU: it computes in double precision.
FLOAT64 = ("assign",)

pytestmark = [pytest.mark.skipif(not dispatch.TRITON, reason="needs triton"), pytest.mark.slow]


class Compilation:
    """compile_kernels.py for all chips, beside the tests that come before these (conftest.py begins it)."""

    def __init__(self, jobs: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        # Files, because nobody reads pipes meanwhile.
        self.outputs = [open(Path(self.folder.name) / name, "w+") for name in ("stdout", "stderr")]
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": self.folder.name}
        command = [sys.executable, str(HERE / "compile_kernels.py"), *ARCHITECTURES, "--jobs", str(jobs)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=self.outputs[0],
                                        stderr=self.outputs[1], start_new_session=True)  # fmt: skip
        atexit.register(self.end)

    def end(self) -> None:
        """Nothing outlives the tests, however they end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in self.outputs:
            file.close()
        self.folder.cleanup()

    def rows(self) -> list[dict]:
        code = self.process.wait()
        texts = [Path(file.name).read_text() for file in self.outputs]
        assert code == 0, texts[1][-4000:]
        return [json.loads(line) for line in texts[0].splitlines()]


begun: list[Compilation] = []


def begin(jobs: int) -> None:
    if dispatch.TRITON and not begun:
        begun.append(Compilation(jobs))


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    begin(jobs=2)
    return begun[0].rows()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(architecture, compiled):
    rows = [row for row in compiled if row["architecture"] == architecture]
    assert {row["case"].split(":")[0] for row in rows} == {path.stem for path in HERE.glob("compile_cases/[!_]*.py")}
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    meant = [row for row in rows if any(part in row["kernel"] for part in FLOAT64)]
    assert [row for row in rows if row["float64"] and row not in meant] == []
    if architecture == "sm_90":
        assert [row for row in rows if row["spilled"]] == []
