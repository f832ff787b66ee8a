"""What a run keeps on disk: the state from which it can be resumed, and the model at its end.

The trainer gives and takes tensors and facts (texts by name); nothing here knows the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import MODEL, STATE, read_tensors, save_tensors
from spot_fast.errors import UserError


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], *, kept: str) -> None:
    """Replaces the state in run folder `path`. kept: ends the UserError about a tensor that is not finite."""
    # One transfer to the host instead of one a tensor; Adam's step counts may lie on another device.
    device = next(iter(tensors.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in tensors.values()])
    if not finite.all():
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise UserError(f"{name} is not finite after step {facts['step']}: {kept}")
    _write(path, STATE, tensors, facts)


def write_model(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes the model file, whose presence says that the run is finished."""
    _write(path, MODEL, tensors, {**facts, "finished": "true"})


def _write(path: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    try:
        save_tensors(path / name, dict(tensors), dict(facts))
    except UserError as error:
        raise UserError(f"{error}; go on with python -m spot_fast.train --resume {path}") from error


def read_state(path: Path, facts: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of the saved state.

    UserError where its settings, data, encoder or teacher are not those of the run at hand, given by its `facts`.
    """
    tensors, saved = read_tensors(path / STATE)
    for name, what in (
        ("config", "settings"),
        ("images", "training images"),
        ("encoder_sha256", "encoder weights"),
        ("teacher_sha256", "teacher"),
    ):
        before, now = saved.get(name, ""), facts.get(name, "")
        if before != now:
            raise UserError(
                f"{path} cannot be resumed: it began with other {what} ({before[:12]}, now {now[:12]}): "
                "restore them or train again"
            )
    _require_same_images(path, json.loads(saved["sample"]), json.loads(facts["sample"]))
    return tensors, saved


def _require_same_images(path: Path, before: list[str], now: list[str]) -> None:
    """UserError where most of the sampled training images have changed since the run began.

    The folder may have moved, and single images may have been repaired.
    """
    pairs = [pair for pair in zip(before, now, strict=False) if all(pair)]
    changed = sum(was != content for was, content in pairs)
    if 2 * changed > len(pairs):
        raise UserError(
            f"{path} cannot be resumed: {changed} of {len(pairs)} training images that were compared "
            "are not those it began with: give --data their folder or train again"
        )
