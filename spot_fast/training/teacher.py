"""Stage 2's teacher: finds its run, inherits its settings, checks that it fits the student."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spot_fast.checkpoints.runs import MODEL, find_folder, find_run, is_finished, load_run, read_config
from spot_fast.config import OPTIONS, Config, flag, option_names, with_own_orders
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.recipes import METHODS

# What a student that begins as its teacher has in common with it: all that makes slot encoder and decoder, but for what
# has no weights. Drawn initial slots may become learned ones besides.
_MADE_OF = ("slot attention", "decoder")
_FREE = (
    *("slot_iterations", "truncation", "adaptive_slots", "slot_variance"),
    *("cappa", "mlp_top_k", "masked_shown", "masked_drawn"),
)
# What a student without a stage-1 run has as that would have it.
_STAGE1_COURSE = ("epochs", "lr", "lr_low", "warmup_steps", "slot_rate", "initial_weights")
_AS_TEACHER = "a student that begins as its teacher needs the same, or --initial-weights xavier"


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
        return {"mlp": "spot_mlp", "masked": "spot_masked"}.get(teacher.decoder, "spot")
    if teacher.method not in METHODS[given].teachers:
        raise UserError(
            f"the teacher {folder} was trained with method {teacher.method} but --method {given} needs "
            f"{' or '.join(METHODS[given].teachers)}: choose another --teacher, or name no method for a "
            "student with the teacher's decoder and orders"
        )
    return given


def inherit(config: Config, teacher: Config, given: Iterable[str]) -> tuple[Config, list[str]]:
    """`config` with the teacher's values of all inherited fields but those `given`, and the names that changed."""
    given = set(given)
    taken = {
        name: getattr(teacher, name)
        for name in option_names("inherited")
        if name not in given and getattr(teacher, name) != getattr(config, name)
    }
    student = with_own_orders(replace(config, **taken), given)
    return student, sorted(name for name in taken if getattr(student, name) != getattr(config, name))


def one_run(config: Config, first: Config, given: Iterable[str]) -> Config:
    """A student's `config` without a stage-1 run: it trains as long, and from the same start, as `first` of stage 1."""
    values = {name: getattr(first, name) for name in _STAGE1_COURSE if name not in set(given)}
    return replace(config, **values)


def going_on(config: Config, first: Config, given: Mapping[str, Any]) -> Config:
    """The Config of a run that goes on with a run `first` of its stage.

    Model and training are those of `first`, for a tenth of its epochs, at least one, and of its warm-up, as in
    FT-DINOSAUR's high-resolution stage. The rest is as in `config`; its data too, but for the image size, if they are
    another set.
    """
    groups = ["run"] if config.preset == first.preset else ["run", "data"]
    own = {name for name, option in OPTIONS.items() if option.group in groups} - {"method", "stage", "image_size"}
    values = {name: getattr(config, name) for name in (*own, "init_from")}
    shorter = {"epochs": max(1, round(first.epochs / 10)), "warmup_steps": first.warmup_steps // 10}
    return replace(first, **(values | shorter | dict(given)))


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
    if config.initial_weights == "teacher" and config.init_from is None:
        _check_alike(f"the teacher {folder}", teacher, config, _AS_TEACHER)


def check_origin(folder: Path, origin: Config, config: Config) -> None:
    """UserError if a run of `config` cannot begin with the weights of the run in `folder`; it names both values."""
    about = f"--init-from {folder}"
    if origin.stage > config.stage:
        raise UserError(f"{about} is a student, whose encoder has trained: add --stage 2 or choose a stage-1 run")
    names = ("encoder", "pos_resize", "feature_norm", *(["train_blocks"] if origin.stage == 2 else []))
    for name in names:
        if getattr(origin, name) != getattr(config, name):
            raise UserError(
                f"{about} has {name} {getattr(origin, name)} but {flag(name)} is {getattr(config, name)}: drop the "
                "option or choose another run"
            )
    _check_alike(about, origin, config, "drop the option or choose another run")


def _check_alike(about: str, source: Config, config: Config, remedy: str) -> None:
    """UserError if slot encoder or decoder of `config` are made otherwise than those whose weights they begin with."""
    for name, option in OPTIONS.items():
        theirs, ours = getattr(source, name), getattr(config, name)
        same = theirs == ours or (name, theirs, ours) == ("slot_init", "gaussian", "learned")
        if option.group in _MADE_OF and name not in _FREE and not same:
            raise UserError(f"{about} has {name} {theirs} but {flag(name)} is {ours}: {remedy}")


def load_teacher(folder: Path, config: Config, encoder: Encoder, device: torch.device) -> Spot:
    """The teacher around the student's frozen `encoder`, in eval mode, without gradients."""
    check_teacher(folder, read_config(folder, like=config), config)
    return load_run(folder, device, encoder=encoder, like=config).model.requires_grad_(False)


def teacher_hash(folder: Path) -> str:
    """sha256 of the teacher's model file."""
    with open(folder if folder.is_file() else folder / MODEL, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
