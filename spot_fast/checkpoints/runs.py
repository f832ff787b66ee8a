"""Run folders: their files, their models, and which of them a user means.

A run folder holds `config.json`, `metrics.jsonl`, `training_state.safetensors` (everything a resumed run needs),
`tensorboard/` and, once training is finished, `model.safetensors`: the learned tensors, with name and hash of the
frozen encoder's weights.

`load_run` also takes a folder saved to be shared (`shared_folder`), which can hold the encoder's weights, and a
checkpoint file of the authors' implementation (`official`).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.file_kinds import file_problem
from spot_fast.checkpoints.hub import hub_folder
from spot_fast.checkpoints.official import assumptions, infer_config, learned_tensors
from spot_fast.checkpoints.third_party import recognise
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.files import atomic_write, reason
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot

CONFIG = "config.json"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
STATE = "training_state.safetensors"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # owner/name or owner/name@revision
_announced: set[Path] = set()  # checkpoint files whose assumptions have been printed


@dataclass(frozen=True)
class Run:
    """A finished run: its model in eval mode, metadata as in `model.safetensors`."""

    path: Path
    config: Config
    model: Spot
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically."""
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial, dict(metadata))
        # safetensors creates files that only their owner can read: they get the permissions of the umask, which can
        # only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        with suppress(OSError):  # a file system without permissions
            os.chmod(partial, 0o666 & ~mask)

    atomic_write(path, write)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if problem := file_problem(path):
            raise UserError(f"{path} {problem}") from error
        raise UserError(f"{path} cannot be read ({reason(error)}): it is damaged, use another run") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file; UserError if it is damaged."""
    with _reading(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    with _reading(path) as file:
        return file.metadata() or {}


def write_config(folder: Path, config: Config) -> None:
    atomic_write(folder / CONFIG, lambda partial: partial.write_text(config.to_json(), encoding="utf-8"))


def read_config(folder: Path, *, like: Config | None = None) -> Config:
    """The Config of a run folder or checkpoint file; UserError if it is missing or cannot be used.

    encoder_weights becomes the absolute path of a file in the folder. like: gives the preset and the number of gaussian
    slots, which a checkpoint file does not show.
    """
    if folder.is_file():
        return _file_config(folder, like)
    if not folder.is_dir():
        raise UserError(f"run {folder} is not a folder: give the folder of a run, such as runs/scenes-stage1-001")
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is not the folder of a run")
    try:
        config = Config.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        problem = str(error)
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            problem = file_problem(path, "JSON", text=True) or "not JSON"
        raise UserError(f"{path} cannot be used ({problem}): restore it or train again") from error
    weights = folder / (config.encoder_weights or "")
    return replace(config, encoder_weights=os.path.abspath(weights)) if weights.is_file() else config


def _file_config(path: Path, like: Config | None) -> Config:
    """The Config of a checkpoint file of the authors, which holds its encoder's weights."""
    contents = read_checkpoint(path)
    if kind := recognise(contents):
        raise UserError(f"{path} is a checkpoint of {kind}, not of the authors: python -m spot_fast.convert {path} OUT")
    config = infer_config(contents, preset=like and like.preset)
    if like and config.slot_init == "gaussian":
        config = replace(config, num_slots=like.num_slots)
    return replace(config, encoder_weights=os.path.abspath(path))


def _print_assumptions(path: Path, config: Config) -> None:
    if path not in _announced:
        _announced.add(path)
        print(
            f"note: the tensors of {path} do not show all settings, assumed are {', '.join(assumptions(config))}: if "
            f"that is wrong, set them with python -m spot_fast.convert {path} OUT",
            file=sys.stderr,
            flush=True,
        )


def is_finished(folder: Path) -> bool:
    """Whether a run folder has a trained model; a checkpoint file always has."""
    return folder.is_file() or (folder / MODEL).is_file()


def load_run(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    encoder: Encoder | None = None,
    like: Config | None = None,
    model_class: type[Spot] = Spot,
) -> Run:
    """The finished run in folder `path`, or the model in checkpoint file `path`, on `device` in eval mode.

    encoder: shared instead of built anew. like: see `read_config`. UserError if the run is missing, unfinished or
    damaged, or if the encoder's weights are not those that it was trained with.
    """
    folder = Path(path)
    config = read_config(folder, like=like)
    if not is_finished(folder):
        raise UserError(f"run {folder} is not finished: go on with python -m spot_fast.train --resume {folder}")
    file = folder if folder.is_file() else folder / MODEL
    if folder.is_file():
        own = frozen_encoder(config)
        tensors, metadata = learned_tensors(folder, config), encoder_metadata(own, config)
        encoder = encoder or own
        _print_assumptions(folder, config)
    else:
        tensors, metadata = read_tensors(file)
        encoder = encoder or frozen_encoder(config)
    # With other features the learned tensors mean nothing.
    sha256, trained_with = encoder.weights_hash(), metadata.get("encoder_sha256", "none")
    if sha256 != trained_with:
        raise UserError(
            f"run {folder} was trained with encoder {metadata.get('encoder')} of sha256 {trained_with[:12]}, but the "
            f"weights found for {config.encoder} have {sha256[:12]}: restore the file named by encoder_weights in its "
            f"{CONFIG}"
        )
    model = model_class(config, encoder)
    try:
        model.load_learned_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{file} does not fit its {CONFIG}: {error}") from error
    return Run(folder, config, model.to(device).eval(), metadata)


def run_folders(root: str | os.PathLike = "runs") -> Iterator[tuple[Path, Config]]:
    """Every run below `root` with its Config, most recently written first; damaged ones are skipped."""
    folders = []
    for file in Path(root).glob(f"*/{CONFIG}"):
        folder = file.parent
        latest = max(path.stat().st_mtime_ns for path in (file, folder / STATE, folder / MODEL) if path.exists())
        folders.append((latest, folder))
    for _, folder in sorted(folders, reverse=True):
        try:
            yield folder, read_config(folder)
        except UserError:
            continue


def find_run(
    root: str | os.PathLike = "runs",
    *,
    preset: str | None = None,
    stage: int | None = None,
    methods: Sequence[str] = (),
    encoder: str | None = None,
    image_size: int | None = None,
    finished: bool = True,
) -> Path:
    """The newest finished (or unfinished) run below `root`, optionally of one preset, one stage and some methods.

    Runs with `encoder`, of them those with `image_size`, are preferred. UserError, which names the first method,
    without a run.
    """
    runs = [
        folder
        for folder, config in run_folders(root)
        if preset in (None, config.preset)
        and stage in (None, config.stage)
        and (not methods or config.method in methods)
    ]
    fitting = [folder for folder in runs if is_finished(folder) == finished]
    if fitting:

        def agrees(folder: Path) -> tuple[bool, bool]:
            config = read_config(folder)
            return encoder in (None, config.encoder), image_size in (None, config.image_size)

        return max(fitting, key=agrees)  # of equals the first, which is the newest
    wanted = " ".join(["finished" if finished else "unfinished", *(["stage", str(stage)] if stage else []), "run"])
    if preset and methods and methods[0] != "spot":
        preset += f"+{methods[0]}"
    wanted += f" of preset {preset}" if preset else ""
    if finished and runs:
        raise UserError(
            f"there is no {wanted} in {root}: finish {runs[0].name} with python -m spot_fast.train --resume {runs[0]}"
        )
    command = f"python -m spot_fast.train --stage {stage or 1}" + (f" --preset {preset}" if preset else "")
    raise UserError(f"there is no {wanted} in {root}: train one with {command}")


def find_folder(name: str | os.PathLike, root: str | os.PathLike = "runs") -> Path:
    """The run that a user names by its path, its name below `root`, or, without a local folder `owner`, by its
    `owner/name` on the hub."""
    below, path = Path(root) / name, Path(name)
    if not path.exists() and below.is_dir():
        return below
    if not path.exists() and not path.parent.exists() and _HUB_ID.fullmatch(str(name)):
        return hub_folder(str(name), (CONFIG, MODEL))
    return path


def open_runs(names: Sequence[str], root: str | os.PathLike) -> list[Run]:
    """The runs that a user names, or the newest finished one below `root`, all on the CPU.

    All are opened before any is used: a missing one should not cost the minutes that the others take.
    """
    return [load_run(path) for path in [find_folder(name, root) for name in names] or [find_run(root)]]
