"""The feature cache gives what the function makes of the loader's batches, from memory and from disk."""

import pytest
import torch

from image_files import folder, make_images, truncate, unreadable
from spot_fast.data import Loader, Scenes
from spot_fast.data.caching import feature_cache
from spot_fast.data.caching.feature_cache import Field
from spot_fast.data.caching.store import NotBuilt, Store
from spot_fast.errors import UserError

CPU = torch.device("cpu")
FIELDS = [Field("mean", (3,), torch.float32, "a"), Field("corner", (3, 2, 2), torch.bfloat16, "b")]


def mean_and_corner(images):
    return images.float().mean((2, 3)), images[:, :, :2, :2].bfloat16()


def on_disk(loader, root, function=mean_and_corner, fields=FIELDS):
    stores = feature_cache.stores_of(loader.image_set, fields, root)
    feature_cache.build(loader, function, stores, progress=False)
    return feature_cache.opened(loader, fields, stores)


def in_memory(loader, function=mean_and_corner):
    return feature_cache.in_memory(loader, function, FIELDS, CPU, progress=False)


def assert_same_epoch(cache, loader, epoch, start=0):
    plain = Loader(loader.image_set, loader.batch_size, loader.seed)
    for batch, cached in zip(plain.epoch(epoch, start), cache.epoch(loader, epoch, start, CPU), strict=True):
        assert cached.images is None and torch.equal(cached.indices, batch.indices)
        assert torch.equal(cached.flipped, batch.flipped)
        for ours, expected in zip(cached.features, mean_and_corner(batch.images), strict=True):
            assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", ["disk", "memory", "held"])
def test_batches_are_those_of_the_images(tmp_path, flip, place):
    make_images(tmp_path, 11)
    loader = Loader(folder(tmp_path, flip=flip), 4, seed=2, workers=2)
    cache = in_memory(loader) if place == "memory" else on_disk(loader, tmp_path / "cache")
    if place == "held":
        cache.hold(CPU)
    for epoch in (0, 1, 5):
        assert_same_epoch(cache, loader, epoch)
    assert_same_epoch(cache, loader, 3, start=1)


def test_what_the_device_holds_is_asked_for_once_an_epoch(monkeypatch):
    """A copy of row numbers in every step would make the host wait for the device in every step."""
    sent = []
    monkeypatch.setattr(feature_cache, "send", lambda tensor, device: sent.append(len(tensor)) or tensor)
    loader = Loader(Scenes(11, "train", size=16), 4)
    cache = in_memory(loader)
    cache.take = lambda rows, take=cache.take: tuple(t.index_select(0, rows) for t in cache.tensors)
    assert_same_epoch(cache, loader, 3)
    assert sent == [8]


def test_what_another_device_holds_is_copied_ahead(monkeypatch):
    """Rows in the machine's memory for training on a GPU: through pinned memory, in a thread."""
    asked = []
    monkeypatch.setattr(feature_cache, "to_device", lambda batches, device: asked.append(device) or list(batches))
    loader = Loader(Scenes(8, "train", size=16), 4)
    batches = in_memory(loader).epoch(loader, 0, 0, torch.device("cuda"))
    assert asked == [torch.device("cuda")] and len(batches) == 2


@pytest.mark.parametrize("count, batch", [(4, 4), (8, 4), (11, 4), (3, 1)])
def test_the_function_always_sees_full_batches(count, batch):
    sizes = []

    def function(images):
        sizes.append(len(images))
        return mean_and_corner(images)

    loader = Loader(Scenes(count, "train", size=16), batch)
    assert_same_epoch(in_memory(loader, function), loader, 0)
    assert sizes == [batch] * -(-count // batch)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_corrupt_images_have_the_same_stand_ins(tmp_path, place):
    make_images(tmp_path, 11)
    truncate(tmp_path / "004.png")
    loader = Loader(folder(tmp_path, flip=True), 4, seed=2)
    for _ in range(2):  # computed, then read
        cache = in_memory(loader) if place == "memory" else on_disk(loader, tmp_path / "cache")
        assert list(cache.corrupt) == [4] and list(loader.corrupt) == [str(tmp_path / "004.png")]
        for epoch in range(5):
            assert_same_epoch(cache, loader, epoch)
        loader = Loader(loader.image_set, 4, seed=2)


def test_an_image_that_could_not_be_read_once_is_computed_alone(tmp_path, monkeypatch):
    """A disk or a server may fail for a while."""
    make_images(tmp_path, 12)
    images = folder(tmp_path, flip=True)
    with monkeypatch.context() as patch:
        unreadable(patch, "004.png")
        one = on_disk(Loader(images, 4), tmp_path / "cache", lambda images: mean_and_corner(images)[:1], FIELDS[:1])
        assert list(one.corrupt) == [4] and "Input/output error" in one.corrupt[4][1]
    images, seen = folder(tmp_path, flip=True), []

    def counts(images):
        seen.append(len(images))
        return mean_and_corner(images)

    loader = Loader(images, 4)
    cache = on_disk(loader, tmp_path / "cache", lambda images: counts(images)[:1], FIELDS[:1])
    assert seen == [4, 4] and not cache.corrupt and not loader.corrupt  # both outcomes of one batch
    cache = on_disk(loader, tmp_path / "cache")  # the other field is not there yet
    assert_same_epoch(cache, loader, 1)


def test_an_image_is_left_out_where_any_field_lacks_it(tmp_path, monkeypatch):
    make_images(tmp_path, 8)
    images = folder(tmp_path)
    on_disk(Loader(images, 4), tmp_path / "cache", lambda images: mean_and_corner(images)[:1], FIELDS[:1])
    unreadable(monkeypatch, "003.png")
    assert list(on_disk(Loader(images, 4), tmp_path / "cache").corrupt) == [3]


def test_what_may_only_be_read_is_left_out_with_a_note(tmp_path, monkeypatch):
    make_images(tmp_path, 8)
    images, said = folder(tmp_path), []
    with monkeypatch.context() as patch:
        unreadable(patch, "003.png")
        on_disk(Loader(images, 4), tmp_path / "cache")

    def refused(store, rows, say):
        raise NotBuilt("the cache cannot be written (Permission denied)")

    monkeypatch.setattr(Store, "refill", refused)
    stores = feature_cache.stores_of(images, FIELDS, tmp_path / "cache")
    feature_cache.build(Loader(images, 4), mean_and_corner, stores, progress=False, say=said.append)
    assert len(said) == 2 and "can be read again stay left out: the cache cannot be written" in said[0]
    assert list(feature_cache.opened(Loader(images, 4), FIELDS, stores).corrupt) == [3]


def test_an_image_that_changes_while_the_cache_is_built_stops_it(tmp_path):
    """Its row would be found under the key of the image that was there before."""
    make_images(tmp_path, 12)
    images, calls = folder(tmp_path), []

    def function(squares):
        calls.append(None)
        if len(calls) == 2:
            make_images(tmp_path, 6, seed=1)
        return mean_and_corner(squares)

    with pytest.raises(NotBuilt, match=r"image .*004\.png has changed since the run began: .*--cache none"):
        on_disk(Loader(images, 4), tmp_path / "cache", function)
    assert [store.written for store in feature_cache.stores_of(images, FIELDS, tmp_path / "cache")] == [4, 4]
    loader = Loader(folder(tmp_path), 4)
    assert_same_epoch(on_disk(loader, tmp_path / "cache"), loader, 0)


def test_a_store_that_another_process_does_not_see_is_named(tmp_path):
    make_images(tmp_path, 4)
    loader = Loader(folder(tmp_path), 4)
    stores = feature_cache.stores_of(loader.image_set, FIELDS, tmp_path / "cache")
    with pytest.raises(UserError, match="is not complete here although it was built: use a --cache-dir"):
        feature_cache.opened(loader, FIELDS, stores)


def test_too_many_corrupt_images_are_an_error(tmp_path):
    make_images(tmp_path, 11)
    for name in ("004.png", "009.png"):
        truncate(tmp_path / name)
    with pytest.raises(UserError, match="2 of 11 images .* more than 1%"):
        on_disk(Loader(folder(tmp_path), 4), tmp_path / "cache")


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 4])
def test_an_interrupted_build_goes_on(tmp_path, calls):
    make_images(tmp_path, 11)
    loader = Loader(folder(tmp_path, flip=True), 4, seed=2)
    left, seen = [calls], []

    def dies(images):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return mean_and_corner(images)

    with pytest.raises(Killed):
        on_disk(loader, tmp_path / "cache", dies)

    def counts(images):
        seen.append(len(images))
        return mean_and_corner(images)

    cache = on_disk(loader, tmp_path / "cache", counts)
    assert len(seen) == 6 - 2 * (calls // 2)  # two calls a batch, one for each outcome
    assert_same_epoch(cache, loader, 1)


def test_a_field_that_is_there_is_not_computed_again(tmp_path):
    make_images(tmp_path, 8)
    loader = Loader(folder(tmp_path), 4)
    target = on_disk(loader, tmp_path / "cache", lambda images: mean_and_corner(images)[:1], FIELDS[:1])
    file = target.stores[0].folder / "rows.bin"
    before = file.stat().st_mtime_ns
    assert_same_epoch(on_disk(loader, tmp_path / "cache"), loader, 0)
    assert file.stat().st_mtime_ns == before
    on_disk(loader, tmp_path / "cache", lambda images: pytest.fail("everything was there"))


@pytest.mark.parametrize("change", ["key", "dtype", "flip", "files"])
def test_other_weights_precision_or_images_have_another_store(tmp_path, change):
    make_images(tmp_path, 4)
    (before,) = feature_cache.stores_of(folder(tmp_path), FIELDS[:1], tmp_path)
    if change == "files":
        make_images(tmp_path, 4, seed=1)
    field = Field("mean", (3,), torch.bfloat16 if change == "dtype" else torch.float32, "c" if change == "key" else "a")
    (after,) = feature_cache.stores_of(folder(tmp_path, flip=change == "flip"), [field], tmp_path)
    assert before.folder != after.folder
