"""The golden tensors: outputs of the official implementation, with the error that float32 itself makes on them.

`load(name)` reads one tensor by its key in `golden/index.json` (float16 files hold exact float32 weights: they come as
float32), `assert_close(name, value)` compares with the tolerance that the index states: 4 × float32_error +
1e-6 × max_abs for a float32 value, 2 × float32_error for a float64 one, exact for integers, labels and booleans. Both
take notes of what they were asked for, so that `test_golden_coverage.py` can say whether a stored tensor was forgotten.

Gradients are compared in float64: a ReLU input within rounding of zero (there is one of 9e-8 in `decoder.order_8`) is
on or off by chance in float32, and moves the gradient by a hundred times the rounding error.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1] / "golden"

loaded: set[str] = set()
compared: set[str] = set()


@functools.cache
def index() -> dict:
    """The whole of `golden/index.json`; `index()["tensors"]` maps a name to its file, shape, dtype and error."""
    return json.loads((ROOT / "index.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    return list(index()["tensors"])


@functools.cache
def _file(relative: str) -> dict[str, torch.Tensor]:
    path = ROOT / relative
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return load_file(path)


def load(name: str) -> torch.Tensor:
    """A fresh copy of the golden tensor `name`; KeyError when the index does not list it."""
    entry = index()["tensors"][name]
    stored = _file(entry["file"])
    # State-dict files are listed as FILE:KEY and the checkpoints' outputs with their folder's name in front.
    key = name if name in stored else name.split(":", 1)[-1].removeprefix("checkpoints/")
    loaded.add(name)
    tensor = stored[key]
    return tensor.float() if tensor.dtype == torch.float16 else tensor.clone()


def state_dict(prefix: str) -> dict[str, torch.Tensor]:
    """All tensors whose index name starts with `prefix`, keyed by what follows it: an official state dict."""
    return {name[len(prefix) :]: load(name) for name in names() if name.startswith(prefix)}


def stage1_state_dict() -> dict[str, torch.Tensor]:
    return state_dict("stage1_state_dict:")


def stage2_state_dict() -> dict[str, torch.Tensor]:
    stage1 = stage1_state_dict()
    aliases = index()["stage2_aliases"]
    return {key: stage1[old] for key, old in aliases.items()} | state_dict("stage2_student_state_dict:")


def tolerance(name: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest absolute difference allowed to an implementation that computes in `dtype`; 0 for integers."""
    entry = index()["tensors"][name]
    if not entry["dtype"].startswith("float"):
        return 0.0
    if entry.get("float32_error") is None:
        raise KeyError(f"{name} has no float32_error in the index: pass atol")
    if dtype == torch.float64 and entry["dtype"] == "float32":
        return 2 * entry["float32_error"] + 2**-24 * entry["max_abs"]  # the golden value itself is rounded to float32
    return 4 * entry["float32_error"] + 1e-6 * entry["max_abs"]


def assert_close(name: str, value: torch.Tensor, *, atol: float | None = None, where: torch.Tensor | None = None):
    """Fail unless `value` equals the golden tensor `name` in shape and within its tolerance.

    `atol` replaces the tolerance where the index gives none or another rule; `where` (bool, same shape) limits the
    comparison to the elements that are determined.
    """
    expected = load(name)
    value = torch.as_tensor(value).detach().cpu()
    compared.add(name)
    if value.numel() == expected.numel() == 1:
        value = value.reshape(expected.shape)
    assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, golden {tuple(expected.shape)}"
    if where is not None:
        value, expected = value[where], expected[where]
    limit = tolerance(name, value.dtype) if atol is None else atol
    if not value.numel():
        return
    assert bool(torch.isfinite(value.double()).all()), f"{name}: not finite"
    error = (value.double() - expected.double()).abs().max().item()
    assert error <= limit, f"{name}: differs by {error:.3g}, allowed {limit:.3g}"
