"""What a step's memory and its growth are said to be."""

from dataclasses import replace

import growth
import memory
import pytest
import torch
from harness import live_bytes
from harness.live_bytes import LiveBytes
from harness.step_runs import TrainerSteps, settings

from spot_kernels import chosen_backend, permuted_causal_attention

points = growth.points


def test_bytes_are_counted_while_they_live():
    held = torch.zeros(100)
    with LiveBytes([held]) as counter:
        a = torch.zeros(1000)
        b = a + 1
        view = b.view(10, 100)
        del a
        c = torch.empty(500)
        b.add_(1)
    assert counter.peak == 4 * 2100 and counter.now == 4 * 1600 and view is not c


def test_what_autograd_keeps_is_counted():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes([x]) as counter:
        y = x.exp().exp().exp()  # each keeps its result
        assert counter.now == 4 * 4000
        y.sum().backward()
        del y
    assert counter.now == 4 * 2000  # x and its gradient


def test_table_csv_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(growth, "points", lambda *_: [one for one in points("cpu", True) if one[0].stage == 1][2:4])
    csv, plot = tmp_path / "growth.csv", tmp_path / "growth.png"
    assert growth.main(["--tiny", "--steps", "1", "--device", "cpu", "--csv", str(csv), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "| 1 | 2 | 16 | 7 |" in printed and "| 1 | 2 | 64 | 7 |" in printed
    assert len(csv.read_text().splitlines()) == 3 and plot.stat().st_size > 1000
    # What is in the file is not measured again, and stays in it.
    header, _, last = csv.read_text().splitlines()
    csv.write_text(f"{header}\n{last}\n")
    assert growth.main(["--tiny", "--steps", "1", "--device", "cpu", "--csv", str(csv)]) == 0
    out = capsys.readouterr()
    assert len(csv.read_text().splitlines()) == 3 and out.err.count("stage 1") == 1 and last in csv.read_text()
    assert "| 1 | 2 | 64 | 7 |" in out.out


def test_growth_is_told_as_ratios():
    base = growth.Point(1, "tokens", 2, 0, 7)
    line = [replace(base, tokens=n, ms=n**2, mib=100 + n) for n in (196, 784, 1764)]
    assert growth.last_step(line) == "tokens × 2.25: time × 5.06, memory × 2.11"


def test_a_card_is_filled_by_as_much_of_the_batch_as_fits(monkeypatch, capsys):
    monkeypatch.setattr(memory, "bytes_of", lambda config: 2e9 + 1e9 * config.batch_size)
    assert memory.line("coco", 1, 80e9) == (2e9, 1e9, 1) and memory.line("coco", 1, 24e9)[2] == 4
    assert memory.line("coco", 1, 4e9)[2] is None
    assert memory.main(["--presets", "movi_e"]) == 0
    assert "| movi_e | 2 | 24 | 2.00 | 1000 | 66.0 | --accumulate 4 |" in capsys.readouterr().out


def test_a_step_holds_its_weights_and_moments_and_more():
    steps = TrainerSteps(settings(1, precision="float32", batch_size=2, tiny=True), torch.device("cpu"))
    trainer = steps.trainer
    weights = sum(p.numel() * 4 for p in trainer.model.parameters())
    trained = sum(p.numel() * 4 for p in trainer.parameters)
    counted = live_bytes.of_step(steps)
    assert weights + 3 * trained < counted < 2 * (weights + 3 * trained)
    # Without its products a step holds the same.
    again = TrainerSteps(settings(1, precision="float32", batch_size=2, tiny=True), torch.device("cpu"))
    assert live_bytes.of_step(again, products=False) == pytest.approx(counted, rel=0.01)


def test_the_kernels_keep_no_matrix_of_tokens():
    """Of the attention in a patch order live its result and two numbers a row, as on a GPU; forward and backward."""
    tokens, order = 64, torch.arange(64).flip(0)
    q, k, v = (torch.zeros(1, 2, tokens, 8, requires_grad=True) for _ in "qkv")
    with live_bytes.kernels(), LiveBytes([q, k, v, order]) as counter:
        before = counter.now
        out = permuted_causal_attention(q, k, v, order)
        assert counter.peak - before == 4 * (out.numel() + 2 * 2 * tokens)
        out.sum().backward()
    assert q.grad.shape == q.shape and counter.peak - before < 4 * 2 * tokens**2
    assert chosen_backend("permuted_causal_attention", q) == "torch"


def test_the_table_of_sizes_has_every_size_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(memory, "bytes_of", lambda config: 2e9 + config.image_size * 1e6 * config.batch_size)
    monkeypatch.setattr(memory, "flops", lambda encoder, side, stage: stage * side * 1e12)
    assert memory.main(["--sizes", "--encoders", "dinov2_vits14", "dinov3_vits16"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [int(row.split(" | ")[1]) for row in rows[::2]] == [224, 336, 448, 518, 224, 336, 448, 512]
    assert rows[7] == "| dinov2_vits14 | 518 | 1,369 | 2 | 1036.0 | 2.00 | 518 | 35.2 | 39 | 147 | 265 |"
