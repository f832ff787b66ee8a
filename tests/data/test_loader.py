"""The loader: what a batch holds depends on seed, epoch and index alone; corrupt images are replaced and counted."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.config import preset
from spot_fast.data import Folder, Loader, open_set
from spot_fast.data.loading import loader as loader_module
from spot_fast.errors import UserError

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of noise, 40 x 24."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(root / f"{i:03d}.png")
    return root


def random_crops(folder, **options):
    return Folder(folder, image_size=16, crop="random", flip=True, **options)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.flipped, b.flipped)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_count_and_resume_change_nothing(folder, workers):
    alone, threads = (Loader(random_crops(folder), 4, seed=7, workers=w) for w in (0, workers))
    for epoch in (0, 3):
        assert_same(alone.epoch(epoch), threads.epoch(epoch))
        assert_same(itertools.islice(alone.epoch(epoch), 2, None), threads.epoch(epoch, start_step=2))
    assert list(threads.epoch(0, start_step=threads.steps_per_epoch)) == []


def test_an_epoch_is_a_shuffle_without_the_rest(folder):
    loader = Loader(random_crops(folder), 4, seed=1)
    batches = list(loader.epoch(0))
    assert loader.steps_per_epoch == len(batches) == 5
    indices = torch.cat([b.indices for b in batches])
    assert len(set(indices.tolist())) == 20
    assert batches[0].images.shape == (4, 3, 16, 16) and batches[0].images.dtype == torch.uint8
    for other in (Loader(random_crops(folder), 4, seed=2).order(0), loader.order(1)):
        assert not torch.equal(other, loader.order(0))


def test_flips_belong_to_the_image_not_to_the_batch(folder):
    plain = Folder(folder, image_size=16)
    mirrored = Loader(Folder(folder, image_size=16, flip=True), 4, seed=3)
    flips = mirrored.flips(0)
    assert 0 < flips.sum() < COUNT and not torch.equal(flips, mirrored.flips(1))
    for batch in mirrored.epoch(0):
        assert torch.equal(batch.flipped, flips[batch.indices])
        for image, index, flipped in zip(batch.images, batch.indices, batch.flipped, strict=True):
            expected = plain.val_image(int(index))
            assert torch.equal(image, expected.flip(-1) if flipped else expected)
    assert not Loader(plain, 4, seed=3).flips(0).any()


def test_images_in_memory_are_indexed():
    scenes = open_set(preset("scenes", train_images=12), "train")
    loader = Loader(scenes, 5, seed=0, workers=2)
    for batch in loader.epoch(0):
        assert torch.equal(batch.images, scenes.images[batch.indices])
        assert not batch.flipped.any()
    mirrored = open_set(preset("scenes", train_images=12, flip=True), "train")
    batch = next(Loader(mirrored, 12, seed=0).epoch(0))
    assert mirrored.flip and batch.flipped.any()
    expected = [
        scenes.images[i].flip(-1) if f else scenes.images[i] for i, f in zip(batch.indices, batch.flipped, strict=True)
    ]
    assert torch.equal(batch.images, torch.stack(expected))


@pytest.fixture
def damaged(folder, tmp_path):
    """Links to the images, with room for broken ones among 250."""
    for i in range(250):
        (tmp_path / f"{i:03d}.png").symlink_to(folder / f"{i % COUNT:03d}.png")
    return tmp_path


def damage(root, number):
    """A truncated JPEG under the name of an image, or a text file where number is odd."""
    path = root / f"{number:03d}.png"
    path.unlink()
    if number % 2:
        path.write_text("this is not an image")
        return
    Image.effect_noise((64, 64), 90).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:700])


def test_corrupt_images_are_replaced_deterministically(damaged):
    damage(damaged, 10)
    damage(damaged, 31)
    loaders = [Loader(random_crops(damaged), 50, seed=5, workers=w) for w in (0, 0, 3)]
    first, again, threads = (list(loader.epoch(2)) for loader in loaders)
    assert_same(first, again)
    assert_same(first, threads)
    assert_same(first[3:], loaders[0].epoch(2, start_step=3))
    used = torch.cat([b.indices for b in first])
    assert len(used) == 250 and not {10, 31} & set(used.tolist())
    for loader in loaders:
        assert sorted(loader.corrupt) == [str(damaged / "010.png"), str(damaged / "031.png")]
    assert "truncated" in loaders[2].corrupt[str(damaged / "010.png")]
    assert "not an image of a known format" in loaders[2].corrupt[str(damaged / "031.png")]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_corrupt_stops(damaged, workers):
    for number in (10, 31, 77):
        damage(damaged, number)
    with pytest.raises(UserError, match=r"3 of 250 images .* are corrupt or missing, more than 1%: image "):
        list(Loader(random_crops(damaged), 50, workers=workers).epoch(0))


def test_nothing_but_missing_images(damaged):
    images = random_crops(damaged)
    for path in damaged.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        next(Loader(images, 50, workers=2).epoch(0))


def test_a_single_corrupt_image_of_few_is_tolerated(folder, tmp_path):
    for i in range(8):
        (tmp_path / f"{i:03d}.png").symlink_to(folder / f"{i:03d}.png")
    damage(tmp_path, 3)
    loader = Loader(random_crops(tmp_path), 8)
    assert 3 not in next(loader.epoch(0)).indices
    assert list(loader.corrupt) == [str(tmp_path / "003.png")]


def test_leaving_early_ends_the_threads(folder):
    batches = Loader(random_crops(folder), 2, workers=2).epoch(0)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


@pytest.fixture
def processes(monkeypatch):
    """Workers are processes, however few."""
    monkeypatch.setattr(loader_module, "MAX_THREADS", 0)


def children_end(seconds=3.0):
    """Whether no worker process is left within that time."""
    gc.collect()
    until = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.05)
    return not multiprocessing.active_children()


def test_processes_change_nothing(processes, folder, damaged):
    """Order, crops, resuming, corrupt images and the too many of them are those of one thread; they stay for the
    next epoch, end when an epoch is left early, and draw nothing from torch's generator."""
    for number in (10, 31):
        damage(damaged, number)
    images = random_crops(damaged)
    alone, workers = Loader(images, 50, seed=5), Loader(images, 50, seed=5, workers=2)
    before = torch.get_rng_state()
    assert_same(alone.epoch(2), workers.epoch(2))
    assert torch.equal(before, torch.get_rng_state())
    assert workers.corrupt == alone.corrupt and len(workers.corrupt) == 2
    started = {child.pid for child in multiprocessing.active_children()}
    assert len(started) == 2
    assert_same(itertools.islice(alone.epoch(3), 2, None), workers.epoch(3, start_step=2))
    assert list(workers.epoch(0, start_step=5)) == []
    assert {child.pid for child in multiprocessing.active_children()} == started
    damage(damaged, 77)
    with pytest.raises(UserError, match=r"3 of 250 images .* are corrupt or missing, more than 1%: image "):
        list(workers.epoch(0))
    assert children_end()
    batches = Loader(random_crops(folder), 4, workers=2).epoch(1)
    next(batches)
    batches.close()
    assert children_end()


def test_a_process_that_dies_is_reported(processes, folder):
    loader = Loader(random_crops(folder), 1, workers=1)
    batches = loader.epoch(0)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a process of --workers 1 ended unexpectedly \(.*\): use fewer"):
        list(batches)
    del batches, loader
    assert children_end()


class Broken(Folder):
    """Reading fails for a reason that is not the image's; defined here because processes import it."""

    error = OSError

    def prepared(self, index):
        raise self.error("the disk is gone")


@pytest.mark.parametrize("error", [OSError, RuntimeError])
@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_come_through(processes, folder, monkeypatch, workers, error):
    images = Broken(folder, image_size=16)
    images.error = error
    with pytest.raises(error, match="the disk is gone"):
        next(Loader(images, 4, workers=workers).epoch(0))
    assert children_end()


def test_a_script_that_is_not_guarded(folder, tmp_path):
    """Processes import the script that starts them; that has to end in a sentence, not in a hang."""
    script = tmp_path / "script.py"
    script.write_text(f"""
from spot_fast.data import Folder, Loader
next(Loader(Folder({str(folder)!r}, image_size=16), 4, workers=5).epoch(0))
""")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "UserError: a process of --workers 5 ended unexpectedly" in done.stderr
    assert done.stderr.strip().endswith("or have a script's own code below if __name__ == '__main__'")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "--batch-size 0"),
        (dict(batch_size=24), "has 23 training images, fewer than --batch-size 24"),
        (dict(batch_size=2, workers=-1), "--workers -1"),
        (dict(batch_size=2, seed=-1), "--seed -1"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(UserError, match=message):
        Loader(random_crops(folder), **options)
