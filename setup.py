"""Builds the native library of spot_kernels, which is optional; everything else about the package is in pyproject.toml.

CMake builds it; where cmake is missing or fails, the C++ compiler is called directly; where that fails too, the install
goes on without the library and says so in one line. The library has a plain C interface, so a wheel that holds it fits
every Python 3 on its platform, and a wheel without it every platform.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libspot_native" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

# Beyond those that all files have, as in CMakeLists.txt, which says why.
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i486", "i586", "i686")
AVX2 = ("-mavx2", "-mfma") if X86 else ()
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq") if X86 else ()
BF16 = (*AVX512, "-mavx512bf16") if X86 else ()
OPTIONS = {
    f"slot_attention_{level}": ("-ffp-contract=fast", *options)
    for level, options in {"baseline": (), "avx2": AVX2, "avx512": AVX512, "avx512bf16": BF16}.items()
}


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
    folder.mkdir(parents=True)
    objects = []
    for source in sorted((ROOT / "kernels" / "csrc").glob("*.cpp")):
        objects.append(str(folder / source.with_suffix(".o").name))
        command = (*compiler, *flags, "-c", str(source), "-o", objects[-1])
        try:
            run(*command, *OPTIONS.get(source.stem, ()))
        except subprocess.CalledProcessError:
            if source.stem not in OPTIONS:
                raise
            run(*command)  # a compiler without these options: the file is then empty, or slower
    run(*compiler, "-shared", "-pthread", *objects, "-o", str(folder / LIBRARY))
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
            # a fresh folder: what cmake has cached holds only for the place and the compiler it was made with
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
        # Only known once everything was built: whether the wheel depends on the platform.
        self.root_is_pure = not os.path.exists(os.path.join(self.bdist_dir, "spot_kernels", LIBRARY))
        return "py3", "none", super().get_tag()[2]


setup(
    # no sources: BuildNative knows them; optional: setuptools then copies the result only where there is one
    ext_modules=[Extension("spot_kernels.libspot_native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
