"""A registered decoder brings a loss of its own: it trains, is logged, resumes and shards as the built-in losses do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from spot_fast import train as command
from spot_fast.model.decoders import DECODERS
from spot_fast.training.compiled import Compiled
from spot_fast.training.step import Draw
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, assert_same_run, metrics, options, stop_after, tiny, train


class DenoisingDecoder(nn.Module):
    """Every slot has a colour and a key. Its own loss: predict the noise in noisy features, given the prediction."""

    num_orders = 1

    def __init__(self, dim, slot_dim, num_tokens):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(num_tokens, slot_dim))
        self.colour, self.key = nn.Linear(slot_dim, dim), nn.Linear(slot_dim, slot_dim)
        self.denoise = nn.Linear(2 * dim, dim)

    def forward(self, slots, target, order_index=None, *, parallel=False):
        masks = (self.positions @ self.key(slots).mT / slots.shape[-1] ** 0.5).softmax(-1)
        return masks @ self.colour(slots), masks

    def masks(self, slots, target, order_index=None):
        return self(slots, target)[1]

    def draws(self, batch_size, generator):
        shape = (batch_size, len(self.positions), self.denoise.out_features)
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}

    def losses(self, output, target, draws):
        noise = self.denoise(torch.cat([target + draws["noise"], output.prediction], -1))
        return {"denoise": 0.1 * F.mse_loss(noise.float(), draws["noise"])}


class DiffusionOnly(DenoisingDecoder):
    """Its own loss takes the place of the reconstruction loss."""

    def losses(self, output, target, draws):
        return {"rec": super().losses(output, target, draws)["denoise"]}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, decoder in (("denoising", DenoisingDecoder), ("diffusion", DiffusionOnly)):
        monkeypatch.setitem(
            DECODERS,
            name,
            lambda config, encoder, decoder=decoder: decoder(encoder.dim, config.slot_dim, encoder.num_tokens),
        )


def train_lines(path):
    return [line for line in metrics(path) if line["kind"] != "validation"]


TOY = dict(decoder="denoising", orders="standard", eval_images=0)


def test_its_loss_is_trained_and_logged(tmp_path, capsys):
    words = ["--out", str(tmp_path / "run"), "--threads", "1", "--no-tensorboard", *options(**TOY)]
    assert command.main(words) == 0
    lines = train_lines(tmp_path / "run")
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_rec"] + line["loss_denoise"], rel=1e-6)
    epochs = [line["loss_denoise"] for line in lines if line["kind"] == "epoch"]
    assert epochs[-1] < epochs[0]
    assert f"(rec {lines[-1]['loss_rec']:.4f}, denoise {lines[-1]['loss_denoise']:.4f})" in capsys.readouterr().out


def test_a_student_has_all_three_terms(tmp_path):
    teacher, _ = train(tmp_path, tiny(**TOY, epochs=1, warmup_steps=0))
    student, _ = train(tmp_path, tiny(2, **TOY, epochs=1, warmup_steps=0), teacher)
    assert [name for name in train_lines(student)[-1] if name.startswith("loss_")] == [
        "loss_rec",
        "loss_att",
        "loss_denoise",
    ]


def test_stopping_changes_nothing(tmp_path, monkeypatch):
    config = tiny(**TOY)
    whole, _ = train(tmp_path, config)
    with stop_after(monkeypatch, 10):
        parts, _ = train(tmp_path, config)
    assert command.main(["--resume", str(parts)]) == 0
    assert_same_run(parts, whole)


def test_processes_and_parts_share_what_is_drawn():
    """Images get the same noise however many processes and parts a batch is divided among."""
    trainer = Trainer(tiny(**TOY, slot_init="gaussian"), device=CPU)
    whole = trainer.draw(3)
    shards = [
        Draw(trainer.config, trainer.model, None, device=CPU, shard=slice(start, start + 2))(3) for start in (0, 2)
    ]
    for name in ("noise", "decoder"):
        one, *parts = (getattr(draws, name) for draws in (whole, *shards))
        if name == "decoder":
            one, *parts = (each["noise"] for each in (one, *parts))
        assert torch.equal(torch.cat(parts), one) and len(one) == trainer.config.batch_size
    assert torch.equal(whole[2:4].decoder["noise"], shards[1].decoder["noise"])


def test_it_compiles_as_part_of_the_step():
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (Trainer(tiny(**TOY), device=CPU) for _ in range(2))
    compiled.update.losses = Compiled(
        compiled.forward.losses, compiled.parameters, backend="eager", say=lambda text: None
    )
    for batch in plain.batches():
        for trainer in (plain, compiled):
            trainer.train_step(batch)
            trainer.step += 1
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters, compiled.parameters, strict=True))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_term_called_rec_takes_the_place_of_the_reconstruction_loss():
    trainer = Trainer(tiny(**TOY | {"decoder": "diffusion"}), device=CPU)
    batch, draws = next(iter(trainer.batches())), trainer.draw(0)
    values = trainer.forward.losses(batch, draws, {})
    assert values.keys() == {"loss"} and torch.equal(values["loss"], trainer.forward.terms(batch, draws)["rec"])
    assert values["loss"] < 1  # a tenth of the noise's variance at most, where the reconstruction starts above it
