"""Packages that are missing or broken: one sentence with the package and what to install."""

import json
import sys

import pytest
import torch

from spot_fast.data.loading import dali_pipeline
from spot_fast.data.masks.instances import Instances
from spot_fast.errors import UserError
from spot_fast.model.timm_import import import_timm
from spot_fast.system.optional import required


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "raise OSError('libGL.so.1: cannot open shared object file')",
            "OSError: libGL.so.1: cannot open shared object",
        ),
        ("raise ValueError('numpy.dtype size changed')", "ValueError: numpy.dtype size changed"),
        ("raise AttributeError('_ARRAY_API not found')", "AttributeError: _ARRAY_API not found"),
        ("raise RuntimeError", "RuntimeError"),
        ("import a_package_that_it_needs", "ModuleNotFoundError: No module named 'a_package_that_it_needs'"),
        ("syntax error", "SyntaxError: invalid syntax"),
    ],
)
def test_a_broken_package_is_reported_with_its_reason(tmp_path, monkeypatch, line, words):
    (tmp_path / "broken_package.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        required("broken_package", "--plot", "broken")
    assert f"--plot needs broken_package, which is installed but cannot be imported ({words}" in str(caught.value)
    assert str(caught.value).endswith("): pip install --force-reinstall broken")


def test_a_missing_package_is_reported_without_one():
    with pytest.raises(UserError, match="^--plot needs no_such_package: pip install it$"):
        required("no_such_package.part", "--plot", "it")


def test_missing_pycocotools_is_reported_instead_of_the_annotation(tmp_path, monkeypatch):
    image = {"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}
    drawn = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": [image], "annotations": [drawn], "categories": [{"id": 1, "name": "x"}]}))
    instances = Instances(file)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    with pytest.raises(UserError, match="^drawing polygons needs pycocotools"):
        instances.label_maps(instances.images[0])


def test_a_broken_timm_and_a_broken_dali_are_sentences(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm cannot be imported .ModuleNotFoundError: .*pip install timm torchvision"):
        import_timm()

    def fail():
        raise ValueError("numpy.dtype size changed\nmore")

    monkeypatch.setattr(dali_pipeline, "import_dali", fail)
    assert dali_pipeline.unavailable(torch.device("cpu")) == (
        "DALI cannot be imported (ValueError: numpy.dtype size changed)"
    )
