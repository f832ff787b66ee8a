"""What is cached, where, and the sentence that says why."""

import os
import re

import numpy as np
import pytest
import torch

from image_files import folder, make_images
from spot_fast.data import Scenes
from spot_fast.data.__main__ import main
from spot_fast.data.caching import feature_cache, pixel_cache, plan
from spot_fast.data.caching.feature_cache import Field
from spot_fast.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELD = [Field("target", (250,), torch.float32, "")]  # 1 kB a row


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans for ten images: (mode, options of the set, room in bytes by place) → Plan."""
    make_images(tmp_path, 10)

    def made(mode="auto", *, scenes=False, epochs=10, device=CPU, cpu=10**6, gpu=10**6, disk=10**6, **options):
        free = {"cpu": cpu, "cuda": gpu}
        monkeypatch.setattr(plan, "free_bytes", lambda place: free[place.type])
        monkeypatch.setattr(plan, "free_disk", lambda path: disk + plan._DISK_MARGIN)
        image_set = Scenes(10, "train", size=16) if scenes else folder(tmp_path, **options)
        image_set.flip = options.get("flip", False)
        planned = plan.plan(mode, image_set, FIELD, epochs=epochs, device=device, folder=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        return planned

    return made


def where(plan):
    return plan.kind, plan.device and plan.device.type, plan.on_disk is not None


NONE, FEATURES = ("none", None, False), ("features", "cpu", False)
ON_DISK, PIXELS = ("features", None, True), ("pixels", None, True)


@pytest.mark.parametrize(
    "options, place, says",
    [
        ({"scenes": True}, FEATURES, "features of 10 images, 10 kB in float32, are cached: 1 MB free"),
        ({"scenes": True, "flip": True, "epochs": 3}, FEATURES, "mirrored and not, 20 kB"),
        ({"scenes": True, "epochs": 1}, NONE, "every image is needed once"),
        ({"scenes": True, "cpu": 15_000}, NONE, "do not fit the memory: 15 kB are free"),
        ({"scenes": True, "device": GPU, "gpu": 15_000}, FEATURES, "free on cpu"),
        ({}, ON_DISK, "are built once in"),
        ({"epochs": 1}, NONE, "needed once"),
        ({"flip": True, "epochs": 2}, PIXELS, "once mirrored and once not, so features are not cached"),
        ({"crop": "random"}, PIXELS, "a random crop of image folder has unlimited outcomes"),
        ({"crop": "random", "epochs": 1}, NONE, "unlimited outcomes"),
        ({"disk": 18_000}, FEATURES, "for this run alone"),
        ({"disk": 18_000, "cpu": 18_000}, PIXELS, "cannot be kept"),
        ({"disk": 10_000, "cpu": 18_000}, NONE, "decoded pixels of 10 images, 8 kB, are more than half"),
        ({"mode": "none"}, NONE, "--cache none"),
        ({"mode": "pixels"}, PIXELS, "8 kB"),
        ({"mode": "pixels", "scenes": True}, NONE, "scenes are in memory already"),
        ({"mode": "features", "epochs": 1, "disk": 11_000}, ON_DISK, "built once"),
        ({"device": GPU}, ("features", "cuda", True), "held on cuda"),
        ({"device": GPU, "gpu": 18_000}, ON_DISK, "built once"),
        # From a disk alone a GPU would wait longer than it computes.
        (
            {"device": GPU, "gpu": 18_000, "cpu": 18_000},
            ("pixels", "cuda", True),
            "longer than to compute them",
        ),
        ({"device": GPU, "gpu": 15_000, "cpu": 18_000, "mode": "features"}, ON_DISK, "built once"),
    ],
)
def test_plan(planned, options, place, says):
    plan = planned(**options)
    assert (where(plan), says in plan.reason) == (place, True), plan


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "features", "crop": "random"}, "--cache features: a random crop .* use --cache pixels"),
        (
            {"mode": "features", "disk": 9_000, "cpu": 9_000},
            "--cache features: features of 10 images, 10 kB in float32, cannot be kept: .* use --cache pixels",
        ),
        ({"mode": "features", "scenes": True, "cpu": 9_000}, "do not fit the memory: 9 kB are free"),
        ({"mode": "pixels", "disk": 7_000}, "--cache pixels: decoded pixels of 10 images, 8 kB, cannot be kept"),
    ],
)
def test_what_cannot_be_is_refused(planned, options, message):
    with pytest.raises(UserError, match=message):
        planned(**options)


@pytest.mark.parametrize("mode", ["features", "pixels", "auto"])
def test_what_is_complete_is_read_whatever_the_disk_has_left(tmp_path, monkeypatch, mode):
    """On a full disk, and where one may only read."""
    make_images(tmp_path, 10)
    image_set, where = folder(tmp_path, crop="random" if mode == "auto" else "center"), tmp_path / "cache"
    store = pixel_cache.store_of(image_set, where)
    if mode == "features":
        (store,) = feature_cache.stores_of(image_set, FIELD, where)
    with store.building() as writer:
        for _ in range(10):
            writer.append(np.zeros(1000, np.uint8))
    monkeypatch.setattr(plan, "free_disk", lambda path: 0)
    monkeypatch.setattr(plan, "free_bytes", lambda place: 0)
    planned = plan.plan(mode, image_set, FIELD, epochs=10, device=CPU, folder=where)
    assert planned.complete and planned.on_disk == where and "10 kB" in planned.reason
    assert f"are read from {where}" in planned.reason


@pytest.mark.parametrize("unusable", ["no home", "a file", "read only"])
def test_without_a_folder_features_are_held_in_memory_or_nothing_is_kept(tmp_path, monkeypatch, unusable):
    make_images(tmp_path, 10)
    image_set, where = folder(tmp_path), tmp_path / "cache"
    says = "cache is not a folder that can be made and written to"
    if unusable == "no home":
        where, says = None, "there is no folder for it, $HOME is not set (name one with --cache-dir)"
    elif unusable == "a file":
        where.write_text("")
    else:
        where.mkdir()
        monkeypatch.setattr("os.access", lambda path, mode: False)
        says = "cache cannot be written to"

    def planned(mode, free):
        monkeypatch.setattr(plan, "free_bytes", lambda place: free)
        return plan.plan(mode, image_set, FIELD, epochs=10, device=CPU, folder=where)

    for free, kind, refused in ((10**6, "features", "pixels"), (0, "none", "features")):
        automatic = planned("auto", free)
        assert automatic.kind == kind and automatic.on_disk is None and automatic.reason.endswith(says)
        with pytest.raises(UserError, match=re.escape(says)):
            planned(refused, free)


def test_the_folder_is_an_option_a_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPOT_FAST_CACHE", raising=False)
    assert plan.folder_of(None) == tmp_path / ".cache" / "spot_fast"
    monkeypatch.setenv("SPOT_FAST_CACHE", "/elsewhere")
    assert str(plan.folder_of(None)) == "/elsewhere"
    assert plan.folder_of(str(tmp_path / "given")) == tmp_path / "given"
    assert plan.folder_of("~/given") == tmp_path / "given"
    monkeypatch.setenv("SPOT_FAST_CACHE", "~/there")
    assert plan.folder_of(None) == tmp_path / "there"
    monkeypatch.setenv("SPOT_FAST_CACHE", "")
    assert plan.folder_of(None) == tmp_path / ".cache" / "spot_fast"
    with pytest.raises(UserError, match="--cache-dir is empty"):
        plan.folder_of("")


@pytest.mark.parametrize("home", [None, ""])
def test_a_process_may_have_no_home(monkeypatch, tmp_path, capsys, home):
    """As in a container that runs as a number without a passwd entry."""
    monkeypatch.delenv("SPOT_FAST_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert plan.folder_of(None) is None
    with pytest.raises(UserError, match="--cache-dir ~/given: the home folder is not known"):
        plan.folder_of("~/given")
    assert plan.folder_of(str(tmp_path)) == tmp_path
    assert main(["caches"]) == 2 and "$HOME is not set: name one with --cache-dir" in capsys.readouterr().err
    monkeypatch.setenv("SPOT_FAST_CACHE", str(tmp_path))
    assert plan.folder_of(None) == tmp_path and main(["caches"]) == 0


def test_caches_in_a_folder_that_may_only_be_read_are_listed(monkeypatch, tmp_path, capsys):
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: real(path, mode) and not mode & os.W_OK)
    assert main(["caches", "--cache-dir", str(tmp_path)]) == 0
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["caches", "--cache-dir", str(tmp_path)]) == 2 and "cannot be read" in capsys.readouterr().err


def test_a_cache_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for given in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--cache-dir {given} is not a folder that can be made and written to"):
            plan.folder_of(str(given))
        assert plan.free_disk(given) == 0


def test_free_memory_and_disk_are_numbers_of_this_machine(tmp_path):
    assert 2**20 < plan.free_bytes(CPU) < 2**50
    assert plan._read_number("/no/such/file") == 0
    assert 0 < plan.free_disk(tmp_path / "not" / "there") < 2**60
