"""Segments with an ONNX file that `spot_fast.export` wrote, by ONNX Runtime on the CPU; the run is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spot_fast.errors import UserError, one_line
from spot_fast.segmentation.exported_model import INPUT, MASKS, SLOTS, ExportedModel
from spot_fast.segmentation.files import stamp_of
from spot_fast.segmentation.segmenter import Segment, Segmenter, Segments
from spot_fast.system.optional import required

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INSTALL = "onnx onnxscript onnxruntime"


def open_session(path: Path, threads: int) -> InferenceSession:
    """The file in ONNX Runtime. UserError where it is missing, no ONNX, or of operators that are unknown there."""
    onnxruntime = required("onnxruntime", f"the ONNX file {path}", INSTALL)
    if not path.is_file():
        raise UserError(f"{path} is not a file: write it with python -m spot_fast.export RUN OUT")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise UserError(
            f"{path} cannot be run as ONNX ({one_line(error)}): write it anew with python -m spot_fast.export RUN OUT"
        ) from error


def run_session(session: InferenceSession, images: Tensor) -> dict[str, Tensor]:
    """uint8 [B, 3, S, S] → every output by name."""
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {INPUT: images.numpy()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


def onnx_segmenter(path: Path, threads: int) -> tuple[Segmenter, ExportedModel]:
    """A segmenter on the model's own grid only, and what the file says about its model."""
    session = open_session(path, threads)
    about = ExportedModel.of_metadata(session.get_modelmeta().custom_metadata_map, str(path))

    def segment(images: Tensor) -> Segments:
        results = run_session(session, images)
        return Segments({kind: results[MASKS[kind]] for kind in about.kinds}, results[SLOTS])

    def segment_at(height: int, width: int) -> Segment:
        raise ValueError(f"an ONNX file has one grid of patches, not {height} x {width}")

    title, identity = f"{path} of {about.title}", f"onnx {path.resolve()}"
    sizes = about.image_size, about.patch_size
    segmenter = Segmenter(about.kinds, *sizes, "cpu", title, identity, segment, segment_at, stamp_of(path))
    return segmenter, about
