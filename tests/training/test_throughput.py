"""What is said about speed: FLOPs that are really those of a step, peaks by name, a profile in the run folder."""

import json

import pytest
import torch
from torch import nn

from spot_fast import train as command
from spot_fast.checkpoints.runs import METRICS
from spot_fast.training.throughput import (
    TABLE,
    TRACE,
    Throughput,
    count_flops,
    measured_peak,
    peak_by_name,
    peak_memory,
)
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, STEPS, options, tiny, with_features


def test_flops_of_linear_layers():
    """Forward, gradient of the weights, and of the inputs but for the first layer's."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.ones(5, 8)
    flops = count_flops(lambda: model(inputs).sum(), list(model.parameters()))
    assert flops == 2 * 5 * (2 * 8 * 16 + 3 * 16 * 4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_of_attention():
    """Two products forward and four backward, whatever kernel PyTorch would take."""
    weight = nn.Parameter(torch.ones(8, 8))

    def loss():
        q = (torch.ones(2, 3, 5, 8) @ weight).requires_grad_()
        return nn.functional.scaled_dot_product_attention(q, q, q).sum()

    products = 2 * 2 * 3 * 5 * 5 * 8
    linear = 2 * (2 * 3 * 5) * 8 * 8
    assert count_flops(loss, [weight]) == 6 * products + 2 * linear


def test_flops_of_a_step(teacher):
    """In proportion to the batch; without the encoder where its features are given; more in stage 2."""
    counts = {}
    for name, trainer in {
        "one": Trainer(tiny(), device=CPU),
        "two": Trainer(tiny(batch_size=8), device=CPU),
        "student": Trainer(tiny(2), device=CPU, teacher=teacher),
    }.items():
        batch = next(trainer.batches())
        counts[name] = trainer.flops(batch)
        counts[name, "cached"] = trainer.flops(with_features(trainer, batch))
    assert counts["two"] == 2 * counts["one"]
    assert counts["one", "cached"] < counts["one"] < counts["student"]
    # The encoder's linear layers: 12 D² multiplications a token and block, and the patches; attention is on top.
    encoder = Trainer(tiny(), device=CPU).model.encoder
    dim, tokens, blocks = encoder.dim, encoder.num_tokens, len(encoder.vit.blocks)
    forward = counts["one"] - counts["one", "cached"]
    linear = 2 * 4 * tokens * 12 * dim * dim * blocks
    assert linear < forward < 1.5 * linear


def test_counting_changes_nothing(teacher):
    weights = []
    for counted in (False, True):
        trainer = Trainer(tiny(2, slot_init="gaussian"), device=CPU, teacher=teacher)
        batch = next(trainer.batches())
        if counted:
            trainer.flops(batch)
        trainer.train_step(batch)
        weights.append(trainer.model.learned_state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "name, bf16, float32",
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_by_name(name, bf16, float32):
    assert peak_by_name(name, "bf16") == 1e12 * bf16 and peak_by_name(name, "float32") == 1e12 * float32
    assert peak_by_name(name, "tf32") == 1e12 * bf16 / 2


@pytest.mark.parametrize("name", ["NVIDIA A1000", "NVIDIA GH200 480GB", "Some L400", ""])
def test_an_unknown_device_has_no_peak(name):
    assert peak_by_name(name, "bf16") is None


def test_numbers_beside_the_pace():
    throughput = Throughput(CPU, "float32")
    assert throughput.read(200, 50).keys() == {"step_ms", "peak_memory"}  # a CPU is not in the table
    throughput.flops, throughput.peak = 10**9, 1e10
    numbers = throughput.read(200, 50)
    assert (numbers["step_ms"], numbers["mfu"]) == (250, 0.4)
    block = torch.ones(2**26)  # 268 MB
    assert peak_memory(CPU) >= max(numbers["peak_memory"], block.nbytes)


def test_a_measured_peak_is_that_of_this_machine():
    before = torch.get_rng_state()
    peak = measured_peak(CPU, "float32", seconds=0.1)
    assert 1e9 < peak < 1e14 and torch.equal(torch.get_rng_state(), before)


def test_profile_and_mfu_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--no-tensorboard", "--threads", "1", *options(eval_images=0), "--out", "run"]
    assert command.main([*words, "--profile", "2", "--measure-peak"]) == 0
    output = capsys.readouterr().out
    assert "TFLOP/s measured in float32" in output and "profile: the table is run/profile.txt" in output
    line = next(line for line in output.splitlines() if line.startswith("epoch 4"))
    assert " ms  MFU " in line and " GB" in line
    events = json.loads((tmp_path / "run" / TRACE).read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2 and "aten::" in (tmp_path / "run" / TABLE).read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert lines[-1]["step"] == STEPS and all(
        {"step_ms", "mfu", "peak_memory"} <= line.keys() for line in lines if line["kind"] != "validation"
    )
    assert command.main([*words, "--profile", "-1"]) == 2
    assert "--profile is -1: use 0 or more" in capsys.readouterr().err
