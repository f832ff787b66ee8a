"""Has PyTorch know of no accelerator, so that a backward pass can be traced on the tensors of a GPU that is not there.

The autograd engine asks for the streams of the accelerator, which a machine without a driver does not have. `load`
puts two functions of its own in front of PyTorch's: they answer that there is none. Only before torch is imported.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# at::accelerator::getAccelerator(bool) -> std::optional<DeviceType>, and isAccelerator(DeviceType) -> bool
_SOURCE = """
short _ZN2at11accelerator14getAcceleratorEb(char checked) { return 0; }
char _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(char type) { return 0; }
"""


def load() -> None:
    """RuntimeError where torch is imported already or there is no C compiler."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: call this before")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler: install gcc or clang")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "no_accelerator.c", Path(folder) / "no_accelerator.so"
        source.write_text(_SOURCE, encoding="ascii")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
