"""The training loop of both stages: epochs, log, validation, saved states. `step` has a single step.

Patch orders, slot noise, the sequence of images and the schedules are functions of (seed, step). So the state of a run
is its weights, Adam's moments and the step, and a killed run continues bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spot_fast.checkpoints.runs import STATE
from spot_fast.config import Config
from spot_fast.data import open_set
from spot_fast.data.batch import Batch
from spot_fast.data.caching.feature_cache import FeatureCache
from spot_fast.data.loading import prefetch
from spot_fast.data.loading.open_loader import open_loader
from spot_fast.errors import UserError
from spot_fast.precision import float32_products, resolve
from spot_fast.system.cpu_threads import CpuThreads
from spot_fast.system.interrupt import StopRequest
from spot_fast.training import float8, resume_state
from spot_fast.training.bad_steps import BadSteps, skipped_line, too_many
from spot_fast.training.compiled import Compiled, resolve_compile
from spot_fast.training.console import Display, Meter, epoch_line
from spot_fast.training.cuda_graph import Graphed, Recorder, resolve_cuda_graph
from spot_fast.training.distributed import Ended, World
from spot_fast.training.flat import FlatAdam, rounded_weights
from spot_fast.training.losses import loss_weights
from spot_fast.training.models import build_models
from spot_fast.training.moving_average import MovingAverage
from spot_fast.training.optimiser import (
    FUSED,
    Adam,
    Slow,
    adam,
    load_optimiser_tensors,
    optimiser_tensors,
    set_learning_rate,
)
from spot_fast.training.run_cache import Chosen, choose, open_source
from spot_fast.training.run_folder import OthersFolder, RunFolder
from spot_fast.training.schedule import learning_rate, teacher_momentum
from spot_fast.training.step import Draw, Forward, Update
from spot_fast.training.throughput import Pace, Profile, Throughput, count_flops
from spot_fast.training.validation import quick_validation, skipped_images_line
from spot_kernels import dispatch

_SAVE_SECONDS = 300
# Prefixes of the model's tensors in a saved state, and of an online teacher's.
_MODEL, _TEACHER = "model.", "teacher."


@dataclass(frozen=True)
class Outcome:
    """A run's end: finished, or stopped on request at `step`; its seconds, and the scores of its last validation."""

    finished: bool
    step: int
    total_steps: int
    seconds: float
    scores: dict[str, float]


class Trainer:
    """A run of `config` on `device`; stage 2 needs its teacher's folder. UserError if something is missing.

    Each process of `world` has a Trainer for its shard of every batch; all call the same methods.
    fixed_threads: keep the number of CPU threads while other programs use the CPU.
    resumed: `run` is given a folder with a saved state, so the run that this one began from is not needed.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device,
        teacher: Path | None = None,
        world: World | None = None,
        fixed_threads: bool = True,
        resumed: bool = False,
    ) -> None:
        self.device, self.teacher_path, self.world = device, teacher, world or World()
        self.precision = resolve(config.precision, device)
        self._open_data(config)
        graph = resolve_cuda_graph(config.cuda_graph, device, self.world.size)
        optional = {name for name in ("compile", "cuda_graph") if getattr(config, name) == "auto"}
        self.config = config = replace(config, loader=self.loader.kind, compile=resolve_compile(config.compile, device))
        shard = config.batch_size // self.world.size
        if shard % config.accumulate:
            raise UserError(
                f"--accumulate {config.accumulate} does not divide the {shard} images of a process: use "
                f"a divisor of {shard}"
            )
        self.rate = learning_rate(config, len(self.train_set))
        self.total_steps = self.rate.total_steps
        if config.att_warmup_steps >= self.total_steps:
            raise UserError(
                f"--att-warmup-steps {config.att_warmup_steps} leaves none of the {self.total_steps} steps to the "
                "teacher: use fewer"
            )

        models = build_models(config, device, self.precision, teacher=teacher, resumed=resumed)
        self.model, self.teacher, self.float8_layers = models.model, models.teacher, models.float8_layers
        self.encoder_metadata, self.origins = models.encoder_metadata, models.origins
        self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.optimiser = self._build_optimiser(graphed=graph == "yes")
        if config.on_bad_step == "skip" and not self.optimiser.param_groups[0]["fused"]:
            raise UserError(f"--on-bad-step skip does not work on {device}: use stop")
        self.average = MovingAverage(self.teacher, self.model, self.optimiser) if config.online_teacher else None
        self.bad_steps = BadSteps(device, config.spike)

        self.draw = Draw(config, self.model, self.teacher, device=device, shard=self.loader.shard)
        self.forward = Forward(self.model, self.teacher, precision=self.precision, device=device)
        losses = self.forward.losses
        if config.compile == "yes":
            losses = Compiled(losses, self.optimiser.leaves, optional="compile" in optional, say=self.say)
        self.update = Update(
            losses,
            self.optimiser,
            self.world.gradients(self.parameters, self.optimiser.leaves),
            self.bad_steps,
            clip=config.clip,
            accumulate=config.accumulate,
        )
        if graph == "yes":
            self.update = Graphed(self.update, Recorder(device), optional="cuda_graph" in optional, say=self.say)

        self.chosen: Chosen | None = None
        self.cache: FeatureCache | None = None
        self.num_threads, self.fixed_threads = torch.get_num_threads(), fixed_threads
        self.threads: CpuThreads | None = None
        self.step = self.saved_step = 0
        self.seconds, self.clock, self.save_clock = 0.0, time.monotonic(), time.monotonic()
        self.meter, self.throughput = Meter(device), Throughput(device, self.precision)
        self.display: Display | None = None
        self.scores: dict[str, float] = {}

    def _open_data(self, config: Config) -> None:
        self.train_set = open_set(config, "train")
        self.val_set = open_set(config, "val") if config.eval_images else None
        loader = config.loader
        if loader == "auto" and self.train_set.random_crop and config.cache in ("auto", "pixels"):
            loader = "torch"  # the cache keeps whole images, decoded once, by Pillow
        self.loader, self.decoding = open_loader(
            loader,
            self.train_set,
            config.batch_size,
            config.seed,
            config.workers,
            self.device,
            self.world.rank,
            self.world.size,
        )

    def _build_optimiser(self, *, graphed: bool) -> Adam | FlatAdam:
        optimiser = self._build_adam(graphed=graphed)
        if self.config.slot_rate != 1:
            optimiser.slow = Slow(list(self.model.slot_encoder.parameters()), self.config.slot_rate)
        return optimiser

    def _build_adam(self, *, graphed: bool) -> Adam | FlatAdam:
        if self.device.type not in FUSED or not dispatch.uses("flat_parameters"):
            return adam(self.parameters, graphed=graphed)
        rounded = rounded_weights(self.model) if self.precision == "bf16" else ()
        return FlatAdam(
            self.parameters,
            model=self.model,
            rounded=rounded,
            graphed=graphed,
            passes=self.config.accumulate,
        )

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self.display is None:
            print(text)
        else:
            self.display.line(text)

    # ---- one step

    def train_step(self, batch: Batch) -> None:
        """Trains on `batch` in step `self.step`; waits for nothing on the device."""
        set_learning_rate(self.optimiser, self.rate(self.step))
        weights = loss_weights(self.config, self.step, self.total_steps, self.device)
        verdict, values = self.update(batch, self.draw(self.step), weights)
        if self.average is not None:
            self.average.update(teacher_momentum(self.config, self.step, self.total_steps))
        self.meter.add(values, verdict[0])
        self.bad_steps.note(self.step + 1, verdict)

    def flops(self, batch: Batch) -> int:
        """FLOPs of a step of this process, counted on the first image of its batch; changes nothing."""
        one = slice(0, 1)
        arguments = batch[one], self.draw(0)[one], loss_weights(self.config, 0, self.total_steps, self.device)
        flops = count_flops(lambda: self.forward.losses(*arguments)["loss"], self.parameters)
        return flops * (self.config.batch_size // self.world.size)

    def _report_float8(self, batch: Batch) -> None:
        draws = self.draw(self.step)
        loss, gradients = float8.errors(
            self.model.decoder, lambda: self.forward.terms(batch, draws)["rec"], self.parameters
        )
        self.say(
            f"float8 in {self.float8_layers} layers of the decoder: on this batch the loss is {loss:.1e} and "
            f"its gradients are {gradients:.1e} from bfloat16's"
        )
        self.float8_layers = 0

    # ---- the loop

    def run(self, folder: RunFolder | OthersFolder, *, tensorboard: bool = True, profile: int = 0) -> Outcome:
        """Trains from the state in `folder` to the end, or until Ctrl-C or SIGTERM; saves the state either way.

        profile: number of steps in a profile.
        """
        config, world = self.config, self.world
        self.clock = time.monotonic()
        if world.on_rank_0(lambda: (folder.path / STATE).is_file()):
            world.on_all_ranks(lambda: self._resume(folder))
        else:
            folder.cut_metrics(-1)
            self.save(folder)
        world.copy_from_rank_0(self.parameters)
        if self.average is not None:
            world.copy_from_rank_0(list(self.average.weights.values()))
        self.display = Display(
            folder.path,
            title=f"{config.preset} stage {config.stage}",
            step=self.step,
            total_steps=self.total_steps,
            tensorboard=tensorboard,
            quiet=not world.is_rank_0,
        )
        # Compiled code contains its number of threads, and processes that train together must add in one order.
        if self.device.type == "cpu" and config.compile == "no" and world.size == 1 and not self.fixed_threads:
            self.threads = CpuThreads(self.num_threads, self.say)
        try:
            with float32_products(self.precision):
                self._open_cache()
            self.paces = {name: Pace(config.batch_size, self.step) for name in ("train", "epoch")}
            recorder = Profile(folder.path, profile if world.is_rank_0 else 0, self.device, self.say)
            with float32_products(self.precision), StopRequest() as stop, closing(recorder):
                try:
                    self._train(folder, recorder, stop)
                except Ended:
                    # A GPU's step may wait for the other process for ever: there the last saved state remains.
                    if self.device.type == "cpu":
                        self.save(folder)
                    raise
        finally:
            torch.set_num_threads(self.num_threads)
            self.display.close()
        finished = self.step == self.total_steps
        if finished and world.is_rank_0:
            self.scores = self.scores or self.validate()
            self.tick()
            resume_state.write_model(folder.path, self.model.learned_state_dict(), self._about())
        return Outcome(finished, self.step, self.total_steps, self.seconds, self.scores)

    def _train(self, folder: RunFolder | OthersFolder, recorder: Profile, stop: StopRequest) -> None:
        """Steps to the end, or until any process is asked to stop."""
        stopping = False
        while self.step < self.total_steps and not stopping:
            for batch in self.batches():
                if stopping := self.world.agree(stop.made, self.loader.corrupt):
                    break
                if self.throughput.peak and not self.throughput.flops:
                    self.throughput.flops = self.flops(batch)
                if self.float8_layers:
                    self._report_float8(batch)
                if self.threads:
                    self.threads.adapt()
                self.train_step(batch)
                self.step += 1
                recorder.step()
                self.display.advance()
                if self.world.is_rank_0:
                    if self.step % self.config.log_every == 0:
                        self._log_interval(folder)
                    if self.step % self.loader.steps_per_epoch == 0:
                        self._log_epoch(folder)
                if self._save_is_due() or self.step == self.total_steps:
                    self.save(folder)
        if self.saved_step != self.step:
            self.save(folder)

    def batches(self) -> Iterator[Batch]:
        """The rest of the current epoch: batches of images, or of their cached features."""
        epoch, start = divmod(self.step, self.loader.steps_per_epoch)
        if self.cache is not None:
            return self.cache.epoch(self.loader, epoch, start, self.device)
        batches = self.loader.epoch(epoch, start)
        # DALI's batches are on the device already; on a CPU, images in memory are there at once.
        if self.loader.kind == "torch" and (self.device.type == "cuda" or self.loader.image_set is not self.train_set):
            return prefetch.to_device(batches, self.device)
        return batches

    # ---- cached features or pixels

    def choose_cache(self) -> None:
        """Chooses the cache; UserError if --cache cannot be met. Writes nothing."""
        with float32_products(self.precision):
            sha256 = self.encoder_metadata["encoder_sha256"]
            self.chosen = choose(self.config, self.loader, self.forward, sha256, self.world)

    def _open_cache(self) -> None:
        """Builds or opens the cache, and reads from it from here on."""
        if self.step == self.total_steps:
            return
        if self.chosen is None:
            self.choose_cache()
        self.loader, self.cache = open_source(
            self.config, self.loader, self.decoding, self.chosen, self.forward, world=self.world, say=self.say
        )

    # ---- log and validation

    def _log_interval(self, folder: RunFolder) -> None:
        values = self._means("train", self.meter.interval, self.config.log_every)
        self._report_skipped(folder)
        folder.log(kind="train", step=self.step, **values)
        self.display.numbers("train", values)

    def _log_epoch(self, folder: RunFolder) -> None:
        config, per_epoch = self.config, self.loader.steps_per_epoch
        epoch = self.step // per_epoch
        values = self._means("epoch", self.meter.epoch, per_epoch)
        self._report_skipped(folder)
        folder.log(kind="epoch", step=self.step, epoch=epoch, **values)
        scores: dict[str, float] = {}
        if epoch == config.epochs or (config.eval_every and epoch % config.eval_every == 0):
            self.scores = scores = self.validate(skipped := {})
            if skipped:
                folder.log(kind="unreadable", step=self.step, images=skipped)
                self.say(skipped_images_line(skipped))
            folder.log(kind="validation", step=self.step, epoch=epoch, **scores)
            self.display.numbers("validation", scores)
            # Its seconds do not count against the images per second.
            for pace in self.paces.values():
                pace.restart(self.step)
        left = self.display.time_left()
        self.say(epoch_line(epoch, config.epochs, self.step, self.total_steps, values, scores, left))

    def _means(self, kind: str, sums: Tensor, steps: int) -> dict[str, float]:
        """Means of a meter's sums, with learning rate and pace; UserError if bad steps stop the run."""
        self._require_good()
        values = self.meter.read(sums, steps - self.bad_steps.count(after=self.step - steps))
        pace = self.paces[kind].read(self.step)
        return {
            **values,
            "lr": self.rate(self.step - 1),
            "images_per_s": pace,
            **self.throughput.read(pace, self.config.batch_size),
        }

    def validate(self, skipped: dict[str, str] | None = None) -> dict[str, float]:
        """Quick scores of the model; empty without validation images. skipped: gets the unreadable ones."""
        if self.val_set is None:
            return {}
        with float32_products(self.precision), self.forward.autocast():
            return quick_validation(
                self.model,
                self.val_set,
                images=self.config.eval_images,
                batch_size=self.config.batch_size,
                device=self.device,
                skipped=skipped,
            )

    # ---- bad steps

    def _report_skipped(self, folder: RunFolder) -> None:
        if new := self.bad_steps.unreported():
            images = {each.step: self._image_labels(each.step) for each in new}
            folder.log(kind="skipped", step=self.step, steps=list(images), images=list(images.values()))
            self.say(skipped_line(new, len(self.bad_steps.steps), _first_few(images[new[0].step])))

    def _require_good(self) -> None:
        """UserError if a step was bad and the run is to stop then, or too many were."""
        if (last := self.bad_steps.read()) is not None:
            raise too_many(last, self._kept())
        if self.config.on_bad_step == "stop" and self.bad_steps.steps:
            bad = self.bad_steps.steps[0]
            where = f"{bad}, images {_first_few(self._image_labels(bad.step))}: {self._kept()}"
            if math.isfinite(bad.loss) and bad.loss > self.config.spike * bad.mean > 0:
                raise UserError(f"the loss spiked at {where}, or go on with --on-bad-step skip")
            raise UserError(f"the loss or its gradient is not finite at {where}, or go on with --on-bad-step skip")

    def _image_labels(self, step: int) -> list[str]:
        """Labels of all images of a step, counted from 1."""
        epoch, index = divmod(step - 1, self.loader.steps_per_epoch)
        indices = self.loader.order(epoch).split(self.config.batch_size)[index]
        return [self.train_set.label(i) for i in indices.tolist()]

    def _kept(self) -> str:
        """The end of an error's sentence."""
        return (
            f"the state of step {self.saved_step} is kept, train again with a lower --lr or --clip "
            f"(--lr is {self.config.lr}, --clip {self.config.clip})"
        )

    # ---- the state of the run

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and facts from which `load_state` continues bit for bit."""
        tensors = {_MODEL + name: value for name, value in self.model.learned_state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser, self.names)
        tensors |= {
            "meter.interval": self.meter.interval,
            "meter.epoch": self.meter.epoch,
            "bad_steps": self.bad_steps.mean,
        }
        if self.average is not None:
            tensors |= {_TEACHER + name: value for name, value in self.average.weights.items()}
        return tensors, self._about() | {
            "config": self.config.fingerprint(),
            "images": str(len(self.train_set)),
            "sample": json.dumps(self.train_set.sample()),
            "teacher_path": str(self.teacher_path.resolve()) if self.teacher_path else "",
            "meter": json.dumps(self.meter.names),
            "skipped": json.dumps(self.bad_steps.steps),
            "seconds": f"{self.seconds:.1f}",
            "threads": str(self.num_threads),
            "fixed_threads": "yes" if self.fixed_threads else "no",
            "device": self.device.type,
            "torch": torch.__version__,
            "processes": str(self.world.size),
        }

    def _about(self) -> dict[str, str]:
        """Facts in both the state and the model file."""
        return {"step": str(self.step), "stage": str(self.config.stage), **self.encoder_metadata, **self.origins}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        """Continues from what `state` returned."""
        self.model.load_learned_state_dict(_named(tensors, _MODEL))
        if self.average is not None:
            self.average.load(_named(tensors, _TEACHER))
        self.origins |= {name: facts[name] for name in ("init_from", "init_from_sha256") if name in facts}
        load_optimiser_tensors(self.optimiser, self.names, tensors)
        self.meter.restore(json.loads(facts["meter"]), tensors["meter.interval"], tensors["meter.epoch"])
        self.step = self.saved_step = int(facts["step"])
        # Bad steps are reported when an interval or an epoch ends.
        logged = max(self.step - self.step % every for every in (self.config.log_every, self.loader.steps_per_epoch))
        self.bad_steps.restore(json.loads(facts["skipped"]), tensors["bad_steps"], reported=logged)
        self.seconds = float(facts["seconds"])

    def save(self, folder: RunFolder | OthersFolder) -> None:
        """Replaces the saved state; UserError if the present one is not finite. Only rank 0 writes."""
        if self.world.is_rank_0:
            self._require_good()
            self.tick()
            self.loader.note_corrupt(self.world.corrupt_elsewhere())
            folder.write_corrupt(self.loader.corrupt)
            # The log goes to the disk before the state: a resumed run can cut lines, but not add them.
            folder.sync()
            resume_state.write_state(folder.path, *self.state(), kept=self._kept())
            self.saved_step, self.save_clock = self.step, time.monotonic()

    def _resume(self, folder: RunFolder | OthersFolder) -> None:
        self.load_state(*resume_state.read_state(folder.path, self.state()[1]))
        self.save_clock = time.monotonic()
        folder.cut_metrics(self.step)

    def tick(self) -> None:
        """Adds the time since the last call to the run's seconds."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _save_is_due(self) -> bool:
        return self.step % self.config.save_every == 0 or time.monotonic() - self.save_clock > _SAVE_SECONDS


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
