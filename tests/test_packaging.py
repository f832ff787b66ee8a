"""Protects the installs of spot-fast and of spot-kernels: dependencies are declared and pinned, a wheel holds all.

The builds use the setuptools of this environment (no isolation, no network) on a copy of the sources, so that nothing
an earlier build has left in the checkout can help.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spot_fast
import spot_kernels
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KERNELS = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"spot_fast": ROOT / "spot_fast", "spot_kernels": ROOT / "kernels" / "spot_kernels"}
# where a distribution is not named like what is imported
DISTRIBUTION = {"PIL": "pillow", "nvidia": "nvidia-dali-cuda130"}
# generated or built, and what no build needs
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", ".*", "*.egg-info", "libspot_native.*", "build", "dist", "runs", "tests", "bench"
)


def _files(pattern: str = "*.py") -> dict[str, Path]:
    """Name in the wheel → file of the packages that no build has made."""
    return {
        f"{package}/{path.relative_to(source).as_posix()}": path
        for package, source in SOURCES.items()
        for path in source.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("libspot_native")
    }


def _python(*arguments: str, cwd: Path, python: str | Path = sys.executable, **environment: str) -> str:
    """Standard output and error of a run that has to succeed, in an environment that leads to no checkout."""
    base = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX")}
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=base | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout}"
    return done.stdout


@pytest.fixture
def tree(tmp_path) -> Path:
    """The sources without what earlier builds and runs have left between them."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_OUT))


def _wheel(tree: Path, source: str = ".", **environment: str) -> tuple[Path, str]:
    out = tree.parent / f"wheels of {source}"
    words = ["-m", "pip", "wheel", f"./{source}", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out)]
    log = _python(*words, cwd=tree, **environment)
    (wheel,) = out.iterdir()
    return wheel, log


def _notes(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if "no native library" in line]


has_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")


def _imports(files: dict[str, Path]) -> dict[str, str]:
    """Top-level module → one of the files that import it."""
    imported = {}
    for file, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                imported.setdefault(name.split(".")[0], file)
    return imported


def test_every_import_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    names = [*PROJECT["project"]["dependencies"], *extras["dali"], *extras["float8"], *extras["onnx"]]
    declared = {re.split(r"[<>=!~\[; ]", name)[0].lower() for name in names}
    imported = _imports(_files())
    # triton comes with the torch builds that can use it
    known = {*sys.stdlib_module_names, *SOURCES, *declared, "triton"}
    assert {name: file for name, file in imported.items() if DISTRIBUTION.get(name, name) not in known} == {}


def test_spot_kernels_alone_requires_what_it_imports():
    """As spot-fast does, which contains it."""
    kernels = _imports({name: path for name, path in _files().items() if name.startswith("spot_kernels/")})
    required = {Requirement(line).name for line in KERNELS["project"]["dependencies"]}
    assert set(kernels) - {*sys.stdlib_module_names, "spot_kernels", "triton"} == required
    assert set(KERNELS["project"]["dependencies"]) <= set(PROJECT["project"]["dependencies"])
    assert KERNELS["project"]["requires-python"] == PROJECT["project"]["requires-python"]


def test_every_folder_with_python_files_is_a_package():
    """setuptools finds only folders that have an __init__.py."""
    assert {name for name, path in _files().items() if not (path.parent / "__init__.py").is_file()} == set()


def test_constraints_pin_what_an_install_needs():
    """The README's install passes constraints.txt: each requirement is pinned there, to a version that it allows."""
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    needed = map(
        Requirement, [*PROJECT["project"]["dependencies"], *(name for names in extras.values() for name in names)]
    )
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        if name not in ("setuptools", "wheel"):  # build requirements, which constraints do not concern
            assert name in pinned and requirement.specifier.contains(pinned[name]), (
                f"{requirement}: pin it in constraints.txt"
            )


def test_one_version():
    """Both distributions take it from spot_kernels."""
    version = spot_kernels.__version__
    assert spot_fast.__version__ == version
    for project in (PROJECT, KERNELS):
        assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "spot_kernels.__version__"}
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_one_licence():
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_readme_has_the_line_that_ci_runs():
    """`.ci/run` takes its test command from the README."""
    assert "pip install -c constraints.txt -e '.[test]' && python -m pytest" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_package_named_kernels_stays_importable(tmp_path):
    """The folder kernels/ is no package, so that it does not hide an installed one of that name."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("ORIGIN = 'installed'\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])
    assert _python("-c", "import kernels; print(kernels.ORIGIN)", cwd=tmp_path, PYTHONPATH=path) == "installed\n"


@pytest.mark.slow
@has_compiler
def test_wheel_works_from_another_folder(tree, tmp_path):
    wheel, log = _wheel(tree)
    assert _notes(log) == []
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("-any.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    library = {name for name in files if "libspot_native" in name}
    assert len(library) == 1
    # weights, templates and style sheets too
    assert {name for name in files if ".dist-info/" not in name} == {*_files("*"), *library}
    assert any(name.endswith("licenses/LICENSE") for name in files)

    site = tmp_path / "site"
    _python("-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(site)}
    assert f"\nnative library {site}" in _python("-m", "spot_kernels", **elsewhere)
    assert "--stage" in _python("-m", "spot_fast.train", "--help", **elsewhere)


def _required(*names: str) -> set[str]:
    """These distributions and all that they require, as installed here."""
    found, queue = set(), [canonicalize_name(name) for name in names]
    while queue:
        if (name := queue.pop()) not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or ())
            queue += [
                canonicalize_name(each.name)
                for each in needed
                if not each.marker or each.marker.evaluate({"extra": ""})
            ]
    return found


@pytest.fixture
def bare(tmp_path) -> Path:
    """The Python of a new environment with what spot-kernels requires, by links into this one, and nothing else."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    for name in _required(*(Requirement(line).name for line in KERNELS["project"]["dependencies"])):
        here = metadata.distribution(name)
        for top in {file.parts[0] for file in here.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(here.locate_file(top))
    return python


_RUN = """
from importlib.util import find_spec
import torch
from spot_kernels import SlotAttention, chosen_backend, linear_assignment
cost = 1 - torch.eye(3)[None]
print(*linear_assignment(cost).tolist(), chosen_backend("linear_assignment", cost))
slots, *_ = SlotAttention(8, 8, mlp_hidden=16)(torch.ones(1, 4, 8), torch.ones(1, 2, 8))
print(*slots.shape, find_spec("timm"), find_spec("spot_fast"))
"""


@pytest.mark.slow
@has_compiler
def test_spot_kernels_alone(tree, bare, tmp_path):
    """The wheel built from its source distribution runs with torch, numpy and scipy alone, and beside spot-fast's."""
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    source = _python("-c", build, cwd=tree / "kernels").splitlines()[-1]
    wheel, log = _wheel(tree, source)
    assert _notes(log) == []
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    (library,) = {name for name in files if "libspot_native" in name}
    assert files - {library} == {name for name in _files("*") if name.startswith("spot_kernels/")}

    def run(*words: str) -> str:
        return _python(*words, cwd=tmp_path, python=bare)

    install = ("-m", "pip", "--python", str(bare), "install", "--no-deps", "--force-reinstall")
    _python(*install, str(wheel), cwd=tmp_path)
    home, native = run("-m", "spot_kernels").splitlines()
    assert home.startswith(f"spot_kernels {spot_kernels.__version__} in {bare.parents[1]}")
    assert native.startswith(f"native library {bare.parents[1]}")
    assert run("-c", _RUN).splitlines() == ["[0, 1, 2] native", "1 2 8 None None"]

    _python(*install, str(_wheel(tree)[0]), cwd=tmp_path)
    *same, shared = run("-m", "spot_kernels").splitlines()
    assert same == [home, native]
    version = spot_kernels.__version__
    assert shared.startswith(f"spot-fast {version} and spot-kernels {version} share these files: ")


@pytest.mark.slow
def test_install_without_compiler(tree):
    """CMake and the direct call both fail: one line, and a wheel for every platform."""
    wheel, log = _wheel(tree, CXX="no-such-compiler")
    assert _notes(log) == [
        "spot_kernels: no native library, scipy and PyTorch are used instead (no-such-compiler not found)"
    ]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == set(_files())


@pytest.mark.slow
@has_compiler
def test_install_without_cmake(tree, tmp_path):
    """The compiler alone builds the library as well."""
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "cmake").write_text("#!/bin/sh\nexit 1\n")
    (broken / "cmake").chmod(0o755)
    wheel, log = _wheel(tree, PATH=f"{broken}{os.pathsep}{os.environ['PATH']}")
    assert _notes(log) == []
    assert any("libspot_native" in name for name in zipfile.ZipFile(wheel).namelist())


def test_installed_package_runs_from_another_folder(tmp_path):
    """Whichever way it was installed here; `.ci/run` installs it editable."""
    try:
        metadata.distribution("spot-fast")
    except metadata.PackageNotFoundError:
        pytest.skip("spot-fast is not installed: the tests run from the checkout")
    assert "native library" in _python("-m", "spot_kernels", cwd=tmp_path)
    assert "--stage" in _python("-m", "spot_fast.train", "--help", cwd=tmp_path)
