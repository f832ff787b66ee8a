"""A model as a folder that can be moved and shared: written by `save_pretrained`, read by `load_run`.

It holds `config.json` (without local paths), `model.safetensors` (the learned tensors), a model card, and in
`encoder.safetensors` the frozen encoder's weights unless they are packaged or on the hub.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spot_fast.checkpoints.encoder_weights import encoder_metadata, stored_weights
from spot_fast.checkpoints.model_card import card
from spot_fast.checkpoints.runs import METRICS, MODEL, read_tensors, save_tensors, write_config
from spot_fast.errors import UserError
from spot_fast.files import atomic_write, reason
from spot_fast.model.spot import Spot

ENCODER = "encoder.safetensors"
# Tensors of an authors' checkpoint that its model does not use, kept so that converting back gives the same file.
UNUSED = "authors_unused.safetensors"
CARD = "README.md"


def save_pretrained(
    model: Spot,
    folder: str | os.PathLike,
    *,
    origin: Path | None = None,
    scores: Mapping[str, float] | None = None,
    vit: Mapping[str, Tensor] | None = None,
    unused: Mapping[str, Tensor] | None = None,
    source: str | None = None,
) -> Path:
    """Writes `model` to a new `folder`, whole or not at all.

    origin: run or folder that the model was loaded from.
    scores: for the card, fractions by name; by default the last validation of `origin`.
    vit: the frozen encoder's weights before positions were resampled (timm's names); by default those of their file,
        and none if they are packaged or on the hub.
    unused: tensors for `UNUSED`; by default those of `origin`.
    source: of the model, for the card.

    UserError if `folder` exists or cannot be written, or the model is not in float32.
    """
    folder, config = Path(folder), model.config
    check_free(folder)
    if others := {value.dtype for value in model.parameters()} - {torch.float32}:
        raise UserError(f"the model has weights in {others.pop()}, files are float32: save it after model.float()")
    include = vit is not None or config.encoder_weights not in (None, "hub")
    weights = ENCODER if include else config.encoder_weights
    config = replace(config, data=None, sbd=None, cache_dir=None, init_from=None, encoder_weights=weights)
    if include and vit is None:
        vit = _stored_weights(model)
    unused = unused_of(origin) if unused is None else unused
    metadata = encoder_metadata(model.encoder, config) | {"stage": str(config.stage), "finished": "true"}
    scores = scores if scores is not None else last_scores(origin)
    text = card(config, scores or {}, metadata["encoder_sha256"], included=include, source=source)
    # Written beside its final name and renamed, so that a failure leaves no half-written model.
    partial = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if include:
            save_tensors(partial / ENCODER, _on_cpu(vit), {"encoder": config.encoder})
        if unused:
            save_tensors(partial / UNUSED, _on_cpu(unused), {})
        write_config(partial, config)
        atomic_write(partial / CARD, lambda path: path.write_text(text, encoding="utf-8"))
        save_tensors(partial / MODEL, _on_cpu(model.learned_state_dict()), metadata)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}): choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _stored_weights(model: Spot) -> Mapping[str, Tensor]:
    """The frozen encoder's weights in its file, or the model's own if the file does not exist any more."""
    try:
        return stored_weights(model.config) or model.encoder.vit.state_dict()
    except UserError:
        return model.encoder.vit.state_dict()


def check_free(path: Path) -> None:
    """UserError if `path` exists, unless it is an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists and is not overwritten: choose a name that is free")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies, because safetensors refuses two names that share memory.
    return {
        name: torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
        for name, value in tensors.items()
    }


def unused_of(origin: Path | None) -> dict[str, Tensor]:
    """The tensors in a folder's `UNUSED` file, if it has one."""
    path = origin and origin / UNUSED
    return read_tensors(path)[0] if path and path.is_file() else {}


def last_scores(run: Path | None) -> dict[str, float]:
    """The last validation in a run folder's metrics; empty without one."""
    path = run and run / METRICS
    if not path or not path.is_file():
        return {}
    scores: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if record.get("kind") == "validation":
            scores = {
                name: value
                for name, value in record.items()
                if name not in ("kind", "step", "epoch") and isinstance(value, float)
            }
    return scores
