"""The state from which a run can be resumed, and its model at the end: tensors and facts (texts by name) on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import MODEL, STATE, read_tensors, save_tensors
from spot_fast.errors import UserError


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], *, kept: str) -> None:
    """Replaces the state in run folder `path`. kept: end of the UserError about a tensor that is not finite."""
    # One transfer to the host instead of one a tensor; Adam's step counts may be on another device.
    device = next(iter(tensors.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in tensors.values()])
    if not finite.all():
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise UserError(f"{name} is not finite after step {facts['step']}: {kept}")
    _write(path, STATE, tensors, facts)


def write_model(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes the model file, whose presence marks the run as finished."""
    _write(path, MODEL, tensors, {**facts, "finished": "true"})


def _write(path: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    try:
        save_tensors(path / name, dict(tensors), dict(facts))
    except UserError as error:
        raise UserError(f"{error}; go on with python -m spot_fast.train --resume {path}") from error


def read_state(path: Path, facts: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of the saved state.

    UserError if its settings, data, encoder or teacher are not those of the present run, given by its `facts`.
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
    # Most of the sampled images must be the same. Their folder may have moved, single ones may have been repaired.
    pairs = zip(json.loads(saved["sample"]), json.loads(facts["sample"]), strict=False)
    same = [before == now for before, now in pairs if before and now]
    if 2 * same.count(False) > len(same):
        raise UserError(
            f"{path} cannot be resumed: {same.count(False)} of {len(same)} training images that were compared "
            "are not those it began with: give --data their folder or train again"
        )
    return tensors, saved
