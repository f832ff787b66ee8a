"""The ladder's baseline against the golden tensors, and against the trainer's own step."""

import pytest
import torch
from harness import step_flops
from reference_step import ReferenceStep, match
from torch.utils.flop_counter import FlopCounterMode

import golden_models
import golden_tensors
from golden_tensors import assert_close, load
from spot_fast.model.encoder import normalise
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny, train

GOLDEN = ["stage1_steps.step_*", "stage1_steps.after_3.*", "self_training.*.loss_*", "self_training.*.grad.*"]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_golden_steps_of_stage_1(dtype):
    model = golden_models.stage1(dtype)
    images, noise, rates = load("inputs:images")[:2].to(dtype), load("inputs:step_slot_noise"), load("stage1_steps.lr")
    reference = ReferenceStep(model, clip=0.3)
    for step, order in enumerate(golden_tensors.index()["config"]["step_orders"]):
        values = reference.step(images, order, noise[step].to(dtype), rate=rates[step].item())
        loss_and_norm = torch.tensor([values.loss, values.norm], dtype=dtype)
        assert_close(f"stage1_steps.step_{step}.loss_and_grad_norm", loss_and_norm)
    golden_models.assert_all_parameters("stage1_steps.after_3.", model, grad=False)


@pytest.mark.parametrize("case", ["regular", "empty_teacher_slot"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_losses_and_gradients_of_stage_2(case, dtype):
    prefix = f"self_training.{case}"
    student, teacher = golden_models.stage2(dtype), golden_models.stage1(dtype)
    reference = ReferenceStep(student, teacher, att_weight=0.005)
    noise = load(f"inputs:teacher_slot_noise.{case}").to(dtype)
    loss, loss_rec, loss_att = reference.losses(load("inputs:images").to(dtype), 8, None, 3, noise)
    assert_close("self_training.loss_rec", loss_rec)
    assert_close(f"{prefix}.loss_att", loss_att)
    assert_close(f"{prefix}.loss_total", loss)
    loss.backward()
    golden_models.assert_all_parameters(f"{prefix}.grad.", student, grad=True)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train(tmp_path_factory.mktemp("teacher"), tiny(eval_images=0))[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_trainer_takes_the_same_steps(stage, teacher):
    """Losses, clipped gradients and weights after three steps, from images."""
    config = tiny(stage, eval_images=0, clip=0.05)
    trainer, other = (Trainer(config, device=CPU, teacher=teacher if stage == 2 else None) for _ in range(2))
    reference = ReferenceStep(other.model, other.teacher, att_weight=config.att_weight, clip=config.clip)
    clipped = 0
    for step, batch in zip(range(3), trainer.batches(), strict=False):
        trainer.step = step
        trainer.train_step(batch)
        values = trainer.meter.read(trainer.meter.interval, 1)
        draws = other.draw(step)
        order, teacher_order = (0 if index is None else int(index) for index in (draws.order, draws.teacher_order))
        expected = reference.step(
            normalise(batch.images), order, draws.noise, teacher_order, draws.teacher_noise, rate=other.rate(step)
        )
        wanted = {"loss": expected.loss, "grad_norm": expected.norm}
        if stage == 2:
            wanted |= {"loss_rec": expected.loss_rec, "loss_att": expected.loss_att}
        assert values == pytest.approx(wanted, rel=1e-5)
        clipped += expected.norm > config.clip
        for ours, theirs in zip(trainer.parameters, reference.parameters, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        # Adam gives a gradient that is rounding alone a whole step, so weights agree as a vector only.
        ours, theirs = (torch.cat([p.detach().flatten() for p in one.parameters]) for one in (trainer, reference))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert clipped and (stage == 1 or expected.loss_att > 0)


@pytest.mark.parametrize("stage", [1, 2])
def test_operations_of_the_whole_step(stage, teacher):
    """Neither more nor fewer products than the authors' step has, which does nothing twice but what it is there for."""
    trainer = Trainer(tiny(stage, eval_images=0), device=CPU, teacher=teacher if stage == 2 else None)
    model = trainer.model
    reference = ReferenceStep(model, trainer.teacher)
    batch = next(iter(trainer.batches()))
    images, draws = normalise(batch.images), trainer.draw(0)
    with FlopCounterMode(display=False) as counter:
        reference.step(images, 0, draws.noise, 0, draws.teacher_noise, rate=1e-3)
    depth, first = len(model.encoder.vit.blocks), model.encoder.first_last_block
    over_tokens, earlier, last = step_flops.slots(model)
    tokens, slots = model.encoder.num_tokens, model.slot_encoder.num_slots
    # all of N × N, of which a causal kernel needs half
    masked = len(model.decoder.transformer.blocks) * 2 * tokens**2 * model.encoder.dim
    decoder = step_flops.decoder(model, folded=False) + masked
    encoder = step_flops.encoder(model, depth, embed=True)
    if stage == 1:
        expected = encoder + 3 * (over_tokens + earlier + last + decoder)
    else:
        # the teacher's pass, the target's, and the student's with the gradients of its last blocks
        expected = encoder + sum(step_flops.slots(trainer.teacher)) + decoder
        expected += encoder + encoder + 2 * step_flops.encoder(model, depth - first)
        # gradients go through the last iteration of slot attention alone
        expected += 3 * (over_tokens + last + decoder) + earlier
        expected += 2 * slots * tokens * slots  # how much the masks have in common
    assert counter.get_total_flops() == len(batch) * expected


def test_matching_on_the_host():
    """The teacher's slots 0, 1, 2 are the student's 2, 0, 1; a teacher slot without a pixel takes what is left."""
    teacher = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 2, 2, 2]])
    student = torch.tensor([[2, 2, 0, 0, 0, 1], [1, 1, 1, 0, 0, 2]])
    assert match(student, teacher, 3).tolist() == [[2, 0, 1], [1, 2, 0]]


def test_what_the_reference_does_not_do_is_refused():
    model = Trainer(tiny(decoder="mlp", orders="standard", eval_images=0), device=CPU).model
    with pytest.raises(ValueError, match="autoregressive transformer only"):
        ReferenceStep(model)
