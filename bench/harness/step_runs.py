"""Training steps to measure: the reference's and the trainer's own, on the same images with the same draws.

Images are generated scenes held in memory, encoders have random weights, and the teacher of stage 2 is an untrained
stage-1 model, written as the run that a trainer asks for. Settings are those of COCO but for two: features are
layer-normalised, because a random ViT's are so small that the loss would not notice a wrong target, and images are
not mirrored, which would only make the cache twice as large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from reference_step import ReferenceStep, Values
from torch import Tensor

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, save_tensors, write_config
from spot_fast.config import Config, preset
from spot_fast.data import Batch
from spot_fast.data.caching import feature_cache
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.training.console import Meter
from spot_fast.training.run_cache import frozen_fields
from spot_fast.training.trainer import Trainer

# What makes steps small: 16 tokens of 128 channels.
_TINY = dict(
    image_size=32,
    mask_size=32,
    encoder="spot_scenes",
    train_blocks=2,
    num_slots=3,
    slot_dim=16,
    slot_mlp=16,
    dec_blocks=2,
    dec_heads=4,
)
# What a teacher takes from its student's settings; the rest is stage 1's own.
_SHARED = (
    "preset",
    "encoder",
    "encoder_weights",
    "feature_norm",
    "image_size",
    "mask_size",
    "train_blocks",
    "num_slots",
    "slot_dim",
    "slot_mlp",
    "dec_blocks",
    "dec_heads",
    "batch_size",
)


def settings(stage: int, *, precision: str, batch_size: int, tiny: bool = False, **changes) -> Config:
    """ViT-B/16 at 224 px, or something small that takes no time. The first step's learning rate is 0."""
    config = replace(
        preset("coco", stage),
        preset="scenes",
        mask_size=224,
        encoder="vit_base_patch16_224",
        encoder_weights="none",
        feature_norm=True,
        flip=False,
        train_images=2 * batch_size,
        eval_images=0,
        batch_size=batch_size,
        epochs=500,
        warmup_steps=200,
        precision=precision,
        workers=0,
        loader="torch",
        cache="none",
        compile="no",
        cuda_graph="no",
    )
    return replace(config, **{**(_TINY if tiny else {}), **changes})


def write_teacher(folder: Path, config: Config) -> Path:
    """A finished stage-1 run that was never trained, for a student of `config`, in the new `folder`; returns it."""
    first = replace(preset("coco", 1), **{name: getattr(config, name) for name in _SHARED})
    encoder = frozen_encoder(first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Spot(first, encoder)
    folder.mkdir(parents=True)
    write_config(folder, first)
    about = encoder_metadata(encoder, first)
    save_tensors(folder / MODEL, model.learned_state_dict(), about)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a step computed: its loss, and all gradients before clipping, in one vector in the trainer's sequence."""

    loss: float
    gradients: Tensor

    def errors(self, exact: Outcome) -> tuple[float, float]:
        """Relative errors: of the loss, and of the gradients as the norm of their difference."""
        true = exact.gradients.double()
        apart = (self.gradients.to(true.device).double() - true).norm() / true.norm()
        return abs(self.loss / exact.loss - 1), apart.item()


class TrainerSteps:
    """Steps of the project's own trainer; cached: frozen features come from memory instead of images."""

    def __init__(
        self, config: Config, device: torch.device, teacher: Path | None = None, *, cached: bool = False
    ) -> None:
        self.trainer = Trainer(config, device=device, teacher=teacher)
        if cached:
            trainer = self.trainer
            fields = frozen_fields(
                config, trainer.forward, trainer.encoder_metadata["encoder_sha256"], trainer.loader.kind
            )
            trainer.cache = feature_cache.in_memory(
                trainer.loader, trainer.forward.frozen_features, fields, device, progress=False
            )
        self.batches = _batches(self.trainer)

    def next(self) -> None:
        """Takes a batch and trains on it."""
        self.trainer.train_step(next(self.batches))
        self.trainer.step += 1

    def restart(self) -> None:
        """The next batches are those of the trainer's present step, whatever came before."""
        self.batches = _batches(self.trainer)

    def first(self) -> Outcome:
        """The first step, with what it computed."""
        trainer = self.trainer
        trainer.meter = Meter(trainer.device)
        self.next()
        values = trainer.meter.read(trainer.meter.interval, 1)
        found = zip(trainer.optimiser.last_gradients(), trainer.parameters, strict=True)
        return Outcome(values["loss"], _gradients(found, values["grad_norm"], trainer.config.clip))


class ReferenceSteps:
    """Steps of the reference with the trainer's weights, images and draws.

    dtype: of weights and arithmetic; autocast: bfloat16 products as PyTorch chooses them, to know their error.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        teacher: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ) -> None:
        self.trainer = trainer = Trainer(config, device=device, teacher=teacher)
        self.dtype, self.autocast = dtype, autocast
        for model in (trainer.model, trainer.teacher):
            if model is not None:
                model.to(dtype)
        self.reference = ReferenceStep(trainer.model, trainer.teacher, att_weight=config.att_weight, clip=config.clip)
        self.batches = _batches(trainer)

    def next(self) -> Values:
        """Takes a batch and trains on it."""
        trainer = self.trainer
        images = normalise(next(self.batches).images.to(trainer.device)).to(self.dtype)
        draws = trainer.draw(trainer.step)
        order, teacher_order = (0 if index is None else int(index) for index in (draws.order, draws.teacher_order))
        noise, teacher_noise = (
            None if one is None else one.to(self.dtype) for one in (draws.noise, draws.teacher_noise)
        )
        with torch.autocast(trainer.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            values = self.reference.step(
                images, order, noise, teacher_order, teacher_noise, rate=trainer.rate(trainer.step)
            )
        trainer.step += 1
        return values

    def first(self) -> Outcome:
        """The first step, with what it computed."""
        values = self.next()
        found = ((parameter.grad, parameter) for parameter in self.reference.parameters)
        return Outcome(values.loss, _gradients(found, values.norm, self.reference.clip))


def _batches(trainer: Trainer) -> Iterator[Batch]:
    while True:
        yield from trainer.batches()


def _gradients(found: Iterable[tuple[Tensor | None, torch.nn.Parameter]], norm: float, clip: float) -> Tensor:
    """All gradients as one vector, with the clipping by `norm` undone; zeros for parameters without one."""
    flat = torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for grad, p in found])
    return flat * max(1.0, (norm + 1e-6) / clip)
