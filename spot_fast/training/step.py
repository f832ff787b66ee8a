"""One training step, from top to bottom: draws → features → forward → losses → backward → clip → update.

    draws = draw(step)                                 everything random, a function of (seed, step)
    verdict, values = update(batch, draws, weights)    everything else, with `Forward.losses` in its middle

`Trainer.train_step` calls the two. `compiled.Compiled` may wrap `Forward.losses` and `cuda_graph.Graphed` may wrap
`Update`, so neither does host work: all that changes from step to step comes in as tensors, and nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spot_fast.config import Config
from spot_fast.data.batch import Batch
from spot_fast.model.adaptive_slots import joined
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.precision import autocast
from spot_fast.random_streams import Stream, generator, seed_of
from spot_fast.training.bad_steps import BadSteps
from spot_fast.training.flat import FlatAdam
from spot_fast.training.losses import loss_terms, teacher_labels, weighted_sum
from spot_fast.training.optimiser import Adam
from spot_fast.training.shared_gradients import LocalGradients
from spot_kernels import dispatch

# ---- what is random


@dataclass(frozen=True)
class Draws:
    """Random values of one step, a pytree; None where the model needs none.

    order, teacher_order: patch orders, int64 [] on the device. noise, teacher_noise: of the initial slots [B, K, U].
    parallel: whether it is a CapPa step. taught: whether the teacher's masks are in the loss.
    decoder: draws of the trained decoder, each [B, …].
    """

    order: Tensor | None
    noise: Tensor | None
    teacher_order: Tensor | None
    teacher_noise: Tensor | None
    parallel: bool
    taught: bool = False
    decoder: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> Draws:
        """The draws of these images of the batch; orders are the whole batch's."""
        noise, teacher_noise = (None if one is None else one[rows] for one in (self.noise, self.teacher_noise))
        decoder = {name: tensor[rows] for name, tensor in self.decoder.items()}
        return replace(self, noise=noise, teacher_noise=teacher_noise, decoder=decoder)


pytree.register_dataclass(Draws)


class Draw:
    """draw(step) → Draws. `shard`: this process's rows of a batch.

    A decoder's method `draws(batch_size, generator)` adds to them a dict of tensors [B, …] on the generator's device,
    for its `losses` (see `Forward.terms`) and, if its `needs` names them, its `forward`.
    """

    def __init__(self, config: Config, model: Spot, teacher: Spot | None, *, device: torch.device, shard: slice):
        self.config, self.model, self.teacher, self.device, self.shard = config, model, teacher, device, shard
        self.generator = torch.Generator(device)

    def __call__(self, step: int) -> Draws:
        config = self.config
        self.generator.manual_seed(seed_of(Stream.STEP, config.seed, step))
        order, noise = self._order_and_noise(self.model)
        teacher_order, teacher_noise = (None, None) if self.teacher is None else self._order_and_noise(self.teacher)
        # On the host, because a parallel step is another graph of operations.
        chance = generator(Stream.PARALLEL, config.seed, step).random() if 0 < config.cappa < 1 else 1.0
        parallel = chance < config.cappa < 1
        taught = self.teacher is not None and step >= config.att_warmup_steps
        draws = Draws(order, noise, teacher_order, teacher_noise, parallel, taught)
        if hasattr(self.model.decoder, "draws"):
            draws = replace(draws, decoder=self.model.decoder.draws(config.batch_size, self.generator))
        # Drawn for the whole batch and cut afterwards: an image's noise does not depend on the number of processes.
        return draws[self.shard]

    def _order_and_noise(self, model: Spot) -> tuple[Tensor | None, Tensor | None]:
        order = noise = None
        if model.num_orders > 1:
            order = torch.randint(model.num_orders, (), generator=self.generator, device=self.device)
        slots = model.slot_encoder
        if slots.init == "gaussian":
            shape = (self.config.batch_size, slots.num_slots, slots.slot_dim)
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return order, noise


# ---- features, forward, losses


class Forward:
    """Batch and draws → losses of `model` (stage 2: with its teacher), in a run's precision."""

    def __init__(self, model: Spot, teacher: Spot | None, *, precision: str, device: torch.device):
        self.model, self.teacher, self.precision, self.device = model, teacher, precision, device

    def autocast(self) -> AbstractContextManager:
        """The run's precision; tf32 also needs `float32_products`."""
        return autocast(self.precision, self.device)

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images [B, 3, S, S] → target features [B, N, D], in stage 2 also the trunk's output.

        In bfloat16 in a bf16 run, so that cached features equal those computed anew.
        """
        with self.autocast():
            hidden = self.model.encoder.trunk(normalise(images.to(self.device, non_blocking=True)))
            target = self.model.encoder.finish(hidden).contiguous()
        frozen = (target,) if self.model.last_blocks is None else (target, hidden)
        return tuple(t.bfloat16() for t in frozen) if self.precision == "bf16" else frozen

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Target features [B, N, D], and in stage 2 the trunk's output [B, prefix + N, D].

        Of a bf16 run the target is in bfloat16, as it was computed or cached: what reads it rounds it to bfloat16 for a
        product, or takes LayerNorm or loss in float32.
        """
        target, *hidden = batch.features or self.frozen_features(batch.images)
        if self.precision != "bf16" or not dispatch.uses("input_path"):
            target = target.float()
        # in float32 for the blocks' residual stream
        return target, hidden[0].float() if hidden else None

    def slot_features(self, model: Spot, target: Tensor, hidden: Tensor | None) -> Tensor:
        """What `model` makes slots of [B, N, D]: the target, or what its own last blocks make of `hidden`."""
        return target if model.last_blocks is None else model.encoder.finish(hidden, model.last_blocks)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features for the slots and target features, both [B, N, D]; in stage 1 they are the same."""
        target, hidden = self.targets(batch)
        return self.slot_features(self.model, target, hidden), target

    @torch.no_grad()
    def teach(self, target: Tensor, hidden: Tensor | None, draws: Draws) -> Tensor:
        """The teacher's labels [B, N]."""
        teacher = self.teacher
        slots, attn, _ = teacher.slot_encoder(self.slot_features(teacher, target, hidden), draws.teacher_noise)
        masks = teacher.decode_masks(slots, target, draws.teacher_order, slot_attn=attn)
        return teacher_labels(joined(masks, self.model.groups(attn, target)))

    def terms(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Unweighted loss terms by name, scalars.

        A decoder's method `losses(output: SpotOutput, target, draws.decoder)` adds its own, a dict of scalars with
        weight 1; one called `rec` replaces the reconstruction loss.
        """
        with self.autocast():
            target, hidden = self.targets(batch)
            features = self.slot_features(self.model, target, hidden)
            own = getattr(self.model.decoder, "losses", None)
            # Mean squared error is the same in any order of tokens, and the target is moved without a backward pass.
            output = self.model(
                features,
                target,
                draws.order,
                noise=draws.noise,
                parallel=draws.parallel,
                moved=own is None,
                draws=draws.decoder,
            )
            labels = self.teach(target, hidden, draws) if draws.taught else None
            more = {} if own is None else own(output, target, draws.decoder)
        terms = loss_terms(output, output.beside_prediction(target), labels)
        if self.teacher is not None and not draws.taught:
            terms["att"] = torch.zeros_like(terms["rec"])  # the same names in every step
        return terms | {name: term.float() for name, term in more.items()}

    def losses(self, batch: Batch, draws: Draws, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `losses.weighted_sum`; `loss` is differentiated."""
        return weighted_sum(self.terms(batch, draws), weights)


# ---- backward, mean over processes, clip, update


class Update:
    """update(batch, draws, weights) → verdict, values: all of a step on the device, from a batch to new weights.

    losses: `Forward.losses` or its compiled form. accumulate: number of equal parts of a batch that go through it one
    after another. verdict: float32 [3], see `BadSteps.judge`. values: the losses and `grad_norm`, scalars.
    """

    def __init__(
        self,
        losses: Callable[[Batch, Draws, dict[str, Tensor]], dict[str, Tensor]],
        optimiser: Adam | FlatAdam,
        gradients: LocalGradients,
        bad_steps: BadSteps,
        *,
        clip: float,
        accumulate: int,
    ):
        self.losses, self.optimiser, self.gradients, self.bad_steps = losses, optimiser, gradients, bad_steps
        self.clip, self.accumulate = clip, accumulate
        optimiser.take_from(gradients)

    def __call__(self, batch: Batch, draws: Draws, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.optimiser.zero_grad(set_to_none=True)
        self.gradients.start()
        shares = []
        with self.optimiser.in_use():
            for number, rows in enumerate(self._parts(len(batch)), 1):
                if number == self.accumulate:
                    self.gradients.last_pass()  # from here on finished gradients travel while others are computed
                losses = self.losses(batch[rows], draws[rows], weights)
                share = {name: loss / self.accumulate for name, loss in losses.items()}
                share["loss"].backward()
                self.optimiser.collect()
                shares.append({name: loss.detach() for name, loss in share.items()})
        sums = {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}
        # The losses travel with the last gradients. All that follows is the same in every process.
        means = dict(zip(sums, self.gradients.finish(list(sums.values())), strict=True))
        norm = self.optimiser.clip(self.clip)
        verdict = self.bad_steps.judge(means["loss"], norm)
        self.optimiser.update(verdict[0])
        return verdict, {**means, "grad_norm": norm}

    def _parts(self, images: int) -> Iterator[slice]:
        size = images // self.accumulate
        return (slice(start, start + size) for start in range(0, self.accumulate * size, size))
