"""Every kernel in every configuration that a launcher can choose compiles for the supported chips and fits them.

Needs no GPU: see compile_kernels.py. Shared memory within the chip's limit (Triton would raise only at launch), no
spills beyond SPILLED, and no float64 arithmetic but where it is meant. All of that with the Triton that is installed
and with those in the folders that $COMPILE_ALSO_WITH names (separated by a colon): PyTorch releases bring different
ones, and GPU machines have what their PyTorch brought. CI adds 3.6.0, the oldest that is supported.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
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
# Folders with a Triton; "" is the installed one.
TRITONS = ["", *filter(None, os.environ.get("COMPILE_ALSO_WITH", "").split(os.pathsep))]


class Compilation:
    """compile_kernels.py for all chips with one Triton after the other, in the background.

    conftest.py begins it, so that it runs beside the tests that come before these.
    """

    def __init__(self, jobs: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.jobs, self.ended, self.codes = jobs, False, {}
        self.process: subprocess.Popen | None = None
        atexit.register(self.end)
        self.thread = threading.Thread(target=self._run, name="compile_kernels", daemon=True)
        self.thread.start()

    def _file(self, triton: str, kind: str) -> Path:
        return Path(self.folder.name) / f"{TRITONS.index(triton)}.{kind}"

    def _run(self) -> None:
        for triton in TRITONS:
            if self.ended:
                return
            path = os.pathsep.join(filter(None, (triton, os.environ.get("PYTHONPATH", ""))))
            environment = os.environ | {
                "TRITON_INTERPRET": "0",
                "PYTHONPATH": path,
                "TRITON_CACHE_DIR": str(self._file(triton, "cache")),
            }
            command = [sys.executable, str(HERE / "compile_kernels.py"), *ARCHITECTURES, "--jobs", str(self.jobs)]
            # files, because pipes would fill up unread
            with open(self._file(triton, "out"), "w") as out, open(self._file(triton, "err"), "w") as err:
                self.process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
                self.codes[triton] = self.process.wait()

    def end(self) -> None:
        """Kills the process, so that it does not outlive the tests."""
        self.ended = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.thread.join()
        self.folder.cleanup()

    def rows(self, triton: str) -> list[dict]:
        self.thread.join()
        assert self.codes[triton] == 0, self._file(triton, "err").read_text()[-4000:]
        return [json.loads(line) for line in self._file(triton, "out").read_text().splitlines()]


begun: list[Compilation] = []


def begin(jobs: int) -> None:
    if dispatch.TRITON and not begun:
        begun.append(Compilation(jobs))


@pytest.fixture(scope="module", params=TRITONS, ids=lambda folder: Path(folder).name or "installed")
def compiled(request) -> list[dict]:
    begin(jobs=2)
    rows = begun[0].rows(request.param)
    if request.param:  # that the folder's Triton came before the installed one
        version = next(Path(request.param).glob("triton-*.dist-info")).name.split("-")[1].removesuffix(".dist")
        assert {row["triton"] for row in rows} == {version}
    return rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(architecture, compiled):
    rows = [row for row in compiled if row["architecture"] == architecture]
    assert {row["case"].split(":")[0] for row in rows} == {path.stem for path in HERE.glob("compile_cases/[!_]*.py")}
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    meant = [row for row in rows if any(part in row["kernel"] for part in FLOAT64)]
    assert [row for row in rows if row["float64"] and row not in meant] == []
    assert [row for row in rows if row["spilled"] > SPILLED[architecture]] == []
