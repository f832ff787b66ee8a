"""The trainer's step stays as much faster than the reference's as it was measured to be."""

import json

import bench_step
import pytest
import torch
from harness.machine import cpu_name

from spot_fast.training import losses as losses_module
from spot_fast.training.trainer import Trainer

LEAST = 0.9  # of the committed ratio
_MEASURED = json.loads(bench_step.RATIOS.read_text(encoding="utf-8"))
# On another processor than the committed one nothing is known but that the step should not lose to the reference.
COMMITTED = {
    stage: ratio if _MEASURED["cpu"] == cpu_name() else min(ratio, 1.0)
    for stage, ratio in _MEASURED["times_faster_than_reference"].items()
}


def too_slow(rounds, stages=(1, 2)):
    """Stages whose ratio is below its limit, with both."""
    limits = {stage: LEAST * ratio for stage, ratio in COMMITTED.items()}
    ratios = bench_step.ratios(rounds, stages)
    return {stage: (ratio, limits[stage]) for stage, ratio in ratios.items() if ratio < limits[stage]}


@pytest.mark.slow
def test_a_step_is_as_fast_against_the_reference_as_it_was():
    slow = too_slow(9)
    if slow:  # once more, and longer
        slow = too_slow(15, tuple(int(stage[-1]) for stage in slow))
    assert not slow, f"(times faster than the reference, the least allowed): {slow}"


def test_a_slower_step_is_found(monkeypatch):
    train_step = Trainer.train_step

    def wasteful(self, batch):
        self.forward.frozen_features(batch.images)
        self.forward.frozen_features(batch.images)
        train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", wasteful)
    assert too_slow(3, (1,))


def test_another_loss_has_no_time(monkeypatch, tmp_path):
    loss = losses_module.reconstruction_loss
    monkeypatch.setattr(losses_module, "reconstruction_loss", lambda *tensors: 1.001 * loss(*tensors))
    with pytest.raises(AssertionError, match="stage 1: loss"):
        bench_step.pair(1, tmp_path)


def test_settings_come_back():
    before = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    with bench_step.as_in_training():
        assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory) == before
