"""Segmenters: masks do not depend on the batch, soft masks sum to one, any grid is accepted."""

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, save_tensors, write_config
from spot_fast.config import preset
from spot_fast.model.spot import Spot
from spot_fast.segmentation import segmenter
from spot_fast.segmentation.segmenter import cluster_segmenter, run_segmenter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of an untrained model."""
    torch.manual_seed(0)
    config = preset("scenes", encoder_weights="none", dec_blocks=1, slot_dim=16, slot_mlp=16)
    encoder = frozen_encoder(config)
    path = tmp_path_factory.mktemp("run")
    write_config(path, config)
    save_tensors(
        path / MODEL,
        Spot(config, encoder).learned_state_dict(),
        encoder_metadata(encoder, config),
    )
    return path


def images(count=5, height=64, width=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def segmenters(folder, **options):
    yield run_segmenter(folder, orders="0", device="cpu", **options)
    yield cluster_segmenter("spot_scenes", None, clusters=4, size=None, device="cpu", **options)


def test_images_of_a_batch_are_segmented_as_alone(folder):
    for model in segmenters(folder):
        together = model.segment(images())
        for number, image in enumerate(images()):
            alone = model.segment(image[None])
            for kind in model.kinds:
                torch.testing.assert_close(alone.masks[kind][0], together.masks[kind][number], rtol=1e-4, atol=1e-5)
            if together.slots is not None:
                torch.testing.assert_close(alone.slots[0], together.slots[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_soft_masks_sum_to_one_on_any_grid(folder, precision):
    for model in segmenters(folder, precision=precision):
        for height, width in ((64, 64), (40, 96)):
            for soft in model.segment(images(2, height, width)).masks.values():
                assert soft.dtype == torch.float32 and soft.shape[1] == height * width // 64
                torch.testing.assert_close(soft.sum(-1), torch.ones(soft.shape[:2]), atol=1e-2, rtol=0)


def test_a_runs_segmenter_is_named_after_it(folder):
    model = run_segmenter(folder, orders="all", device="cpu")
    assert (model.title, model.size, model.patch) == (f"run {folder}", 96, 8)
    masks = model.segment(images(1, 96, 96)).masks
    assert {kind: tuple(soft.shape) for kind, soft in masks.items()} == {"decoder": (1, 144, 6), "slots": (1, 144, 6)}


def test_few_grids_are_kept(folder, monkeypatch):
    monkeypatch.setattr(segmenter, "_MOST_GRIDS", 2)
    model = run_segmenter(folder, orders="0", device="cpu")
    for width in (8, 16, 24, 32):
        model.segment(images(1, 8, width))
    assert list(model._grids) == [(12, 12), (1, 3), (1, 4)]
