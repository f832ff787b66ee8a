"""Protects the folder for Hugging Face's `kernels`: it loads beside an installed spot_kernels and computes the same."""

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import build_hub
import spot_kernels
from paths import ROOT
from spot_kernels.reference import mask_matching

VARIANTS = ("torch-cpu", "torch-cuda", "torch-rocm")
SOURCE = "https://git.example/spot.git"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "out"
    assert build_hub.main([str(out), "--repo", "someone/spot-kernels", "--source", SOURCE]) == 0
    return out


@pytest.fixture(scope="module")
def variants(folder):
    """Folder → its metadata.json."""
    found = sorted((folder / "build").iterdir())
    assert tuple(variant.name for variant in found) == VARIANTS
    return {variant: json.loads((variant / "metadata.json").read_text(encoding="utf-8")) for variant in found}


def run(*words, **environment):
    """Standard output of a new Python."""
    path = [ROOT / "kernels", ROOT / "tests" / "support", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_import_of_the_package_is_relative_and_stays_inside(variants):
    for variant in variants:
        for file in variant.rglob("*.py"):
            depth = len(file.relative_to(variant).parts)
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level <= depth and (node.level or not node.module.startswith("spot_kernels")), file
                elif isinstance(node, ast.Import):
                    assert not [alias for alias in node.names if alias.name.startswith("spot_kernels")], file


def test_import_needs_pytorch_and_triton_alone(variants, monkeypatch):
    """`kernels` knows a few packages that a kernel may require; scipy is none of them."""
    imported = set()
    for file in next(iter(variants)).rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="on a CPU without the native library needs scipy: pip install scipy$"):
        mask_matching.linear_assignment(torch.zeros(1, 2, 2))


def test_folder_holds_python_and_metadata_alone(folder, variants):
    for variant, metadata in variants.items():
        files = {file.relative_to(variant).as_posix(): file for file in variant.rglob("*") if file.is_file()}
        hashes = metadata["digest"]["files"]
        assert set(files) == {*hashes, "metadata.json"} and {name.split(".")[-1] for name in hashes} == {"py"}
        for name, expected in hashes.items():
            assert base64.b64encode(hashlib.sha256(files[name].read_bytes()).digest()).decode() == expected
    others = {file.name: file for file in folder.iterdir() if file.name != "build"}
    assert set(others) == {"README.md", "LICENSE"}
    assert others["LICENSE"].read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_identifiers_are_unique_and_follow_the_sources(variants, tmp_path, monkeypatch):
    identifiers = [metadata["id"] for metadata in variants.values()]
    assert len(set(identifiers)) == len(VARIANTS) and all(map(str.isidentifier, identifiers))
    assert {metadata["version"] for metadata in variants.values()} == {int(spot_kernels.__version__.split(".")[0])}
    assert {metadata["upstream"] for metadata in variants.values()} == {SOURCE}

    changed = build_hub.sources()
    changed["checks.py"] += "# another version\n"
    monkeypatch.setattr(build_hub, "sources", lambda: changed)
    build_hub.write_variant(tmp_path / "again", "cpu", "")
    again = json.loads((tmp_path / "again" / "metadata.json").read_text(encoding="utf-8"))
    assert again["id"] not in identifiers


@pytest.mark.parametrize("loader", ["importlib", pytest.param("kernels", marks=pytest.mark.slow)])
def test_two_copies_beside_the_installed_package_compute_the_same(folder, loader):
    if loader == "kernels":
        pytest.importorskip("kernels.layer", reason="needs Hugging Face's package: pip install kernels")
    assert run(ROOT / "tests" / "support" / "hub_copies.py", folder, loader).startswith("equal: _spot_kernels_cpu_")


def test_card_says_what_it_is_and_its_example_runs(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    head, text = re.fullmatch(r"---\n(.*?)---\n(.*)", card, re.S).groups()
    assert head.startswith("library_name: kernels\nlicense: apache-2.0\ntags:\n- kernel\n")
    assert all(f"`{name}`" in text for name in spot_kernels.__all__)
    assert SOURCE in text and "{" not in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert 'get_kernel("someone/spot-kernels", version=0' in example
    pytest.importorskip("kernels.layer", reason="needs Hugging Face's package: pip install kernels")
    printed = run("-c", f"{example}\nprint(*slots.shape)", LOCAL_KERNELS=f"someone/spot-kernels={folder}")
    assert printed == "2 7 256\n"


def test_only_names_of_the_package_are_renamed():
    text = '''"""Explains spot_kernels::step, é."""
from spot_kernels import checks
from spot_kernels.gpu import (
    launch,
)
from spot_kernels_of_others import x


@operator("spot_kernels::step")  # é
def step():
    from spot_kernels.reference.step import step as plain

    "é", torch.ops.spot_kernels.step, other.ops.spot_kernels, "about spot_kernels::step"
'''
    expected = {
        "from spot_kernels import": "from .. import",
        "from spot_kernels.gpu import": "from ..gpu import",
        'operator("spot_kernels::step")': 'operator("_ours::step")',
        "from spot_kernels.reference.step": "from ..reference.step",
        "torch.ops.spot_kernels": "torch.ops._ours",
    }
    renamed = text
    for old, new in expected.items():
        renamed = renamed.replace(old, new)
    assert build_hub.renamed("gpu/step.py", text, "_ours") == renamed
    assert "from . import checks" in build_hub.renamed("step.py", text, "_ours")
    with pytest.raises(ValueError, match="^gpu/step.py:1: import spot_kernels has no relative form: use from"):
        build_hub.renamed("gpu/step.py", "import spot_kernels.checks\n", "_ours")


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert refusal(capsys, str(tmp_path)) == f"OUT is {tmp_path}, which exists and is no empty folder: name a new one"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_names_that_kernels_would_refuse_are_refused(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert refusal(capsys, out, "--repo", "kernels") == "--repo is 'kernels': name it as on the hub, ORG/NAME"
    told = "--source is 'here': pass an address that begins with https://"
    assert refusal(capsys, out, "--source", "here") == told
    assert not list(tmp_path.iterdir())


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        build_hub.main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().split("error: ")[1]
