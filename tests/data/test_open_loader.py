"""--loader: who decodes, and the line that says why."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast.config import preset
from spot_fast.data import Loader, open_set
from spot_fast.data.datasets.folder import Folder
from spot_fast.data.loading import dali_pipeline
from spot_fast.data.loading.open_loader import open_loader
from spot_fast.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
has_dali = pytest.mark.skipif(bool(dali_pipeline.unavailable(CPU)), reason=dali_pipeline.unavailable(CPU))


@pytest.fixture
def images(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
    return Folder(tmp_path, image_size=16)


@pytest.fixture
def without_dali(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali")

    monkeypatch.setattr(dali_pipeline, "import_dali", missing)


@pytest.mark.parametrize(
    "choice, workers, device, line",
    [
        ("torch", 0, CUDA, "by Pillow in the training thread: --loader torch"),
        ("torch", 1, CPU, "by Pillow in one thread: --loader torch"),
        ("torch", 5, CPU, "by Pillow in 5 processes: --loader torch"),
        ("auto", 2, CPU, "by Pillow in 2 threads: the run is on cpu"),
        ("auto", 2, CUDA, f"by Pillow in 2 threads: DALI is not installed, {dali_pipeline.INSTALL}"),
    ],
)
def test_pillow(images, without_dali, choice, workers, device, line):
    loader, reason = open_loader(choice, images, 4, 3, workers, device, rank=1, world=2)
    assert type(loader) is Loader and reason == f"images are decoded {line}"
    assert (loader.batch_size, loader.seed, loader.workers, loader.rank, loader.world) == (4, 3, workers, 1, 2)


def test_dali_that_is_not_there_is_one_sentence(images, without_dali):
    with pytest.raises(UserError) as caught:
        open_loader("dali", images, 4, 0, 2, CPU)
    assert str(caught.value) == f"--loader dali: DALI is not installed, {dali_pipeline.INSTALL}"


def test_an_amd_gpu_has_no_dali(images, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert open_loader("auto", images, 4, 0, 2, CUDA)[1].endswith("in 2 threads: DALI needs an NVIDIA GPU")
    with pytest.raises(UserError, match="^--loader dali: DALI needs an NVIDIA GPU, or use --loader torch$"):
        open_loader("dali", images, 4, 0, 2, CUDA)


@has_dali
def test_dali(images):
    loader, reason = open_loader("dali", images, 4, 3, 2, CPU, rank=1, world=2)
    assert reason == "images are decoded by DALI on the CPU (other formats than JPEG by Pillow)"
    assert (type(loader).__name__, loader.batch_size, loader.seed, loader.workers) == ("DaliLoader", 4, 3, 2)
    assert (loader.rank, loader.world) == (1, 2)
    assert next(loader.epoch(0)).images.shape == (2, 3, 16, 16)


@has_dali
def test_a_gpu_that_dali_cannot_use(images, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("the driver is too old\nand much more")

    monkeypatch.setattr("spot_fast.data.loading.dali_loader.Pipeline", fails)
    _, reason = open_loader("auto", images, 4, 0, 2, CUDA)
    assert (
        reason == "images are decoded by Pillow in 2 threads: DALI does not start (RuntimeError: the driver is too old)"
    )
    with pytest.raises(
        UserError, match=r"^--loader dali does not start \(RuntimeError: the driver is too old\): use --loader torch"
    ):
        open_loader("dali", images, 4, 0, 2, CUDA)


def test_images_in_memory_are_not_decoded():
    scenes = open_set(preset("scenes", train_images=12), "train")
    for choice in ("auto", "dali", "torch"):
        loader, reason = open_loader(choice, scenes, 4, 0, 2, CUDA)
        assert type(loader) is Loader and reason == "scenes are in memory: nothing is decoded"


def test_unknown_choice(images):
    with pytest.raises(UserError, match="--loader opencv is unknown"):
        open_loader("opencv", images, 4, 0, 2, CPU)


def test_dali_is_imported_only_where_it_is_used():
    """Importing what chooses a loader must not need DALI, nor its seconds."""
    code = "import sys, spot_fast.data.loading.open_loader; sys.exit('nvidia.dali' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("cores, world, expected", [(2, 1, 2), (64, 1, 16), (16, 4, 4), (2, 8, 1)])
def test_workers_are_the_cores(monkeypatch, tmp_path, cores, world, expected):
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    loader, _ = open_loader("torch", Folder(tmp_path, image_size=8), 8, 0, None, CPU, world=world)
    assert loader.workers == expected
