"""The segment command: a picture of any size and shape in, an overlay and a label map of its own size out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spot_fast import checkpoint, pictures, segment
from spot_fast.config import preset
from spot_fast.encoder import encoder_identity, normalise
from spot_fast.errors import UserError
from spot_fast.model import Spot


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A finished run whose model knows nothing."""
    torch.manual_seed(0)
    config = preset("scenes", encoder_weights="none", dec_blocks=1, slot_dim=16, slot_mlp=16)
    encoder = checkpoint.frozen_encoder(config)
    folder = tmp_path_factory.mktemp("work") / "runs" / "untrained"
    folder.mkdir(parents=True)
    checkpoint.write_config(folder, config)
    identity = encoder_identity(encoder, config)
    checkpoint.save_tensors(folder / checkpoint.MODEL, Spot(config, encoder).learned_state_dict(),
                            {"encoder": identity["name"], "encoder_sha256": identity["sha256"]})
    return checkpoint.load_run(folder)


@pytest.fixture
def run(untrained, monkeypatch, tmp_path):
    """Calls main in a folder with nothing but runs/untrained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(untrained.path.parent)
    return lambda *argv: segment.main([str(a) for a in argv])


def picture(path, size=(90, 50), **options):
    rng = np.random.default_rng(sum(size))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def labels_of(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


@pytest.mark.parametrize("size", [(90, 50), (31, 200), (64, 64), (1, 1)])
def test_any_size_and_shape(run, untrained, tmp_path, size):
    source = picture(tmp_path / "photo.png", size)
    assert run(source) == 0
    labels = labels_of(tmp_path / "segments" / "photo_labels.png")
    assert labels.shape == (size[1], size[0]) and labels.max() < 6
    panel = pictures.panel_size(*size)
    with Image.open(tmp_path / "segments" / "photo_overlay.png") as overlay:
        assert overlay.width > 3 * panel[0] and overlay.height > panel[1]
    square = Image.open(source).resize((64, 64), Image.Resampling.BILINEAR)
    noise = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    masks = untrained.model.segment(normalise(image), noise=noise).masks[0]
    assert np.array_equal(labels, pictures.labels_at(masks, size[1], size[0]))


def test_repeats_are_equal_and_leave_nothing_else(run, tmp_path):
    source = picture(tmp_path / "photo.png")
    names = {f"photo_{kind}.png" for kind in ("overlay", "labels")}
    for out in ("a", "b"):
        assert run(source, "--out", tmp_path / out, "--orders", "all", "--run", "untrained") == 0
        assert {path.name for path in (tmp_path / out).iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_folders_scenes_and_sheet(run, tmp_path):
    picture(tmp_path / "in" / "sub" / "one.jpg")
    picture(tmp_path / "in" / "scene_001.jpg", exif=_turned())
    assert run(tmp_path / "in", "--scenes", 2, "--sheet", tmp_path / "new" / "sheet.png") == 0
    written = sorted(path.name for path in (tmp_path / "segments").glob("*_labels.png"))
    assert written == ["one_labels.png", "scene_000_labels.png", "scene_001-2_labels.png", "scene_001_labels.png"]
    assert labels_of(tmp_path / "segments" / "scene_001_labels.png").shape == (90, 50)  # upright by EXIF
    assert labels_of(tmp_path / "segments" / "scene_001-2_labels.png").shape == (64, 64)
    assert Image.open(tmp_path / "new" / "sheet.png").width > 6 * 64


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_equal_stems_and_inputs_are_not_overwritten(run, tmp_path):
    sizes = {"a/x.jpg": (9, 9), "b/X.png": (8, 7), "x-2.png": (6, 6)}
    a, b, c = (picture(tmp_path / name, size) for name, size in sizes.items())
    picture(tmp_path / "x_overlay.png", (5, 5))
    before = (tmp_path / "x_overlay.png").read_bytes()
    assert run(a, b, c, tmp_path / "x_overlay.png", "--out", tmp_path) == 0
    assert (tmp_path / "x_overlay.png").read_bytes() == before
    shapes = {path.name: labels_of(path).shape for path in tmp_path.glob("*_labels.png")}
    assert shapes == {"x-2_labels.png": (9, 9), "X-3_labels.png": (7, 8), "x-2-2_labels.png": (6, 6),
                      "x_overlay_labels.png": (5, 5)}


def test_corrupt_picture_is_named_and_the_others_done(run, tmp_path, capsys):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.jpg"
    bad.write_text("no picture")
    assert run(bad, good) == 2
    errors = capsys.readouterr().err
    assert f"skipped: image {bad} cannot be read: not an image of a known format" in errors
    assert "error: 1 image could not be read" in errors and "Traceback" not in errors
    assert {path.name for path in (tmp_path / "segments").iterdir()} == {"good_overlay.png", "good_labels.png"}


@pytest.mark.parametrize("argv, message", [
    ([], "nothing to segment: name images"),
    (["nowhere.jpg"], "nowhere.jpg does not exist"),
    (["--scenes", "1", "--run", "nowhere"], "run nowhere is not a folder"),
    (["--scenes", "-1"], "--scenes -1: use 0 or more"),
    (["--scenes", "1", "--size", "64"], "--size belongs to --encoder NAME"),
    (["--scenes", "1", "--encoder-weights", "x"], "--encoder-weights belongs to --encoder NAME"),
    (["--scenes", "1", "--run", "r", "--encoder", "e"], "--run r has its own encoder"),
    (["--scenes", "1", "--device", "nonsense"], "--device nonsense cannot be used"),
    (["--scenes", "1", "--encoder", "spot_scenes", "--encoder-weights", "none", "--clusters", "65"], "use 1 to 64"),
    (["--scenes", "1", "--encoder", "spot_scenes", "--encoder-weights", "none", "--size", "-8"], "--size -8"),
])
def test_bad_arguments_are_one_sentence(run, capsys, argv, message):
    assert run(*argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("--scenes", 1, "--out", tmp_path / "file") == 2
    assert "cannot be made (" in capsys.readouterr().err


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.: free some space"):
        segment.save(Image.new("RGB", (2, 2)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_clusters_of_an_encoder(run, tmp_path):
    """Two flat halves are two clusters, even to a random encoder: the boundary is where the colours change."""
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :40], image[:, 40:] = (250, 30, 30), (20, 40, 220)
    Image.fromarray(image).save(tmp_path / "halves.png")
    assert run(tmp_path / "halves.png", "--encoder", "spot_scenes", "--encoder-weights", "none", "--clusters", 2) == 0
    labels = labels_of(tmp_path / "segments" / "halves_labels.png")
    assert labels.shape == (40, 80)
    left, right = labels[:, :35], labels[:, 45:]
    assert max((left == k).mean() - (right == k).mean() for k in (0, 1)) > 0.9
