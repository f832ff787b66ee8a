"""Three stage-1 steps as the authors take them: forward, backward, infinity-norm clipping, Adam; from the images on."""

import pytest
import torch

import golden_models
import golden_tensors
from golden_tensors import assert_close, load
from spot_fast.model.spot import reconstruction_loss
from spot_fast.training.optimiser import adam, clip_by_infinity_norm, set_learning_rate

GOLDEN = ["stage1_steps.step_*", "stage1_steps.after_3.*", "stage1_steps.orders", "inputs:step_slot_noise"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_steps(dtype):
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
