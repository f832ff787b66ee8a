"""Protects the import of timm beside a torchvision that was built for another torch."""

import os
import subprocess
import sys


def test_timm_imports_beside_a_torchvision_that_lacks_its_operators(tmp_path):
    """A torchvision whose compiled part does not load stops at its first shape rule; the names must be declared."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *a: None)\n"
    )
    timm = tmp_path / "timm"
    timm.mkdir()
    (timm / "__init__.py").write_text("import torchvision\nmark = 'imported'\n")
    code = "from spot_fast.model.timm_import import import_timm; print(import_timm().mark)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.stdout.strip() == "imported", done.stderr
