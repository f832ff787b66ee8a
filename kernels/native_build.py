"""How setup.py builds the native library of spot_kernels, here and in the folder above: the library is optional.

CMake builds it; where cmake is missing or fails, the C++ compiler is called directly; where that fails too, the install
goes on without the library and prints one line. The library has a plain C interface, so a wheel with it fits every
Python 3 on its platform, and a wheel without it every platform.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libspot_native" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build_with_cmake(folder: Path) -> Path:
    run("cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", str(folder), "--config", "Release")
    return next(folder.rglob(LIBRARY))


def build_with_compiler(folder: Path) -> Path:
    """The same sources and options as in CMakeLists.txt, for a compiler with the command line of GCC."""
    compiler = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++"))
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
    sources = sorted(map(str, (ROOT / "csrc").glob("*.cpp")))
    folder.mkdir(parents=True)
    run(*compiler, *flags, "-shared", *sources, "-o", str(folder / LIBRARY))
    return folder / LIBRARY


def reason(error: Exception) -> str:
    """One line: that a command does not exist, or its first line about an error, or its last line."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} not found"
    lines = (getattr(error, "stdout", None) or str(error) or repr(error)).strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # a process may have it mapped: never write into it
        for build in (build_with_cmake, build_with_compiler):
            # a fresh folder: cmake's cache holds only for the folder and the compiler it was made with
            folder = Path(self.build_temp).resolve() / build.__name__
            shutil.rmtree(folder, ignore_errors=True)
            try:
                library = build(folder)
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                failure = reason(error)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(library, target)
                return
        print(f"spot_kernels: no native library, scipy and PyTorch are used instead ({failure})", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # Only after the build is it known whether the wheel depends on the platform.
        self.root_is_pure = not os.path.exists(os.path.join(self.bdist_dir, "spot_kernels", LIBRARY))
        return "py3", "none", super().get_tag()[2]


NATIVE = {
    # no sources: BuildNative knows them; optional: setuptools copies the library only if it was built
    "ext_modules": [Extension("spot_kernels.libspot_native", sources=[], optional=True)],
    "cmdclass": {"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
}
