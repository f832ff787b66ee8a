"""Stage 2's teacher: finds its run, inherits its settings, checks that it fits the student."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from spot_fast.checkpoints.runs import MODEL, find_folder, find_run, is_finished, load_run, read_config
from spot_fast.config import OPTIONS, Config, flag, option_names
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.recipes import METHODS

# What a student that begins as its teacher has in common with it: all that makes slot encoder and decoder, but for what
# has no weights. Drawn initial slots may become learned ones besides.
_MADE_OF = ("slot attention", "decoder")
_FREE = ("slot_iterations", "truncation", "cappa")


def find_teacher(
    name: str | None,
    root: Path,
    preset: str,
    method: str = "spot",
    encoder: str | None = None,
    image_size: int | None = None,
) -> Path:
    """The teacher's run folder: the one named, or the newest finished stage-1 run that can teach preset and method.

    encoder, image_size: preferred if runs have several. `check_teacher` checks whether the teacher fits.
    """
    if name is not None:
        folder = find_folder(name, root)
        read_config(folder)
        if not is_finished(folder):
            raise UserError(
                f"--teacher {folder} is not finished: finish it with python -m spot_fast.train --resume {folder}"
            )
        return folder
    try:
        return find_run(
            root,
            preset=preset,
            stage=1,
            methods=METHODS[method].teachers,
            encoder=encoder,
            image_size=image_size,
        )
    except UserError as error:
        raise UserError(f"stage 2 needs a teacher, but {error}") from None


def student_method(given: str | None, folder: Path, teacher: Config) -> str:
    """A student's method: `given`, or the one that its teacher implies; UserError if they do not fit."""
    if given is None:
        if METHODS[teacher.method].stage2 is not None:
            return teacher.method
        return "spot_mlp" if teacher.decoder == "mlp" else "spot"
    if teacher.method not in METHODS[given].teachers:
        raise UserError(
            f"the teacher {folder} was trained with method {teacher.method} but --method {given} needs "
            f"{' or '.join(METHODS[given].teachers)}: choose another --teacher, or name no method for a "
            "student with the teacher's decoder and orders"
        )
    return given


def inherit(config: Config, teacher: Config, given: Iterable[str]) -> tuple[Config, list[str]]:
    """`config` with the teacher's values of all inherited fields but those `given`, and the names that changed."""
    taken = {
        name: getattr(teacher, name)
        for name in option_names("inherited")
        if name not in set(given) and getattr(teacher, name) != getattr(config, name)
    }
    return replace(config, **taken), sorted(taken)


def check_teacher(folder: Path, teacher: Config, config: Config) -> None:
    """UserError if the teacher cannot teach a student of `config`; it names both values."""
    if teacher.stage != 1:
        raise UserError(f"--teacher {folder} is a stage-{teacher.stage} run: a teacher is a stage-1 run")
    for name in option_names("shared"):
        theirs, ours = getattr(teacher, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"the teacher {folder} has {name} {theirs} but {flag(name)} is {ours}: both need the "
                f"same {OPTIONS[name].shared}, drop the option or choose another --teacher"
            )
    if config.initial_weights != "teacher":
        return
    for name, option in OPTIONS.items():
        theirs, ours = getattr(teacher, name), getattr(config, name)
        same = theirs == ours or (name, theirs, ours) == ("slot_init", "gaussian", "learned")
        if option.group in _MADE_OF and name not in _FREE and not same:
            raise UserError(
                f"the teacher {folder} has {name} {theirs} but {flag(name)} is {ours}: a student that begins as its "
                "teacher needs the same, or --initial-weights xavier"
            )


def load_teacher(folder: Path, config: Config, encoder: Encoder, device: torch.device) -> Spot:
    """The teacher around the student's frozen `encoder`, in eval mode, without gradients."""
    check_teacher(folder, read_config(folder, like=config), config)
    return load_run(folder, device, encoder=encoder, like=config).model.requires_grad_(False)


def teacher_hash(folder: Path) -> str:
    """sha256 of the teacher's model file."""
    with open(folder if folder.is_file() else folder / MODEL, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
