"""The segment command: images of any size and shape in; overlays, label maps, soft masks and slots out."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import untrained_runs
from spot_fast import segment
from spot_fast.config import preset
from spot_fast.model.encoder import normalise
from spot_fast.random_streams import Stream, seed_of
from spot_fast.segmentation import batch, overlays, record
from untrained_runs import TINY


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A finished run of an untrained model."""
    return untrained_runs.untrained(tmp_path_factory.mktemp("work") / "runs" / "untrained", preset("scenes", **TINY))


@pytest.fixture
def run(untrained, monkeypatch, tmp_path):
    """Calls main in a folder with nothing but runs/untrained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(untrained.path.parent)
    return lambda *argv: segment.main([str(a) for a in argv])


def photo(path, size=(90, 50), **options):
    rng = np.random.default_rng(sum(size))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def written(folder):
    """Names of the files in a folder, but for the record."""
    return {path.name for path in folder.iterdir()} - {record.NAME}


def labels_of(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


@pytest.mark.parametrize("size", [(90, 50), (31, 200), (64, 64), (1, 1), (4000, 1)])
def test_any_size_and_shape_stretched(run, untrained, tmp_path, size):
    source = photo(tmp_path / "photo.png", size)
    assert run(source, "--precision", "float32") == 0
    square = Image.open(source).resize((96, 96), Image.Resampling.BILINEAR)
    noise = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed_of(Stream.SEGMENTATION_SLOTS, 0)))
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    output = untrained.model.segment(normalise(image), noise=noise)
    for ending, masks in (("labels", output.masks), ("slot_labels", output.slot_attn)):
        labels = labels_of(tmp_path / "segments" / f"photo_{ending}.png")
        assert np.array_equal(labels, overlays.labels_at(masks[0], size[1], size[0]))
    panel = overlays.panel_size(*size)
    with Image.open(tmp_path / "segments" / "photo_overlay.png") as overlay:
        assert overlay.width > 3 * panel[0] and overlay.height > panel[1]


def test_any_size_and_shape_in_its_own_shape(run, tmp_path):
    sizes = [(90, 50), (31, 200), (64, 64), (1, 1)]
    for size in sizes:
        photo(tmp_path / "in" / f"{size[0]}.png", size)
    assert run(tmp_path / "in", "--fit", "interpolate", "--soft", "--slots", "--no-overlay") == 0
    for width, height in sizes:
        assert labels_of(tmp_path / "segments" / f"{width}_labels.png").shape == (height, width)
        soft = load_file(tmp_path / "segments" / f"{width}_soft.safetensors")
        assert soft["decoder"].shape == soft["slots"].shape
        _, rows, columns = soft["decoder"].shape
        assert min(rows, columns) == 12 and (columns > rows) == (width > height)
        slots = load_file(tmp_path / "segments" / f"{width}_slots.safetensors")
        assert slots["slots"].shape == (6, 16) and len(soft["decoder"]) == 6
        assert torch.allclose(soft["decoder"].sum(0).float(), torch.ones(rows, columns), atol=5e-3)
    assert not list((tmp_path / "segments").glob("*_overlay.png"))


def test_a_square_image_is_the_same_stretched_and_interpolated(run, tmp_path):
    source = photo(tmp_path / "photo.png", (80, 80))
    for fit in ("stretch", "interpolate"):
        assert run(source, "--fit", fit, "--soft", "--out", tmp_path / fit) == 0
    one, other = (load_file(tmp_path / fit / "photo_soft.safetensors") for fit in ("stretch", "interpolate"))
    assert all(torch.equal(one[kind], other[kind]) for kind in ("decoder", "slots"))


@pytest.mark.parametrize("fit", ["stretch", "interpolate"])
def test_batch_size_and_workers_change_no_label(run, tmp_path, fit):
    for i in range(9):
        photo(tmp_path / "in" / f"{i}.png", (40 + 5 * (i // 2), 60))
    for size, workers in ((1, 1), (8, 3)):
        assert (
            run(
                tmp_path / "in",
                "--batch-size",
                size,
                "--workers",
                workers,
                "--precision",
                "float32",
                "--fit",
                fit,
                "--no-overlay",
                "--out",
                tmp_path / str(size),
            )
            == 0
        )
    names = written(tmp_path / "1")
    assert len(names) == 18
    for name in names:
        assert np.array_equal(labels_of(tmp_path / "1" / name), labels_of(tmp_path / "8" / name)), name


def test_repeats_are_equal_and_leave_nothing_else(run, tmp_path):
    source = photo(tmp_path / "photo.png")
    names = {
        f"photo_{kind}"
        for kind in ("overlay.png", "labels.png", "slot_labels.png", "soft.safetensors", "slots.safetensors")
    }
    for out in ("a", "b"):
        assert run(source, "--out", tmp_path / out, "--orders", "all", "--run", "untrained", "--soft", "--slots") == 0
        assert written(tmp_path / out) == names
    for name in names:
        one, other = tmp_path / "a" / name, tmp_path / "b" / name
        if one.suffix == ".png":
            assert one.read_bytes() == other.read_bytes()
        else:  # their header has no fixed order
            assert _contents(one) == _contents(other)


def _contents(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}


def test_masks_that_were_not_asked_for_are_not_written(run, tmp_path):
    source = photo(tmp_path / "photo.png")
    for masks, name in (("decoder", "photo_labels.png"), ("slots", "photo_slot_labels.png")):
        out = tmp_path / masks
        assert run(source, "--masks", masks, "--soft", "--out", out) == 0
        assert written(out) == {name, "photo_overlay.png", "photo_soft.safetensors"}
        assert list(load_file(out / "photo_soft.safetensors")) == [masks]


def test_metadata_names_image_model_and_settings(run, tmp_path):
    source = photo(tmp_path / "photo.png", (90, 50))
    assert run(source, "--slots", "--fit", "interpolate") == 0
    with safe_open(tmp_path / "segments" / "photo_slots.safetensors", framework="pt") as file:
        about = file.metadata()
    expected = {
        "image": str(source),
        "model": "run runs/untrained",
        "fit": "interpolate",
        "orders": "0",
        "width": "90",
        "height": "50",
    }
    assert expected.items() <= about.items()


def test_folders_lists_scenes_and_grid(run, tmp_path):
    photo(tmp_path / "in" / "sub" / "one.jpg")
    photo(tmp_path / "in" / "turned.jpg", exif=_turned())
    (tmp_path / "in" / "list.txt").write_text("turned.jpg\nmissing.jpg\n")
    assert run(tmp_path / "in", "--scenes", 2, "--grid", tmp_path / "new" / "grid.png") == 0
    root = tmp_path / "segments"
    labels = sorted(str(path.relative_to(root)) for path in root.rglob("*_labels.png") if "slot" not in path.name)
    assert labels == ["scene_000_labels.png", "scene_001_labels.png", "sub/one_labels.png", "turned_labels.png"]
    assert labels_of(root / "turned_labels.png").shape == (90, 50)  # upright by EXIF
    assert labels_of(root / "scene_001_labels.png").shape == (96, 96)
    assert Image.open(tmp_path / "new" / "grid.png").width > 6 * 200
    assert run(tmp_path / "in" / "list.txt", "--out", tmp_path / "listed", "--masks", "decoder") == 0
    assert written(tmp_path / "listed") == {"turned_labels.png", "turned_overlay.png"}


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_another_image_or_model_is_not_overwritten(run, tmp_path, capsys):
    one, other = photo(tmp_path / "a" / "x.png", (9, 9)), photo(tmp_path / "b" / "x.png", (8, 7))
    labels = tmp_path / "segments" / "x_labels.png"
    assert run(one) == 0 and run(one, "--orders", "all") == 0
    before = labels.read_bytes()
    assert run(other) == 2 and run(one, "--encoder", "spot_scenes", "--encoder-weights", "none") == 2
    assert "x_labels.png and 2 more exist and are not of the same image and model" in capsys.readouterr().err
    assert labels.read_bytes() == before
    assert run(other, "--overwrite") == 0 and labels_of(labels).shape == (7, 8)


def test_outputs_of_earlier_calls_are_not_images(run, tmp_path):
    source = photo(tmp_path / "in" / "photo.png")
    other = photo(tmp_path / "in" / "my_overlay.png")
    for _ in range(2):
        assert run(source.parent, "--out", source.parent) == 0
    assert len(written(other.parent)) == 2 + 2 * 3


@pytest.mark.parametrize(
    "mode, ending",
    [
        ("L", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("I;16", "png"),
        ("CMYK", "jpg"),
        ("1", "png"),
        ("F", "tiff"),
    ],
)
def test_any_mode(run, tmp_path, mode, ending):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8))
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / f"photo.{ending}")
    assert run(tmp_path / f"photo.{ending}", "--no-overlay") == 0
    assert labels_of(tmp_path / "segments" / "photo_labels.png").shape == (30, 40)


def test_the_first_frame_of_an_animation(run, tmp_path):
    frames = [Image.open(photo(tmp_path / f"{i}.png", (40 + i, 40))).resize((40, 40)) for i in range(2)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "still.webp", lossless=True)
    assert run(tmp_path / "moving.webp", tmp_path / "still.webp") == 0
    moving, still = (labels_of(tmp_path / "segments" / f"{name}_labels.png") for name in ("moving", "still"))
    assert np.array_equal(moving, still)


def test_corrupt_image_is_named_and_the_others_done(run, tmp_path, capsys):
    good, bad = photo(tmp_path / "good.png"), tmp_path / "bad.jpg"
    bad.write_text("no image")
    assert run(bad, good) == 0
    printed = capsys.readouterr()
    assert f"skipped: image {bad} cannot be read: not an image of a known format" in printed.err
    assert "1 of 2 could not be read" in printed.err and "1 image in " in printed.out
    assert written(tmp_path / "segments") == {
        "good_overlay.png",
        "good_labels.png",
        "good_slot_labels.png",
    }
    assert run(bad) == 2
    assert "error: no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "nothing to segment: name images"),
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (["--scenes", "1", "--run", "nowhere"], "run nowhere is not a folder"),
        (["--scenes", "-1"], "--scenes is -1: use 0 or more"),
        (["--scenes", "1", "--size", "64"], "--size 64: a run keeps the size it was trained with"),
        (
            ["--scenes", "1", "--size", "9999", "--fit", "interpolate"],
            "--size 9999 with --fit interpolate: use 8 to 512",
        ),
        (["--scenes", "1", "--encoder-weights", "x"], "--encoder-weights belongs to --encoder NAME"),
        (["--scenes", "1", "--run", "r", "--encoder", "e"], "--run r has its own encoder"),
        (["--scenes", "1", "--encoder", "e", "--slots"], "--slots belongs to a run"),
        (["--scenes", "1", "--encoder", "e", "--masks", "slots"], "--masks slots belongs to a run"),
        (["--scenes", "1", "--device", "nonsense"], "--device nonsense cannot be used"),
        (
            ["--scenes", "1", "--encoder", "spot_scenes", "--encoder-weights", "none", "--clusters", "145"],
            "use 1 to 144",
        ),
        (["--scenes", "1", "--encoder", "spot_scenes", "--encoder-weights", "none", "--size", "-8"], "--size -8"),
        (
            ["--scenes", "1", "--encoder", "spot_scenes", "--encoder-weights", "none", "--size", "60"],
            "60 is not a multiple of the encoder's patch size 8",
        ),
        (["--scenes", "1", "--grid", "grid.jpg"], "--grid grid.jpg: give the name of a .png file"),
        (["--scenes", "1", "--batch-size", "0"], "--batch-size is 0: use 1 or more"),
        (["--scenes", "1", "--workers", "0"], "--workers is 0: use 1 or more"),
        (["--scenes", "1", "--precision", "tf32", "--device", "cpu"], "--precision tf32 needs an NVIDIA GPU"),
    ],
)
def test_bad_arguments_are_one_sentence(run, capsys, argv, message):
    assert run(*argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_grid_is_not_written_over_an_image(run, tmp_path, capsys):
    source = photo(tmp_path / "photo.png")
    before = source.read_bytes()
    assert run(source, "--grid", source) == 2 and source.read_bytes() == before
    assert "is one of the images" in capsys.readouterr().err


def test_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("--scenes", 1, "--out", tmp_path / "file") == 2
    assert "cannot be made (" in capsys.readouterr().err


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


def test_large_images_are_worked_on_one_at_a_time(run, tmp_path, monkeypatch):
    """Whatever the number of threads, memory is for one; labels, skipping and names are as for small ones."""
    for i in range(4):
        photo(tmp_path / "in" / f"{i}.png", (40, 40 + i))
    (tmp_path / "in" / "bad.png").write_text("no image")
    assert run(tmp_path / "in", "--workers", 3, "--out", tmp_path / "small") == 0
    at_once, most, prepare = [], [], batch._prepare

    def counted(*arguments):
        at_once.append(0)
        most.append(len(at_once))
        try:
            return prepare(*arguments)
        finally:
            at_once.pop()

    monkeypatch.setattr(batch, "_LARGE", 100)
    monkeypatch.setattr(batch, "_prepare", counted)
    assert run(tmp_path / "in", "--workers", 3, "--out", tmp_path / "large") == 0
    assert most == [1] * 4
    for name in written(tmp_path / "small"):
        assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
