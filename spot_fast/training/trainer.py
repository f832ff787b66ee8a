"""Training of both stages: one loop, from which a killed run continues bit for bit.

Nothing random is carried from step to step: patch orders, slot noise, the sequence of images, the schedules are all
functions of (seed, step). So the state of a run is its weights, Adam's moments and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.checkpoints.runs import STATE
from spot_fast.config import Config
from spot_fast.data import Batch, open_set
from spot_fast.data.caching import feature_cache
from spot_fast.data.loading import prefetch
from spot_fast.data.loading.loaders import open_loader
from spot_fast.errors import UserError
from spot_fast.model.encoder import encoder_identity, normalise
from spot_fast.model.spot import Spot, reconstruction_loss
from spot_fast.nested import map_tensors
from spot_fast.precision import autocast, float32_products, resolve, store_in_bfloat16
from spot_fast.recipes import timm_name
from spot_fast.system.cpu_threads import CpuThreads
from spot_fast.system.interrupt import StopRequest
from spot_fast.training import float8
from spot_fast.training import resume_state as run_state
from spot_fast.training.bad_steps import BadSteps, skipped_line, too_many
from spot_fast.training.compiled import Compiled, resolve_compile
from spot_fast.training.console import Display, Meter, Pace, epoch_line
from spot_fast.training.cuda_graph import Graphed, Recorder, resolve_cuda_graph
from spot_fast.training.distributed import Ended, World
from spot_fast.training.losses import attention_loss, teacher_labels
from spot_fast.training.optimiser import adam, clip_by_infinity_norm, set_learning_rate, update
from spot_fast.training.run_cache import Chosen, choose, open_source
from spot_fast.training.run_folder import RunFolder
from spot_fast.training.schedule import attention_weight, learning_rate
from spot_fast.training.teacher import load_teacher, teacher_hash
from spot_fast.training.throughput import Profile, Throughput, count_flops
from spot_fast.training.validation import quick_validation, skipped_images_line

# Streams of random numbers: the first word after the seed.
_WEIGHTS, _STEP, _PARALLEL = range(100, 103)
_SAVE_SECONDS = 300


@dataclass(frozen=True)
class Draws:
    """What is drawn for one step; orders are int64 [] on the device, noise [B, K, U]; None where nothing is needed."""

    order: Tensor | None
    noise: Tensor | None
    teacher_order: Tensor | None
    teacher_noise: Tensor | None
    parallel: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or asked to stop at `step`; the seconds it took and its last quick validation."""

    finished: bool
    step: int
    total_steps: int
    seconds: float
    scores: dict[str, float]


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class Trainer:
    """A run of `config` on `device`; stage 2 needs its teacher's folder. UserError where something is missing.

    Of several processes (`world`) each has a Trainer, for its share of every batch; all call the same methods.
    fixed_threads: their number stays as it is, also on a CPU that other programs use.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device,
        teacher: Path | None = None,
        world: World | None = None,
        fixed_threads: bool = True,
    ) -> None:
        self.device, self.teacher_path, self.world = device, teacher, world or World()
        self.precision = resolve(config.precision, device)
        self.train_set = open_set(config, "train")
        self.val_set = open_set(config, "val") if config.eval_images else None
        loader = config.loader
        if loader == "auto" and self.train_set.random_crop and config.cache in ("auto", "pixels"):
            loader = "torch"  # whole images are decoded once, by Pillow
        self.loader, self.decoding = open_loader(
            loader,
            self.train_set,
            config.batch_size,
            config.seed,
            config.workers,
            device,
            self.world.rank,
            self.world.size,
        )
        unasked = {name for name in ("compile", "cuda_graph") if getattr(config, name) == "auto"}
        graph = resolve_cuda_graph(config.cuda_graph, device, self.world.size)
        self.config = config = replace(config, loader=self.loader.kind, compile=resolve_compile(config.compile, device))
        share = config.batch_size // self.world.size
        if share % config.accumulate:
            raise UserError(
                f"--accumulate {config.accumulate} does not divide the {share} images of a process: use "
                f"a divisor of {share}"
            )
        self.rate = learning_rate(config, len(self.train_set))
        self.total_steps = self.rate.total_steps

        encoder = frozen_encoder(config).to(device)
        self.identity = encoder_identity(encoder, config)
        self.teacher = None if teacher is None else load_teacher(teacher, config, encoder, device)
        self.teacher_sha256 = "" if teacher is None else teacher_hash(teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(config.seed, _WEIGHTS, config.stage))
            self.model = Spot(config, encoder).to(device).train()
        if self.precision == "bf16":
            store_in_bfloat16(encoder)
            if self.teacher is not None:
                store_in_bfloat16(self.teacher.decoder)
        self.float8_layers = 0  # until their error has been told
        if config.float8:
            if self.precision != "bf16":
                raise UserError(f"--float8 belongs to --precision bf16, not {self.precision}: leave one out")
            float8.require(device)
            self.float8_layers = float8.convert(self.model.decoder)
        self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.optimiser = adam(self.parameters, graphed=graph == "yes")
        self.gradients = self.world.gradients(self.parameters)
        self.generator = torch.Generator(device)
        self.chosen: Chosen | None = None
        self.cache: feature_cache.FeatureCache | None = None
        self.forward = self.losses
        if config.compile == "yes":
            self.forward = Compiled(self.losses, self.parameters, optional="compile" in unasked)
        self.update = self.update_weights
        if graph == "yes":
            self.update = Graphed(self.update_weights, Recorder(device), optional="cuda_graph" in unasked)

        self.num_threads, self.fixed_threads = torch.get_num_threads(), fixed_threads
        self.threads: CpuThreads | None = None
        self.step = self.saved_step = 0
        self.seconds, self.clock, self.save_clock = 0.0, time.monotonic(), time.monotonic()
        if config.on_bad_step == "skip" and not self.optimiser.param_groups[0]["fused"]:
            raise UserError(f"--on-bad-step skip does not work on {device}: use stop")
        self.meter, self.throughput = Meter(device), Throughput(device, self.precision)
        self.bad_steps = BadSteps(device, config.spike)
        self.scores: dict[str, float] = {}

    # ---- one step

    def draw(self, step: int) -> Draws:
        """Everything random in a step, a function of (seed, step)."""
        config, stage2 = self.config, self.teacher is not None
        self.generator.manual_seed(_seed(config.seed, _STEP, step))
        order, noise = self._draw_for(self.model)
        teacher_order, teacher_noise = self._draw_for(self.teacher) if stage2 else (None, None)
        chance = np.random.default_rng((config.seed, _PARALLEL, step)).random() if 0 < config.cappa < 1 else 1.0
        parallel = chance < config.cappa < 1
        return Draws(order, noise, teacher_order, teacher_noise, parallel)

    def _draw_for(self, model: Spot) -> tuple[Tensor | None, Tensor | None]:
        """A patch order and initial slots' noise for `model`."""
        order = noise = None
        if model.num_orders > 1:
            order = torch.randint(model.num_orders, (), generator=self.generator, device=self.device)
        slots = model.slot_encoder
        if slots.init == "gaussian":
            shape = (self.config.batch_size, slots.num_slots, slots.slot_dim)
            # Of the whole batch, whatever the share: images get the noise that they would get in one process.
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
            noise = noise[self.loader.mine]
        return order, noise

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images [B, 3, S, S] → what never changes: target [B, N, D], in stage 2 also the trunk's output.

        In bfloat16 in a bf16 run, so that cached features and those computed anew are the same.
        """
        with self.autocast():
            hidden = self.model.encoder.trunk(normalise(images.to(self.device, non_blocking=True)))
            target = self.model.encoder.finish(hidden).contiguous()
        frozen = (target,) if self.model.last_blocks is None else (target, hidden)
        return tuple(t.bfloat16() for t in frozen) if self.precision == "bf16" else frozen

    def frozen_fields(self) -> list[feature_cache.Field]:
        """What `frozen_features` gives for an image, and what that depends on besides the image."""
        config = self.config
        one = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
        # The name too: tensors do not show how many heads there are, nor activations or epsilons.
        words = (
            timm_name(config.encoder),
            self.identity["sha256"],
            config.feature_norm,
            self.precision,
            self.device.type,
            self.loader.kind,
        )
        key = " ".join(map(str, words))
        keys = key, f"{key} {self.model.encoder.first_last_block}"
        return [
            feature_cache.Field(name, tuple(value.shape[1:]), value.dtype, key)
            for name, key, value in zip(("target", "hidden"), keys, self.frozen_features(one), strict=False)
        ]

    def features_of(self, batch: Batch | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Features for the slots and target features, both [B, N, D], of a batch of images or of cached features."""
        frozen = batch if isinstance(batch, tuple) else self.frozen_features(batch.images)
        target, *hidden = (features.float() for features in frozen)
        return (self.model.encoder.finish(hidden[0], self.model.last_blocks) if hidden else target), target

    @torch.no_grad()
    def teach(self, target: Tensor, draws: Draws) -> Tensor:
        """The teacher's labels [B, N]."""
        slots, _, _ = self.teacher.slot_encoder(target, draws.teacher_noise)
        return teacher_labels(self.teacher.decode_masks(slots, target, draws.teacher_order))

    def autocast(self) -> AbstractContextManager:
        """The run's precision, for everything forward; under tf32 what `float32_products` sets belongs to it."""
        return autocast(self.precision, self.device)

    def losses(self, batch: Batch | tuple[Tensor, ...], draws: Draws, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, L_REC and L_ATT (0 in stage 1), scalars; weight [] is lambda. What may be compiled: no host work."""
        with self.autocast():
            features, target = self.features_of(batch)
            output = self.model(features, target, draws.order, noise=draws.noise, parallel=draws.parallel)
            labels = None if self.teacher is None else self.teach(target, draws)
        loss_rec = reconstruction_loss(output.prediction, target)
        if labels is None:
            return loss_rec, loss_rec, torch.zeros_like(loss_rec)
        loss_att, _ = attention_loss(output.slot_logits, output.slot_attn, labels)
        return loss_rec + weight * loss_att, loss_rec, loss_att

    def parts(
        self, batch: Batch | tuple[Tensor, ...], draws: Draws
    ) -> Iterator[tuple[Batch | tuple[Tensor, ...], Draws]]:
        """A batch and what is drawn for it, in --accumulate equal parts."""
        count = self.config.accumulate
        size = self.config.batch_size // self.world.size // count
        for start in range(0, count * size, size):
            own = slice(start, start + size)
            noise, teacher_noise = (
                None if noise is None else noise[own] for noise in (draws.noise, draws.teacher_noise)
            )
            yield (
                map_tensors(batch, lambda tensor, own=own: tensor[own]),
                replace(draws, noise=noise, teacher_noise=teacher_noise),
            )

    def backward(self, batch: Batch | tuple[Tensor, ...], draws: Draws, weight: Tensor) -> list[Tensor]:
        """Adds a part's share of the gradient; its share of the losses, scalars."""
        losses = [loss / self.config.accumulate for loss in self.forward(batch, draws, weight)]
        losses[0].backward()
        return [loss.detach() for loss in losses]

    def train_step(self, batch: Batch | tuple[Tensor, ...]) -> None:
        """Forward, backward, mean over the processes, clip, Adam; waits for nothing on the device."""
        strength = attention_weight(self.config, self.step, self.total_steps)
        weight = torch.full((), strength, dtype=torch.float32, device=self.device)
        set_learning_rate(self.optimiser, self.rate(self.step))
        verdict, *numbers = self.update(batch, self.draw(self.step), weight)
        self.meter.add(*numbers, verdict[0])
        self.bad_steps.note(self.step + 1, verdict)

    def update_weights(self, batch: Batch | tuple[Tensor, ...], draws: Draws, weight: Tensor) -> tuple[Tensor, ...]:
        """All of a step on the device: what `BadSteps.judge` says of it, the losses, and the gradient's norm."""
        self.optimiser.zero_grad(set_to_none=True)
        self.gradients.start()
        shares = []
        for number, part in enumerate(self.parts(batch, draws), 1):
            if number == self.config.accumulate:
                self.gradients.last_pass()
            shares.append(self.backward(*part, weight))
        losses = self.gradients.finish([torch.stack(values).sum() for values in zip(*shares, strict=True)])
        norm = clip_by_infinity_norm(self.parameters, self.config.clip)
        verdict = self.bad_steps.judge(losses[0], norm)
        update(self.optimiser, verdict[0])
        return verdict, *losses, norm

    def flops(self, batch: Batch | tuple[Tensor, ...]) -> int:
        """FLOPs of a step of this process, counted on the first image of its batch; nothing changes by it."""
        one, weight = slice(0, 1), torch.zeros((), dtype=torch.float32, device=self.device)
        batch, draws = map_tensors(batch, lambda tensor: tensor[one]), self.draw(0)
        draws = replace(
            draws,
            **{name: noise[one] for name in ("noise", "teacher_noise") if (noise := getattr(draws, name)) is not None},
        )
        share = self.config.batch_size // self.world.size
        return share * count_flops(lambda: self.losses(batch, draws, weight)[0], self.parameters)

    def _tell_float8(self, batch: Batch | tuple[Tensor, ...], display: Display) -> None:
        draws, decoder = self.draw(self.step), self.model.decoder
        weight = torch.zeros((), dtype=torch.float32, device=self.device)
        loss, gradients = float8.errors(decoder, lambda: self.losses(batch, draws, weight)[1], self.parameters)
        display.line(
            f"float8 in {self.float8_layers} layers of the decoder: on this batch the loss is {loss:.1e} and "
            f"its gradients are {gradients:.1e} from bfloat16's"
        )
        self.float8_layers = 0

    # ---- the loop

    def run(self, folder: RunFolder, *, tensorboard: bool = True, profile: int = 0) -> Outcome:
        """Trains from where `folder` stands to the end, or until Ctrl-C or SIGTERM; the state is saved either way.

        profile: how many steps go into a profile in `folder`.
        """
        config, world = self.config, self.world
        self.clock = time.monotonic()
        if world.first(lambda: (folder.path / STATE).is_file()):
            world.together(lambda: self.restore(folder))
        else:
            folder.cut_metrics(-1)
            self.save(folder)
        world.copy_from_first(self.parameters)
        display = Display(
            folder.path,
            title=f"{config.preset} stage {config.stage}",
            step=self.step,
            total_steps=self.total_steps,
            tensorboard=tensorboard,
            quiet=not world.main,
        )
        for part in (self.forward, self.update):
            if isinstance(part, Compiled | Graphed):
                part.say = display.line
        # Compiled code has its number of threads in it, and processes that trained together have to add alike.
        if self.device.type == "cpu" and config.compile == "no" and world.size == 1 and not self.fixed_threads:
            self.threads = CpuThreads(self.num_threads, display.line)
        try:
            with float32_products(self.precision):
                self._open_cache(display)
            self.paces = {name: Pace(config.batch_size, self.step) for name in ("train", "epoch")}
            recorder = Profile(folder.path, profile if world.main else 0, self.device, display.line)
            with float32_products(self.precision), StopRequest() as stop, closing(recorder):
                try:
                    self._train(folder, display, recorder, stop)
                except Ended:
                    # On a GPU the step may wait for the other process for ever: there the last saved state remains.
                    if self.device.type == "cpu":
                        self.save(folder)
                    raise
        finally:
            torch.set_num_threads(self.num_threads)
            display.close()
        if self.step == self.total_steps:
            self._finish(folder)
        return Outcome(self.step == self.total_steps, self.step, self.total_steps, self.seconds, self.scores)

    def _train(self, folder: RunFolder, display: Display, recorder: Profile, stop: StopRequest) -> None:
        """Steps to the end, or until any process is asked to stop."""
        stopping = False
        while self.step < self.total_steps and not stopping:
            for batch in self.batches():
                if stopping := self.world.agree(stop.made, self.loader.corrupt):
                    break
                if self.throughput.peak and not self.throughput.flops:
                    self.throughput.flops = self.flops(batch)
                if self.float8_layers:
                    self._tell_float8(batch, display)
                if self.threads:
                    self.threads.adapt()
                self.train_step(batch)
                self.step += 1
                recorder.step()
                display.advance()
                if self.world.main:
                    if self.step % self.config.log_every == 0:
                        self._log_interval(folder, display)
                    if self.step % self.loader.steps_per_epoch == 0:
                        self._log_epoch(folder, display)
                if self._save_is_due() or self.step == self.total_steps:
                    self.save(folder)
        if self.saved_step != self.step:
            self.save(folder)

    def batches(self) -> Iterator[Batch | tuple[Tensor, ...]]:
        """What is left of the current epoch: batches of images, or their frozen features where those are cached."""
        epoch, start = divmod(self.step, self.loader.steps_per_epoch)
        if self.cache is not None:
            return self.cache.epoch(self.loader, epoch, start, self.device)
        batches = self.loader.epoch(epoch, start)
        # DALI's are on the device already, images in memory need no time on a CPU.
        if self.loader.kind == "torch" and (self.device.type == "cuda" or self.loader.image_set is not self.train_set):
            return prefetch.to_device(batches, self.device)
        return batches

    def choose_cache(self) -> None:
        """Decides what of the images is cached; UserError where what --cache asks for cannot be. Writes nothing."""
        with float32_products(self.precision):
            self.chosen = choose(self.config, self.loader, self.frozen_fields, device=self.device, world=self.world)

    def _open_cache(self, display: Display) -> None:
        """Caches frozen features or pixels where that pays, and says so."""
        if self.step == self.total_steps:
            return
        if self.chosen is None:
            self.choose_cache()
        source = open_source(
            self.config,
            self.loader,
            self.decoding,
            self.chosen,
            self.frozen_features,
            device=self.device,
            world=self.world,
            say=display.line,
        )
        self.loader, self.cache = source.loader, source.features

    def _log_interval(self, folder: RunFolder, display: Display) -> None:
        values = self._means("train", self.meter.interval, self.config.log_every)
        self._tell_skipped(folder, display)
        folder.log(kind="train", step=self.step, **values)
        display.numbers("train", values)

    def _log_epoch(self, folder: RunFolder, display: Display) -> None:
        config, per_epoch = self.config, self.loader.steps_per_epoch
        epoch = self.step // per_epoch
        values = self._means("epoch", self.meter.epoch, per_epoch)
        self._tell_skipped(folder, display)
        folder.log(kind="epoch", step=self.step, epoch=epoch, **values)
        scores: dict[str, float] = {}
        if epoch == config.epochs or (config.eval_every and epoch % config.eval_every == 0):
            self.scores = scores = self.validate(skipped := {})
            if skipped:
                folder.log(kind="unreadable", step=self.step, images=skipped)
                display.line(skipped_images_line(skipped))
            folder.log(kind="validation", step=self.step, epoch=epoch, **scores)
            display.numbers("validation", scores)
            for pace in self.paces.values():
                pace.restart(self.step)
        display.line(epoch_line(epoch, config.epochs, self.step, self.total_steps, values, scores, display.time_left()))

    def _means(self, kind: str, sums: Tensor, steps: int) -> dict[str, float]:
        """Means of a meter's sums, with learning rate and pace; UserError where the run is to stop."""
        self._require_good()
        values = self.meter.read(sums, steps - self.bad_steps.count(after=self.step - steps))
        if self.teacher is None:
            del values["loss_rec"], values["loss_att"]
        pace = self.paces[kind].read(self.step)
        return {
            **values,
            "lr": self.rate(self.step - 1),
            "images_per_s": pace,
            **self.throughput.read(pace, self.config.batch_size),
        }

    def _tell_skipped(self, folder: RunFolder, display: Display) -> None:
        if news := self.bad_steps.news():
            images = {each.step: self._images(each.step) for each in news}
            folder.log(kind="skipped", step=self.step, steps=list(images), images=list(images.values()))
            display.line(skipped_line(news, len(self.bad_steps.found), _some(images[news[0].step])))

    def _images(self, step: int) -> list[str]:
        """Names of the images of the whole batch of a step, counted from 1."""
        epoch, index = divmod(step - 1, self.loader.steps_per_epoch)
        indices = self.loader.order(epoch).split(self.config.batch_size)[index]
        return [self.train_set.label(i) for i in indices.tolist()]

    def validate(self, skipped: dict[str, str] | None = None) -> dict[str, float]:
        """Quick scores of the model as it is; empty where there is nothing to validate on. skipped: gets the label of
        each image that cannot be read and the reason."""
        if self.val_set is None:
            return {}
        with float32_products(self.precision), self.autocast():
            return quick_validation(
                self.model,
                self.val_set,
                images=self.config.eval_images,
                batch_size=self.config.batch_size,
                device=self.device,
                skipped=skipped,
            )

    def _require_good(self) -> None:
        """UserError where a step was bad and the run is to stop then, or too many were."""
        if (last := self.bad_steps.read()) is not None:
            raise too_many(last, self.kept())
        if self.config.on_bad_step == "stop" and self.bad_steps.found:
            bad = self.bad_steps.found[0]
            where = f"{bad}, images {_some(self._images(bad.step))}: {self.kept()}"
            if math.isfinite(bad.loss) and bad.loss > self.config.spike * bad.mean > 0:
                raise UserError(f"the loss leapt at {where}, or go on with --on-bad-step skip")
            raise UserError(f"the loss or its gradient is not finite at {where}, or go on with --on-bad-step skip")

    # ---- the state on disk

    def save(self, folder: RunFolder) -> None:
        """Puts the present state in the place of the last one, unless it is not finite: then UserError.

        Rank 0 does it, whose state all processes share.
        """
        if self.world.main:
            self._require_good()
            self.tick()
            run_state.save(self, folder)
            self.saved_step, self.save_clock = self.step, time.monotonic()

    def restore(self, folder: RunFolder) -> None:
        """Continues from the state in `folder`; UserError where settings, data, encoder or teacher are not the same."""
        run_state.restore(self, folder)
        self.save_clock = time.monotonic()
        folder.cut_metrics(self.step)

    def kept(self) -> str:
        """What a run that ends with an error has left."""
        return (
            f"the state of step {self.saved_step} is kept, train again with a lower --lr or --clip "
            f"(--lr is {self.config.lr}, --clip {self.config.clip})"
        )

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _save_is_due(self) -> bool:
        return self.step % self.config.save_every == 0 or time.monotonic() - self.save_clock > _SAVE_SECONDS

    def _finish(self, folder: RunFolder) -> None:
        """The model file, whose presence says that the run is finished."""
        if self.world.main:
            self.scores = self.scores or self.validate()
            self.tick()
            run_state.write_model(self, folder)
