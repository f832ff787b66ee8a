"""Protects the install: dependencies are declared and pinned, and a wheel holds everything.

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
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
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


def _python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output and error of a run that has to succeed, in an environment that leads to no checkout."""
    base = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX")}
    done = subprocess.run(
        [sys.executable, *arguments],
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


def _wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    out = tree.parent / "wheels"
    words = ["-m", "pip", "wheel", ".", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out)]
    log = _python(*words, cwd=tree, **environment)
    (wheel,) = out.iterdir()
    return wheel, log


def _notes(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if "no native library" in line]


has_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")


def test_every_import_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    names = [*PROJECT["project"]["dependencies"], *extras["dali"], *extras["float8"], *extras["onnx"]]
    declared = {re.split(r"[<>=!~\[; ]", name)[0].lower() for name in names}
    imported = {}
    for file, path in _files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                imported.setdefault(name.split(".")[0], file)
    # triton comes with the torch builds that can use it
    known = {*sys.stdlib_module_names, *SOURCES, *declared, "triton"}
    assert {name: file for name, file in imported.items() if DISTRIBUTION.get(name, name) not in known} == {}


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
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


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
    assert _python("-m", "spot_kernels", **elsewhere).startswith(f"native library {site}")
    assert "--stage" in _python("-m", "spot_fast.train", "--help", **elsewhere)


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
