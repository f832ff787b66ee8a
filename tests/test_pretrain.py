"""Protects the script that makes the packaged encoder: it learns, writes a file that loads, and refuses bad input."""

from __future__ import annotations

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.model.vits import build_vit
from spot_fast.pretrain import MaskedAutoencoder, main, pretrain, varied

TINY = ["--steps", "4", "--batch", "8", "--images", "16"]


def test_hidden_patches_become_predictable():
    """Pixels have a variance of about 1.7, the loss of predicting nothing; a few steps have to do better."""
    _, first = pretrain(steps=1, batch=16, images=64, lr=1e-3, seed=0)
    _, last = pretrain(steps=40, batch=16, images=64, lr=1e-3, seed=0)
    assert last < 0.97 * first


def test_varied_scenes_are_scenes():
    """Turned, mirrored and recoloured as wholes: the same pixels, each image's own."""
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    seen = set()
    for seed in range(20):
        turned = varied(images, torch.Generator().manual_seed(seed))
        assert turned.shape == images.shape
        for before, after in zip(images, turned, strict=True):
            assert {bytes(c.sort().values.numpy()) for c in before.flatten(1)} == {
                bytes(c.sort().values.numpy()) for c in after.flatten(1)
            }
        seen.add(bytes(turned.contiguous().numpy()))
    assert len(seen) > 10


def test_the_decoder_gets_no_positions_of_visible_patches():
    """Of one image's 144 patches, only the 108 hidden ones hand a gradient to the decoder's positions."""
    model = MaskedAutoencoder(build_vit(preset("scenes")))
    loss = model(torch.randn(1, 3, 96, 96), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, model.positions)
    assert (gradient[0].abs().sum(-1) > 0).sum() == 108


def test_written_weights_load(tmp_path):
    out = tmp_path / "vit.safetensors"
    assert main([*TINY, "--out", str(out)]) == 0
    assert out.stat().st_size <= 3_000_000
    encoder = frozen_encoder(preset("scenes", encoder_weights=str(out)))
    assert torch.isfinite(encoder(torch.zeros(1, 3, 96, 96))).all()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "1e30"], "nothing is written"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_file_alone(words, sentence, tmp_path, capsys):
    out = tmp_path / "vit.safetensors"
    out.write_bytes(b"earlier")
    assert main([*TINY, "--out", str(out), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"


def test_a_file_that_cannot_be_written_is_an_error_before_the_training(capsys, monkeypatch):
    monkeypatch.setattr("spot_fast.pretrain.pretrain", lambda *_: pytest.fail("it trained"))
    assert main([*TINY, "--out", "/proc/vit.safetensors"]) == 2
    assert "error: --out /proc/vit.safetensors cannot be written" in capsys.readouterr().err
