"""--on-bad-step skip: a step that is not finite, or whose loss spikes, changes no weight and is reported."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spot_fast.checkpoints.runs import MODEL, STATE
from spot_fast.errors import UserError
from spot_fast.training.bad_steps import MOST_IN_A_ROW, BadSteps
from spot_fast.training.optimiser import adam, update
from spot_fast.training.step import Forward
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, assert_same_run, go_on, metrics, stop_after, tiny, train

NAN = float("nan")
SKIP = dict(on_bad_step="skip", eval_images=0)


@pytest.fixture
def broken(monkeypatch):
    """Multiplies the loss of the given steps of a run, counted from 1, by `value`."""

    def breaks(*steps: int, value: float = NAN) -> None:
        losses, train_step, now = Forward.losses, Trainer.train_step, [0]

        def counted_step(self, batch):
            now[0] = self.step + 1
            train_step(self, batch)

        def broken_losses(self, *arguments):
            values = losses(self, *arguments)
            return {**values, "loss": values["loss"] * value} if now[0] in steps else values

        monkeypatch.setattr(Trainer, "train_step", counted_step)
        monkeypatch.setattr(Forward, "losses", broken_losses)

    return breaks


def leave_out(monkeypatch, *steps: int) -> None:
    """Nothing happens in the given steps."""
    train_step = Trainer.train_step

    def step_or_nothing(self, batch):
        if self.step + 1 not in steps:
            train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step_or_nothing)


def reported(path) -> list[int]:
    return [step for line in metrics(path) if line["kind"] == "skipped" for step in line["steps"]]


@pytest.mark.parametrize("steps, value", [((1, 14), NAN), ((6, 7, 24), float("inf"))])
def test_weights_are_those_of_a_run_without_the_updates(steps, value, tmp_path, monkeypatch, broken, capsys):
    broken(*steps, value=value)
    path, outcome = train(tmp_path, tiny(**SKIP))
    monkeypatch.undo()
    leave_out(monkeypatch, *steps)
    expected, _ = train(tmp_path, tiny(**SKIP))
    assert outcome.finished and reported(path) == list(steps)
    weights, others = load_file(path / MODEL), load_file(expected / MODEL)
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert f"({len(steps)} so far)" in capsys.readouterr().out


def test_means_are_those_of_the_steps_that_count(tmp_path, broken):
    broken(2, *range(5, 9), 12)
    path, _ = train(tmp_path, tiny(**SKIP, epochs=2, warmup_steps=0))
    lines = {(line["kind"], line["step"]): line for line in metrics(path)}
    every, _ = train(tmp_path, tiny(**SKIP, epochs=2, warmup_steps=0, log_every=1))
    each = {line["step"]: line["loss"] for line in metrics(every) if line["kind"] == "train"}
    assert lines["train", 4]["loss"] == pytest.approx((each[1] + each[3] + each[4]) / 3)
    assert lines["train", 8]["loss"] is each[2] is None
    assert lines["epoch", 6]["loss"] == pytest.approx((each[1] + each[3] + each[4]) / 3)
    assert lines["epoch", 12]["loss"] == pytest.approx((each[9] + each[10] + each[11]) / 3)
    # Reported at the end of an interval or an epoch, whichever comes first.
    assert {step: lines["skipped", step]["steps"] for kind, step in lines if kind == "skipped"} == {
        4: [2],
        6: [5, 6],
        8: [7, 8],
        12: [12],
    }


def test_without_a_broken_step_both_choices_are_the_same_run(tmp_path):
    runs = [train(tmp_path, tiny(on_bad_step=choice, epochs=2))[0] for choice in ("stop", "skip")]
    assert_same_run(*runs)


def test_stopping_between_a_broken_step_and_its_report_changes_nothing(tmp_path, monkeypatch, broken):
    config = tiny(**SKIP)
    broken(10, 11, 13)
    whole, _ = train(tmp_path, config)
    with stop_after(monkeypatch, 10):
        parts, _ = train(tmp_path, config)
    for step in (12, 14):
        with stop_after(monkeypatch, step):
            go_on(parts, config)
    assert go_on(parts, config).finished
    assert_same_run(parts, whole)
    assert reported(parts) == [10, 11, 13]


def test_a_run_that_stopped_can_go_on_without_the_step(tmp_path, broken):
    broken(14)
    with pytest.raises(UserError, match="not finite at step 14.*--on-bad-step skip"):
        train(tmp_path, tiny(save_every=5))
    path = tmp_path / "scenes-stage1-001"
    assert go_on(path, replace(tiny(save_every=5), on_bad_step="skip")).finished
    assert reported(path) == [14]


@pytest.mark.parametrize("log_every, save_every", [(4, 1000), (1000, 7)])
def test_ten_in_a_row_stop_the_run(log_every, save_every, tmp_path, monkeypatch, broken):
    broken(3, *range(5, 5 + MOST_IN_A_ROW), *range(16, 20))
    config = tiny(**SKIP, log_every=log_every, save_every=save_every)
    with stop_after(monkeypatch, 8):  # the count goes on in a resumed run
        path, _ = train(tmp_path, config)
    with pytest.raises(UserError, match="in 10 steps in a row, the last of them step 14: the state of step"):
        go_on(path, config)
    assert all(value.isfinite().all() for value in load_file(path / STATE).values())


def judged(bad_steps: BadSteps, step: int, loss: float, norm: float = 1.0) -> bool:
    verdict = bad_steps.judge(torch.tensor(loss), torch.tensor(norm))
    bad_steps.note(step, verdict)
    return bool(verdict[0])


def test_nine_in_a_row_do_not():
    bad_steps = BadSteps(CPU, spike=5.0)
    for step in range(1, 31):
        assert judged(bad_steps, step, 1.0, NAN if step % 10 else 1.0) == bool(step % 10)
    assert bad_steps.read() is None and bad_steps.count(after=20) == 9 and len(bad_steps.unreported()) == 27
    assert bad_steps.unreported() == []
    judged(bad_steps, 31, NAN)
    assert bad_steps.read() is None and [each.step for each in bad_steps.unreported()] == [31]


@pytest.mark.parametrize("spike", [5.0, 0.0])
def test_a_spike_is_a_loss_far_above_the_mean_before_it(spike):
    """Never in the first steps, whose mean says little; a falling loss is no spike; a spike is not in the mean."""
    bad_steps = BadSteps(CPU, spike)
    falling = [8.0, 41.0, *(0.995**step for step in range(200))]
    assert not any(judged(bad_steps, step, loss) for step, loss in enumerate(falling, 1))
    mean = bad_steps.mean[0].item()
    assert falling[-1] < mean < 3 * falling[-1]
    assert judged(bad_steps, 203, 5.1 * mean) == judged(bad_steps, 204, 5.1 * mean) == (spike > 0)
    if spike:
        assert bad_steps.mean[0].item() == mean and not judged(bad_steps, 205, 4.9 * mean)
        bad_steps.read()
        assert str(bad_steps.steps[0]) == f"step 203 (loss {5.1 * mean:.3g}, before it {mean:.3g} on average)"


@pytest.mark.parametrize("on_bad_step", ["skip", "stop"])
def test_a_spike_is_reported_with_its_images(on_bad_step, tmp_path, broken, capsys):
    broken(22, value=50.0)
    config = tiny(on_bad_step=on_bad_step, eval_images=0)
    if on_bad_step == "stop":
        message = (
            r"the loss spiked at step 22 \(loss .*, before it .* on average\), images train scene \d+, .*: the "
            "state of step 0 is kept.*--on-bad-step skip"
        )
        with pytest.raises(UserError, match=message):
            train(tmp_path, config)
        return
    path, outcome = train(tmp_path, config)
    assert outcome.finished and reported(path) == [22]
    (line,) = [line for line in metrics(path) if line["kind"] == "skipped"]
    trainer = Trainer(config, device=CPU)
    epoch, step = divmod(21, trainer.loader.steps_per_epoch)
    assert line["images"] == [[trainer.train_set.label(i) for i in trainer.loader.steps(epoch)[step].tolist()]]
    assert "update left out: step 22 (loss" in capsys.readouterr().out


def test_a_bad_update_changes_neither_moments_nor_step_count():
    parameter = nn.Parameter(torch.ones(3))
    optimiser = adam([parameter])
    optimiser.param_groups[0]["lr"] = 0.1
    for bad in (1.0, 0.0, 1.0):
        before = parameter.detach().clone(), {k: v.clone() for k, v in optimiser.state[parameter].items()}
        parameter.grad = torch.full((3,), NAN if bad else 2.0)
        update(optimiser, torch.tensor(bad))
        assert torch.equal(parameter, before[0]) == bool(bad)
        assert int(optimiser.state[parameter]["step"]) == int(before[1].get("step", 0)) + (not bad)
        assert all(torch.equal(optimiser.state[parameter][name], value) for name, value in before[1].items()) or not bad
    update(optimiser, torch.tensor(0.0))
    assert parameter.isnan().all()


def test_where_there_is_no_fused_adam_skip_is_refused(monkeypatch):
    for module in ("trainer", "optimiser"):
        monkeypatch.setattr(f"spot_fast.training.{module}.FUSED", ())
    Trainer(tiny(), device=CPU)
    with pytest.raises(UserError, match="--on-bad-step skip does not work on cpu: use stop"):
        Trainer(tiny(**SKIP), device=CPU)
