"""Protects `--initial-weights clustering`: before any training slots group features, and the decoder looks slots up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spot_fast.config import Config, check_config
from spot_fast.errors import UserError
from spot_fast.model.decoders import AutoregressiveDecoder
from spot_fast.model.masked_decoder import MaskedDecoder
from spot_fast.model.slot_encoder import SlotEncoder
from spot_fast.model.spot import Spot
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny

GRID, DIM = 8, 32


def grouped(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, N, D] of four quarters of an image, each its own direction with noise, and the quarters [N]."""
    torch.manual_seed(0)
    place = torch.arange(GRID) // (GRID // 2)
    quarter = (2 * place[:, None] + place[None]).flatten()
    directions = torch.linalg.qr(torch.randn(batch, DIM, 4)).Q.mT
    return 4 * directions[:, quarter] + 0.3 * torch.randn(batch, GRID * GRID, DIM), quarter


def agreement(masks: torch.Tensor, quarter: torch.Tensor) -> float:
    """Share of the tokens whose slot holds a majority of their own quarter's tokens."""
    labels = masks.argmax(-1)
    own = [
        (image[quarter == k].mode().values == image[quarter == k]).float().mean() for image in labels for k in range(4)
    ]
    several = [len({int(image[quarter == k].mode().values) for k in range(4)}) for image in labels]
    return float(torch.stack(own).mean()) * sum(several) / (4 * len(several))


@pytest.mark.parametrize("slot_dim", [DIM, 24, 48])
def test_slots_begin_as_clusters_of_the_features(slot_dim):
    features, quarter = grouped(16)
    scores = {}
    for start in ("xavier", "clustering"):
        torch.manual_seed(1)
        encoder = SlotEncoder(DIM, 6, slot_dim, 64, iterations=5)
        if start == "clustering":
            encoder.start_as_clustering()
        scores[start] = agreement(encoder(features)[1], quarter)
    assert scores["clustering"] > 0.8 > scores["xavier"] + 0.2


def test_the_rotation_is_the_slot_encoders_mlp():
    torch.manual_seed(0)
    encoder = SlotEncoder(DIM, 4, DIM, 64)
    rotation = encoder.start_as_clustering()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(DIM), atol=1e-5, rtol=0)
    inputs = torch.randn(500, DIM).clamp(-1.5, 1.5) / 2
    torch.testing.assert_close(encoder.mlp(inputs), inputs @ rotation.T, atol=1e-4, rtol=0)


def test_the_decoders_masks_begin_as_the_predecessors_slots():
    features, quarter = grouped(16)
    torch.manual_seed(2)
    encoder = SlotEncoder(DIM, 6, DIM, 64, iterations=5)
    decoder = AutoregressiveDecoder(DIM, DIM, GRID, blocks=3, heads=4)
    before = decoder(encoder(features)[0], features)[1]
    decoder.start_from_slots(encoder.start_as_clustering())
    slots, attn, _ = encoder(features)
    for index, order in enumerate(decoder.orders):
        masks = decoder(slots, features, torch.tensor(index))[1].argmax(-1)
        expected = attn.argmax(-1)[:, order[:-1]]
        same = (masks[:, order[1:]] == expected).float().mean()
        assert same > 0.9, f"order {index}: {same:.2f}"
    assert (
        before.argmax(-1)[:, decoder.orders[0][1:]] == attn.argmax(-1)[:, decoder.orders[0][:-1]]
    ).float().mean() < 0.6


def test_the_masked_decoders_masks_begin_as_the_slots_own():
    """With nothing hidden a token reads its own feature, not its predecessor's."""
    features, _ = grouped(16)
    torch.manual_seed(2)
    encoder = SlotEncoder(DIM, 6, DIM, 64, iterations=5)
    decoder = MaskedDecoder(DIM, DIM, GRID * GRID, blocks=3, heads=4)
    before = decoder.masks(encoder(features)[0], features).argmax(-1)
    decoder.start_from_slots(encoder.start_as_clustering())
    slots, attn, _ = encoder(features)
    assert (decoder.masks(slots, features).argmax(-1) == attn.argmax(-1)).float().mean() > 0.9
    assert (before == attn.argmax(-1)).float().mean() < 0.6


def test_a_new_run_begins_so_and_a_loaded_one_draws_nothing():
    config = tiny(initial_weights="clustering")
    trainer = Trainer(config, device=CPU)
    query = trainer.model.slot_encoder.attention.project_q.weight
    assert torch.equal(query, query[0, 0] * torch.eye(*query.shape))
    query = Spot(config, trainer.model.encoder).slot_encoder.attention.project_q.weight
    assert not torch.equal(query, query[0, 0] * torch.eye(*query.shape))


@pytest.mark.parametrize("changes", [dict(implementation="ocbench"), dict(slot_heads=2)])
def test_other_modules_than_spots_own_are_refused(changes):
    with pytest.raises(UserError, match="^--initial-weights clustering is for --implementation spot and"):
        check_config(replace(Config(), initial_weights="clustering", **changes))
