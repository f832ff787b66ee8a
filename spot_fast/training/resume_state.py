"""What a run keeps on disk: the state from which it goes on, and the model at its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import MODEL, STATE, read_tensors, save_tensors
from spot_fast.errors import UserError
from spot_fast.training.optimiser import load_optimiser_tensors, optimiser_tensors
from spot_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from spot_fast.training.trainer import Trainer


def save(trainer: Trainer, folder: RunFolder) -> None:
    """Puts the present state in the place of the last one, unless it is not finite: then UserError."""
    tensors = {f"model.{name}": value for name, value in trainer.model.learned_state_dict().items()}
    tensors |= optimiser_tensors(trainer.optimiser, trainer.names)
    finite = torch.stack([value.isfinite().all().to(trainer.device) for value in tensors.values()])
    if not finite.all():
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise UserError(f"{name} is not finite after step {trainer.step}: {trainer.kept()}")
    tensors |= {
        "meter.interval": trainer.meter.interval,
        "meter.epoch": trainer.meter.epoch,
        "bad_steps": trainer.bad_steps.state,
    }
    trainer.loader.note_corrupt(trainer.world.corrupt_elsewhere())
    folder.write_corrupt(trainer.loader.corrupt)
    folder.sync()
    _write(
        trainer,
        folder,
        STATE,
        tensors,
        {
            "config": trainer.config.fingerprint(),
            "skipped": json.dumps(trainer.bad_steps.found),
            "images": str(len(trainer.train_set)),
            "seconds": f"{trainer.seconds:.1f}",
            "teacher_path": str(trainer.teacher_path.resolve()) if trainer.teacher_path else "",
            "threads": str(trainer.num_threads),
            "fixed_threads": "yes" if trainer.fixed_threads else "no",
            "device": trainer.device.type,
            "torch": torch.__version__,
            "processes": str(trainer.world.size),
            "sample": json.dumps(trainer.train_set.sample()),
        },
    )


def write_model(trainer: Trainer, folder: RunFolder) -> None:
    """The model file, whose presence says that the run is finished."""
    _write(trainer, folder, MODEL, trainer.model.learned_state_dict(), {"finished": "true"})


def _write(trainer: Trainer, folder: RunFolder, name: str, tensors: dict[str, Tensor], more: dict[str, str]) -> None:
    """A file of the run, with what every one of them says about it and `more`."""
    about = {
        "step": str(trainer.step),
        "stage": str(trainer.config.stage),
        "encoder": trainer.identity["name"],
        "encoder_sha256": trainer.identity["sha256"],
    }
    if trainer.teacher_path is not None:
        about |= {"teacher": trainer.teacher_path.name, "teacher_sha256": trainer.teacher_sha256}
    try:
        save_tensors(folder.path / name, tensors, about | more)
    except UserError as error:
        raise UserError(f"{error}; go on with python -m spot_fast.train --resume {folder.path}") from error


def restore(trainer: Trainer, folder: RunFolder) -> None:
    """Gives `trainer` the saved state; UserError where settings, data, encoder or teacher are not the same."""
    tensors, about = read_tensors(folder.path / STATE)
    for name, ours, what in (
        ("config", trainer.config.fingerprint(), "settings"),
        ("images", str(len(trainer.train_set)), "training images"),
        ("encoder_sha256", trainer.identity["sha256"], "encoder weights"),
        ("teacher_sha256", trainer.teacher_sha256 if trainer.teacher_path else "", "teacher"),
    ):
        if about.get(name, "") != ours:
            raise UserError(
                f"{folder.path} cannot be resumed: it began with other {what} "
                f"({about.get(name, '')[:12]}, now {ours[:12]}): restore them or train again"
            )
    _require_images(folder, json.loads(about.get("sample", "[]")), trainer.train_set.sample())
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    trainer.model.load_learned_state_dict(model)
    load_optimiser_tensors(trainer.optimiser, trainer.names, tensors)
    trainer.meter.interval.copy_(tensors["meter.interval"])
    trainer.meter.epoch.copy_(tensors["meter.epoch"])
    trainer.step = trainer.saved_step = int(about["step"])
    steps_per_epoch = trainer.loader.steps_per_epoch
    logged = max(trainer.step - trainer.step % every for every in (trainer.config.log_every, steps_per_epoch))
    trainer.bad_steps.restore(json.loads(about["skipped"]), tensors["bad_steps"], told=logged)
    trainer.seconds = float(about["seconds"])


def _require_images(folder: RunFolder, before: list[str], now: list[str]) -> None:
    """UserError where most of the training images that are compared hold something else than when the run began.

    They may lie elsewhere, and single ones may have been mended.
    """
    pairs = [pair for pair in zip(before, now, strict=False) if all(pair)]
    others = sum(was != content for was, content in pairs)
    if 2 * others > len(pairs):
        raise UserError(
            f"{folder.path} cannot be resumed: {others} of {len(pairs)} training images that were compared "
            "are not those it began with: give --data their folder or train again"
        )
