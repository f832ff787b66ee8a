"""What is cached, where, and the sentence that says why."""

import pytest
import torch

from picture_files import folder, make_pictures
from spot_fast.data import Scenes, cache
from spot_fast.data.feature_cache import Field
from spot_fast.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELD = [Field("target", (250,), torch.float32, "")]  # 1 kB a row


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans for ten pictures: (mode, options of the set, room in bytes by place) → Plan."""
    make_pictures(tmp_path, 10)

    def plan(mode="auto", *, scenes=False, epochs=10, device=CPU, cpu=10**6, gpu=10**6, disk=10**6, **options):
        free = {"cpu": cpu, "cuda": gpu}
        monkeypatch.setattr(cache, "free_bytes", lambda place: free[place.type])
        monkeypatch.setattr(cache, "free_disk", lambda path: disk + cache._DISK_MARGIN)
        image_set = Scenes(10, "train", size=16) if scenes else folder(tmp_path, **options)
        image_set.flip = options.get("flip", False)
        found = cache.plan(mode, image_set, FIELD, epochs=epochs, device=device, folder=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        return found

    return plan


def where(plan):
    return plan.kind, plan.device and plan.device.type, plan.on_disk is not None


@pytest.mark.parametrize("options, place, says", [
    ({"scenes": True}, ("features", "cpu", False), "features of 10 pictures, 10 kB in float32, are cached: 1 MB free"),
    ({"scenes": True, "flip": True, "epochs": 3}, ("features", "cpu", False), "mirrored and not, 20 kB"),
    ({"scenes": True, "epochs": 1}, ("none", None, False), "every picture is needed once"),
    ({"scenes": True, "cpu": 15_000}, ("none", None, False), "do not fit the memory: 15 kB are free"),
    ({"scenes": True, "device": GPU, "gpu": 15_000}, ("features", "cpu", False), "free on cpu"),
    ({}, ("features", None, True), "are built once in"),
    ({"epochs": 1}, ("none", None, False), "needed once"),
    ({"flip": True, "epochs": 2}, ("pixels", None, True), "once mirrored and once not, so features are not cached"),
    ({"crop": "random"}, ("pixels", None, True), "a random crop of image folder has no end of outcomes"),
    ({"crop": "random", "epochs": 1}, ("none", None, False), "no end of outcomes"),
    ({"disk": 18_000}, ("features", "cpu", False), "for this run alone"),
    ({"disk": 18_000, "cpu": 18_000}, ("pixels", None, True), "are too large"),
    ({"disk": 10_000, "cpu": 18_000}, ("none", None, False), "decoded pixels of 10 pictures, 8 kB, are more than half"),
    ({"mode": "none"}, ("none", None, False), "--cache none"),
    ({"mode": "pixels"}, ("pixels", None, True), "8 kB"),
    ({"mode": "pixels", "scenes": True}, ("none", None, False), "scenes are in memory already"),
    ({"mode": "features", "epochs": 1, "disk": 11_000}, ("features", None, True), "built once"),
    ({"device": GPU}, ("features", "cuda", True), "held on cuda"),
    ({"device": GPU, "gpu": 18_000}, ("features", None, True), "built once"),
    # From a disk alone a GPU would wait longer than it computes.
    ({"device": GPU, "gpu": 18_000, "cpu": 18_000}, ("pixels", "cuda", True), "longer than to compute them on a GPU"),
    ({"device": GPU, "gpu": 15_000, "cpu": 18_000, "mode": "features"}, ("features", None, True), "built once"),
])  # fmt: skip
def test_plan(planned, options, place, says):
    plan = planned(**options)
    assert (where(plan), says in plan.reason) == (place, True), plan


@pytest.mark.parametrize("options, message", [
    ({"mode": "features", "crop": "random"}, "--cache features: a random crop .* use --cache pixels"),
    ({"mode": "features", "disk": 9_000, "cpu": 9_000},
     "--cache features: features of 10 pictures, 10 kB in float32, are too large: .* use --cache pixels, another"),
    ({"mode": "features", "scenes": True, "cpu": 9_000}, "do not fit the memory: 9 kB are free"),
    ({"mode": "pixels", "disk": 7_000}, "--cache pixels: decoded pixels of 10 pictures, 8 kB, are too large"),
])  # fmt: skip
def test_what_cannot_be_is_refused(planned, options, message):
    with pytest.raises(UserError, match=message):
        planned(**options)


def test_the_folder_is_an_option_a_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPOT_FAST_CACHE", raising=False)
    assert cache.folder_of(None) == tmp_path / ".cache" / "spot_fast"
    monkeypatch.setenv("SPOT_FAST_CACHE", "/elsewhere")
    assert str(cache.folder_of(None)) == "/elsewhere"
    assert cache.folder_of(str(tmp_path / "given")) == tmp_path / "given"


def test_a_cache_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for given in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--cache-dir {given} is not a folder that can be made and written to"):
            cache.folder_of(str(given))
        assert cache.free_disk(given) == 0


def test_free_memory_and_disk_are_numbers_of_this_machine(tmp_path):
    assert 2**20 < cache.free_bytes(CPU) < 2**50
    assert cache._read_number("/no/such/file") == 0
    assert 0 < cache.free_disk(tmp_path / "not" / "there") < 2**60
