"""--float8: the decoder's layers round as float8 does, train, and keep their names; its error is reported."""

import os

import pytest
import torch

from spot_fast.checkpoints.runs import MODEL, read_tensors
from spot_fast.errors import UserError
from spot_fast.training import float8
from spot_fast.training.trainer import Trainer
from spot_kernels import dispatch
from tiny_runs import CPU, tiny, train

if not os.environ.get("CI"):  # where it has to be there
    pytest.importorskip("torchao")


@pytest.fixture
def emulated(monkeypatch):
    """As on a GPU that multiplies float8."""
    convert = float8.convert
    monkeypatch.setattr(float8, "require", lambda device: None)
    monkeypatch.setattr(float8, "convert", lambda decoder: convert(decoder, emulate=True))


def test_a_run_in_float8_learns_and_says_its_error(emulated, tmp_path, capsys):
    config = tiny(precision="bf16", float8=True, dec_blocks=1)
    path, outcome = train(tmp_path, config)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("float8"))
    loss, gradients = (float(word.rstrip(",")) for word in line.split() if "e-" in word)
    assert 0 < loss < 0.05 and 0 < gradients < 0.5
    plain, expected = train(tmp_path, tiny(precision="bf16", dec_blocks=1))
    weights, others = read_tensors(path / MODEL)[0], read_tensors(plain / MODEL)[0]
    assert weights.keys() == others.keys() and any(not torch.equal(weights[name], others[name]) for name in others)
    assert outcome.scores["val_loss"] == pytest.approx(expected.scores["val_loss"], rel=0.1)


def test_only_the_student_decoder_is_converted_and_can_be_left_out(emulated):
    trainer = Trainer(tiny(precision="bf16", float8=True), device=CPU)
    layers = float8._layers(trainer.model.decoder)
    assert layers and not float8._layers(trainer.model.slot_encoder) and not float8._layers(trainer.model.encoder)
    plain = Trainer(tiny(precision="bf16"), device=CPU)
    batch = next(iter(plain.batches()))
    draws = plain.draw(0)
    # float8 layers are not plain ones, so their cross-attentions are not folded
    unfolded = dispatch.without("folded_cross_attention")
    with torch.no_grad(), float8.left_out(trainer.model.decoder), unfolded:
        assert torch.equal(trainer.forward.terms(batch, draws)["rec"], plain.forward.terms(batch, draws)["rec"])
    with torch.no_grad():
        assert not torch.equal(trainer.forward.terms(batch, draws)["rec"], plain.forward.terms(batch, draws)["rec"])


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    with pytest.raises(UserError, match="--float8 needs an NVIDIA GPU of compute capability 8.9 or more, not cpu"):
        Trainer(tiny(precision="bf16", float8=True), device=CPU)
    monkeypatch.setattr(float8, "require", lambda device: None)
    with pytest.raises(UserError, match="--float8 belongs to --precision bf16, not float32"):
        Trainer(tiny(precision="float32", float8=True), device=CPU)
