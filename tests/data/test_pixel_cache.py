"""The pixel cache gives the loader's batches, bit for bit, from one file that is written once."""

import itertools
import os

import numpy as np
import pytest
import torch

from image_files import folder, make_images, truncate, unreadable
from spot_fast.data import Loader
from spot_fast.data.caching import pixel_cache
from spot_fast.data.caching.store import NotBuilt
from spot_fast.errors import CorruptImage, UserError


def cached(image_set, root, workers=0):
    store = pixel_cache.store_of(image_set, root)
    pixel_cache.build(Loader(image_set, 4, workers=workers), store, progress=False)
    return pixel_cache.CachedPixels(image_set, store)


def assert_same_batches(image_set, from_cache, epochs=(0, 3)):
    loaders = [Loader(images, 4, seed=3) for images in (image_set, from_cache)]
    for epoch in epochs:
        for a, b in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.indices, b.indices) and torch.equal(a.flipped, b.flipped)


@pytest.mark.parametrize("crop, workers", [("center", 0), ("random", 3), ("stretch", 2)])
def test_batches_are_those_of_the_files(tmp_path, crop, workers):
    make_images(tmp_path, 11)
    image_set = folder(tmp_path, crop=crop, flip=True)
    from_cache = cached(image_set, tmp_path / "cache", workers)
    assert hasattr(from_cache, "images") == (crop != "random")
    assert_same_batches(image_set, from_cache)
    assert pixel_cache.expected_bytes(image_set) == from_cache.store.nbytes
    assert torch.equal(from_cache.val_image(2), image_set.val_image(2))


def test_files_are_decoded_once(tmp_path):
    make_images(tmp_path, 9)
    image_set = folder(tmp_path)
    cached(image_set, tmp_path / "cache")
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in image_set.paths]
    for path, (size, time) in zip(image_set.paths, stamps, strict=True):
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(time, time))
    batch = next(Loader(cached(image_set, tmp_path / "cache"), 4).epoch(0))
    assert batch.images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("change", ["a file's content", "one file more", "image_size", "crop"])
def test_a_changed_set_has_another_cache(tmp_path, change):
    make_images(tmp_path, 5)
    before = folder(tmp_path).content_key()
    assert folder(tmp_path).content_key() == before
    if change == "a file's content":
        make_images(tmp_path, 1, seed=1)
    elif change == "one file more":
        make_images(tmp_path, 6)
    options = {"image_size": {"image_size": 8}, "crop": {"crop": "random"}}.get(change, {})
    assert folder(tmp_path, **options).content_key() != before


@pytest.mark.parametrize("crop", ["center", "random"])
def test_corrupt_images_have_the_same_stand_ins(tmp_path, crop):
    make_images(tmp_path, 11)
    truncate(tmp_path / "004.png")
    image_set = folder(tmp_path, crop=crop, flip=True)
    from_cache = cached(image_set, tmp_path / "cache")
    assert list(from_cache.corrupt) == [4] and "004.png cannot be read" in from_cache.corrupt[4][1]
    assert_same_batches(image_set, from_cache, epochs=range(4))
    with pytest.raises(CorruptImage, match=r"004\.png cannot be read"):
        from_cache.prepared(4)


@pytest.mark.parametrize("crop, workers", [("center", 0), ("random", 2)])
def test_an_image_that_could_not_be_read_once_is_decoded_alone(tmp_path, monkeypatch, crop, workers):
    make_images(tmp_path, 11)
    image_set = folder(tmp_path, crop=crop)
    with monkeypatch.context() as patch:
        unreadable(patch, "004.png")
        assert list(cached(image_set, tmp_path / "cache").corrupt) == [4]
    seen, read = set(), image_set.prepared
    image_set.prepared = lambda index: seen.add(index) or read(index)
    from_cache = cached(image_set, tmp_path / "cache", workers)
    assert seen == {4} and not from_cache.corrupt
    assert_same_batches(folder(tmp_path, crop=crop), from_cache)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_an_image_that_changes_while_the_cache_is_built_stops_it(tmp_path, crop):
    make_images(tmp_path, 8)
    image_set = folder(tmp_path, crop=crop)
    image_set.content_key()
    make_images(tmp_path, 3, seed=1)
    with pytest.raises(NotBuilt, match="000.png has changed since the run began"):
        cached(image_set, tmp_path / "cache")


def test_pixels_of_another_decoder_are_others(tmp_path):
    """nvJPEG rounds in its own way: a run on a CPU does not read what a GPU has decoded."""
    make_images(tmp_path, 2)
    decoders = ("torch", "dali on cpu", "dali on cuda")
    assert len({pixel_cache.store_of(folder(tmp_path), tmp_path, decoder).folder for decoder in decoders}) == 3


def test_too_many_corrupt_images_stop_the_build_and_the_rest_is_kept(tmp_path):
    make_images(tmp_path, 11)
    for name in ("004.png", "007.png"):
        truncate(tmp_path / name)
    image_set = folder(tmp_path)
    with pytest.raises(UserError, match="2 of 11 images .* more than 1%"):
        cached(image_set, tmp_path / "cache")
    assert 4 <= pixel_cache.store_of(image_set, tmp_path / "cache").written <= 7


def test_an_interrupted_build_goes_on(tmp_path):
    make_images(tmp_path, 11)
    image_set = folder(tmp_path, crop="random")
    store = pixel_cache.store_of(image_set, tmp_path / "cache")
    with store.building() as writer:
        for image in itertools.islice(pixel_cache._uncropped(Loader(image_set, 4), range(11)), 6):
            writer.append(image.numpy(), height=image.shape[1], width=image.shape[2])
    seen, read = [], image_set.prepared
    image_set.prepared = lambda index: seen.append(index) or read(index)
    from_cache = cached(image_set, tmp_path / "cache")
    assert seen == list(range(6, 11))
    assert all(np.array_equal(from_cache.prepared(i), read(i)) for i in range(11))
