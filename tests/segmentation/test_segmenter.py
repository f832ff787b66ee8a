"""Maskers: the same masks in any batch, soft masks that are some, other grids where they are asked for."""

import pytest
import torch

from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, save_tensors, write_config
from spot_fast.config import preset
from spot_fast.model.spot import Spot
from spot_fast.segmentation import segmenter as maskers_module
from spot_fast.segmentation.segmenter import cluster_masker, run_masker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run whose model knows nothing."""
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


def maskers(folder, **options):
    yield run_masker(folder, orders="0", device="cpu", **options)[0]
    yield cluster_masker("spot_scenes", None, clusters=4, size=None, device="cpu", **options)[0]


def test_images_of_a_batch_are_seen_as_alone(folder):
    for masker in maskers(folder):
        together = masker.find(images())
        for number, image in enumerate(images()):
            alone = masker.find(image[None])
            for kind in masker.kinds:
                torch.testing.assert_close(alone.masks[kind][0], together.masks[kind][number], rtol=1e-4, atol=1e-5)
            if together.slots is not None:
                torch.testing.assert_close(alone.slots[0], together.slots[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_soft_masks_sum_to_one_on_any_grid(folder, precision):
    for masker in maskers(folder, precision=precision):
        for height, width in ((64, 64), (40, 96)):
            found = masker.find(images(2, height, width))
            for soft in found.masks.values():
                assert soft.dtype == torch.float32 and soft.shape[1] == height * width // 64
                torch.testing.assert_close(soft.sum(-1), torch.ones(soft.shape[:2]), atol=1e-2, rtol=0)


def test_a_single_image_comes_with_captions(folder):
    masker, size, what = run_masker(folder, orders="all", device="cpu")
    (first, decoder), (second, slots) = masker(images(1))
    assert (first, second, size, what) == ("decoder masks", "slot masks", 64, f"run {folder}")
    assert decoder.shape == slots.shape == (64, 6)


def test_few_grids_are_kept(folder, monkeypatch):
    monkeypatch.setattr(maskers_module, "_MOST_GRIDS", 2)
    masker = run_masker(folder, orders="0", device="cpu")[0]
    for width in (8, 16, 24, 32):
        masker.find(images(1, 8, width))
    assert list(masker._grids) == [(8, 8), (1, 3), (1, 4)]
