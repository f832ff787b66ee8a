"""The feature cache: every picture once, the loader's pictures, a plan that can be explained."""

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.data import Folder, Loader, Scenes, cache
from spot_fast.data.base import ImageSet
from spot_fast.errors import CorruptImage, UserError

CPU = torch.device("cpu")


def mean_and_corner(images):
    return images.float().mean((2, 3)), images[:, :, :2, :2]


@pytest.mark.parametrize("count, batch", [(1, 4), (8, 4), (11, 4), (3, 1)])
def test_every_picture_has_its_row_and_batches_are_full(count, batch):
    scenes = Scenes(count, "train", size=16)
    sizes = []

    def function(images):
        sizes.append(len(images))
        return mean_and_corner(images)

    filled = cache.fill(scenes, function, batch_size=batch, device=CPU)
    indices = torch.arange(count).flip(0)
    mean, corner = filled.take(indices, CPU)
    expected = mean_and_corner(scenes.images[indices])
    assert torch.equal(mean, expected[0]) and torch.equal(corner, expected[1])
    assert sizes == [batch] * -(-count // batch)


class Broken(ImageSet):
    """Ten pictures of one colour each; number 3 cannot be read."""

    name = "broken"

    def __len__(self):
        return 10

    def label(self, index):
        return f"{index}.png"

    def train_image(self, index, rng):
        if index == 3:
            raise CorruptImage("3.png is cut off")
        return torch.full((3, 4, 4), index, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture_gets_its_stand_in(workers):
    filled = cache.fill(Broken(), mean_and_corner, batch_size=4, device=CPU, seed=5, workers=workers)
    assert filled.corrupt == {"3.png": "3.png is cut off"}
    loader = Loader(Broken(), 1, seed=5)
    stand_in = [batch.indices.item() for row, batch in zip(loader.order(0), loader.epoch(0), strict=True) if row == 3]
    colours = filled.take(torch.arange(10), CPU)[0][:, 0].tolist()
    assert colours == [0, 1, 2, *map(float, stand_in), 4, 5, 6, 7, 8, 9]


def test_files(tmp_path):
    for name in range(5):
        Image.fromarray(np.full((9, 7, 3), 20 * name, np.uint8)).save(tmp_path / f"{name}.png")
    folder = Folder(tmp_path, image_size=4)
    filled = cache.fill(folder, mean_and_corner, batch_size=2, device=CPU, workers=2)
    assert filled.take(torch.arange(5), CPU)[0][:, 0].tolist() == [0, 20, 40, 60, 80]


def plan(mode="auto", *, augments=False, size=1000, epochs=10, free=50_000, monkeypatch):
    scenes = Scenes(10, "train", size=16)
    scenes.flip = augments
    monkeypatch.setattr(cache, "free_bytes", lambda device: free)
    return cache.plan(mode, scenes, size, epochs, CPU)


def test_plan(monkeypatch):
    auto = plan(monkeypatch=monkeypatch)
    assert auto.device == CPU and "10 pictures are cached: 10 kB of 50 kB" in auto.reason
    for changes, reason in (({"augments": True}, "change from epoch to epoch"), ({"epochs": 1}, "needed once"),
                            ({"free": 15_000}, "more than half"), ({"mode": "none"}, "--cache none")):  # fmt: skip
        found = plan(**changes, monkeypatch=monkeypatch)
        assert found.device is None and reason in found.reason
    assert plan("features", epochs=1, free=15_000, monkeypatch=monkeypatch).device == CPU


def test_a_cache_that_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--cache features needs pictures that are the same"):
        plan("features", augments=True, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="--cache features needs 10 kB and 9 kB are free"):
        plan("features", free=9_000, monkeypatch=monkeypatch)


def test_free_memory_is_a_number_of_this_machine():
    assert 2**20 < cache.free_bytes(CPU) < 2**50
    assert cache._read_number("/no/such/file") == 0
