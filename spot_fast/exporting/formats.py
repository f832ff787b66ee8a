"""The formats: how a file of each is written and run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spot_fast.errors import UserError
from spot_fast.segmentation.exported_model import INPUT, ExportedModel, outputs
from spot_fast.segmentation.onnx_segmenter import INSTALL, open_session, run_session
from spot_fast.system.optional import required

Runner = Callable[[Tensor], dict[str, Tensor]]  # uint8 images [B, 3, S, S] → outputs by name
METADATA = "spot_fast.json"  # in a .pt2
_LARGEST = 2**31 - 2**20  # bytes of weights in one ONNX file, whose limit is 2 GiB with the graph


@dataclass(frozen=True)
class Format:
    """write: a traced model to a file. open: the file as a `Runner` on so many threads."""

    file: str
    write: Callable[[ExportedProgram, ExportedModel, Path], None]
    open: Callable[[Path, int], Runner]


def _write_pt2(program: ExportedProgram, about: ExportedModel, path: Path) -> None:
    torch.export.save(program, path, extra_files={METADATA: json.dumps(about.metadata())})


def _open_pt2(path: Path, threads: int) -> Runner:
    return torch.export.load(path).module()


def require_onnx() -> None:
    """UserError where a package is missing that writes or runs ONNX files."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        required(package, "--formats onnx", INSTALL)


def _write_onnx(program: ExportedProgram, about: ExportedModel, path: Path) -> None:
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    if weights > _LARGEST:
        raise UserError(f"--formats onnx: {weights / 1e9:.1f} GB of weights do not fit into one file: use pt2 alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        exported = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=outputs(about.kinds), verbose=False
        )
    exported.model.metadata_props.update(about.metadata())
    exported.save(path, external_data=False)


def _open_onnx(path: Path, threads: int) -> Runner:
    session = open_session(path, threads)
    return lambda images: run_session(session, images)


FORMATS = {
    "pt2": Format("model.pt2", _write_pt2, _open_pt2),
    "onnx": Format("model.onnx", _write_onnx, _open_onnx),
}
