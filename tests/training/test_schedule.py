"""Learning rates against the authors' schedules, in float64."""

import pytest
import torch

import golden_tensors
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.training.schedule import attention_weight, learning_rate

GOLDEN = ["coco.lr", "coco.step", "voc.*", "movi_c_stage1.*", "movi_c_stage2.*", "linear_problem.lr", "stage1_steps.lr"]


def assert_same_float64(name: str, rates: list[float]) -> None:
    """Within rounding of float64: the golden schedules were made by NumPy, whose cosine may differ in the last bit."""
    golden_tensors.assert_close(
        name, torch.tensor(rates, dtype=torch.float64), atol=4e-16 * golden_tensors.load(name).max().item()
    )


@pytest.mark.parametrize(
    "name, stage, images, warmup, total",
    [
        ("coco", 1, 118_287, 9_240, 92_400),
        ("voc", 1, 10_582, 9_900, 92_400),
        ("movi_c", 1, 87_633, 9_583, 88_985),
        ("movi_c", 2, 87_633, 9_583, 41_070),
    ],
)
def test_presets_follow_the_authors_schedules(name, stage, images, warmup, total):
    rate = learning_rate(preset(name, stage), images)
    assert (rate.warmup_steps, rate.total_steps) == (warmup, total)
    golden = f"{name}_stage{stage}" if name == "movi_c" else name
    assert_same_float64(f"{golden}.lr", [rate(int(step)) for step in golden_tensors.load(f"{golden}.step")])


def test_movi_e_warms_up_for_9590_steps():
    assert learning_rate(preset("movi_e"), 87_741).warmup_steps == 9_590


@pytest.mark.parametrize(
    "name, peak, low, epochs, steps_per_epoch",
    [
        ("linear_problem.lr", 0.1, 0.01, 3, 2),
        ("stage1_steps.lr", 4e-4, 4e-7, 2, 4),
    ],
)
def test_small_schedules(name, peak, low, epochs, steps_per_epoch):
    config = preset("coco", lr=peak, lr_low=low, epochs=epochs, batch_size=2, warmup_steps=steps_per_epoch)
    rate = learning_rate(config, 2 * steps_per_epoch)
    assert_same_float64(name, [rate(step) for step in range(rate.total_steps)])


def test_peak_twice_low_never():
    rate = learning_rate(preset("coco", epochs=10, batch_size=1, warmup_steps=20), 10)
    rates = [rate(step) for step in range(rate.total_steps)]
    assert rates[0] == 0 and rates.count(4e-4) == 2 and rates.index(4e-4) == rate.warmup_steps - 1
    assert min(rates[1:]) > 4e-7


def test_no_warmup_one_step_of_it_and_nothing_else():
    config = preset("coco", epochs=2, batch_size=4, warmup_steps=0)
    assert learning_rate(config, 9)(0) == config.lr and learning_rate(config, 9).total_steps == 4
    assert learning_rate(preset("coco", epochs=2, batch_size=4, warmup_steps=1), 4)(0) == 0
    all_warm = learning_rate(preset("coco", epochs=1, batch_size=1, warmup_steps=8), 8)
    assert [all_warm(7), all_warm.total_steps] == [4e-4, 8]


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="--warmup-steps 10000 is 60 epochs but --epochs is 5"):
        learning_rate(preset("voc", epochs=5), 10_582)


def test_lambda_is_constant_or_a_cosine():
    config = preset("coco", stage=2)
    assert [attention_weight(config, step, 10) for step in (0, 9)] == [0.005, 0.005]
    falling = preset("coco", stage=2, att_weight_final=0.001)
    assert attention_weight(falling, 0, 10) == 0.005
    assert attention_weight(falling, 5, 10) == pytest.approx(0.003)
    assert attention_weight(falling, 10, 10) == 0.001
