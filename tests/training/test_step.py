"""A step: what it draws, what it computes, and that its parts together are the authors' training step."""

import pytest
import torch

import golden_models
import golden_tensors
from golden_tensors import assert_close, load
from spot_fast.model.spot import reconstruction_loss
from spot_fast.training.losses import attention_loss, teacher_labels
from spot_fast.training.optimiser import adam, clip_by_infinity_norm, set_learning_rate
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny

GOLDEN = ["stage1_steps.step_*", "stage1_steps.after_3.*", "stage1_steps.orders", "inputs:step_slot_noise"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_steps_of_the_authors(dtype):
    """Stage 1 from the images on: forward, backward, infinity-norm clipping, Adam."""
    model = golden_models.stage1(dtype).train()
    images, noise, rates = load("inputs:images")[:2].to(dtype), load("inputs:step_slot_noise"), load("stage1_steps.lr")
    orders = torch.tensor(golden_tensors.index()["config"]["step_orders"])
    assert_close("stage1_steps.orders", orders)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = adam(parameters)
    for step, order in enumerate(orders):
        set_learning_rate(optimiser, rates[step].item())
        features, target = model.encode(images)
        out = model(features, target, order, noise=noise[step].to(dtype))
        loss = reconstruction_loss(out.prediction, target)
        optimiser.zero_grad()
        loss.backward()
        norm = clip_by_infinity_norm(parameters, 0.3)
        assert_close(f"stage1_steps.step_{step}.loss_and_grad_norm", torch.stack([loss.detach(), norm]))
        optimiser.step()
    golden_models.assert_all_parameters("stage1_steps.after_3.", model, grad=False)


def test_draws_are_functions_of_seed_and_step(teacher):
    config = tiny(2, slot_init="gaussian")
    trainer = Trainer(config, device=CPU, teacher=teacher)
    draws = [trainer.draw(step) for step in range(60)]
    again = trainer.draw(7)
    assert torch.equal(again.noise, draws[7].noise) and torch.equal(again.teacher_noise, draws[7].teacher_noise)
    assert {int(d.order) for d in draws} == {int(d.teacher_order) for d in draws} == set(range(9))
    assert any(int(d.order) != int(d.teacher_order) for d in draws)
    assert not torch.equal(again.noise, again.teacher_noise)
    noise = torch.stack([d.noise for d in draws])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    other = Trainer(tiny(2, slot_init="gaussian", seed=1), device=CPU, teacher=teacher).draw(7)
    assert not torch.equal(other.noise, again.noise)


def test_parallel_steps_come_as_often_as_asked():
    trainer = Trainer(tiny(orders="standard", cappa=0.25), device=CPU)
    chosen = [trainer.draw(step).parallel for step in range(2000)]
    assert 0.22 < sum(chosen) / len(chosen) < 0.28
    assert trainer.draw(0).order is None
    assert not Trainer(tiny(orders="standard"), device=CPU).draw(0).parallel


def test_a_stage_2_step_is_the_sum_of_its_parts(teacher):
    config = tiny(2, att_weight=0.3, clip=0.0)
    trainer = Trainer(config, device=CPU, teacher=teacher)
    batch = next(trainer.batches())
    draws = trainer.draw(0)
    model, features_and_target = trainer.model, trainer.forward.features(batch)
    output = model(*features_and_target, draws.order)
    with torch.no_grad():
        target = features_and_target[1]
        taught = trainer.teacher(target, target, draws.teacher_order, noise=draws.teacher_noise)
    loss_rec = reconstruction_loss(output.prediction, target)
    loss_att, _ = attention_loss(output.slot_logits, output.slot_attn, teacher_labels(taught.masks))
    gradients = torch.autograd.grad(loss_rec + 0.3 * loss_att, trainer.parameters)

    trainer.train_step(batch)
    for parameter, gradient in zip(trainer.parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient), trainer.names[parameter]
    means = trainer.meter.read(trainer.meter.interval, 1)
    assert means["loss_rec"] == loss_rec.item() and means["loss_att"] == loss_att.item()
    assert any(name.startswith("last_blocks.") for name in trainer.names.values())
    assert not any(p.requires_grad for p in trainer.teacher.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulated_gradient(stage, teacher):
    gradients = []
    for count in (1, 2, 4):
        config = tiny(stage, slot_init="gaussian", accumulate=count)
        trainer = Trainer(config, device=CPU, teacher=teacher if stage == 2 else None)
        trainer.train_step(next(trainer.batches()))
        gradients.append({trainer.names[p]: p.grad for p in trainer.parameters})
    for parts in gradients[1:]:
        for name, expected in gradients[0].items():
            # A bias on all keys or queries has a gradient of 0 but for rounding: beside 1e-8 it is not looked at.
            assert (parts[name] - expected).norm() <= 2e-6 * expected.norm() + 1e-8, name
