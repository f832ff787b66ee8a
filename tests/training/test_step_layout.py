"""A step in order layout, with the short input path, has the losses and gradients of the plain one."""

import pytest
import torch

from forced_layout import in_order_layout
from spot_fast.training.losses import loss_weights
from spot_fast.training.trainer import Trainer
from spot_kernels import dispatch
from tiny_runs import CPU, tiny

PLAIN = ("order_layout", "input_path")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_gives_the_same_losses_and_gradients(stage, teacher, monkeypatch):
    """The loss compares in the order that the decoder leaves its prediction in."""
    in_order_layout(monkeypatch)
    trainer = Trainer(tiny(stage), device=CPU, teacher=teacher if stage == 2 else None)
    batch, draws = next(trainer.batches()), trainer.draw(0)
    weights = loss_weights(trainer.config, 0, trainer.total_steps, CPU)

    def step():
        losses = trainer.forward.losses(batch, draws, weights)
        gradients = torch.autograd.grad(losses["loss"], trainer.parameters)
        return [value.detach() for value in losses.values()], torch.cat([g.flatten() for g in gradients])

    with dispatch.without(*PLAIN):
        expected, plain = step()
    found, gradients = step()
    torch.testing.assert_close(found, expected)
    assert (gradients - plain).norm() <= 1e-4 * plain.norm()
    # its result is not moved back for a loss
    monkeypatch.setattr("spot_fast.model.decoders.from_sequence", None)
    if stage == 1:
        step()
    # a decoder whose call does more is called
    handle = trainer.model.decoder.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="not callable"):
        step()
    handle.remove()


def test_a_bf16_run_keeps_its_target_in_bfloat16():
    trainer = Trainer(tiny(precision="bf16"), device=CPU)
    batch = next(trainer.batches())
    features, target = trainer.forward.features(batch)
    assert features is target and target.dtype == torch.bfloat16
    with dispatch.without("input_path"):
        assert trainer.forward.features(batch)[1].dtype == torch.float32
    assert Trainer(tiny(), device=CPU).forward.features(batch)[1].dtype == torch.float32
