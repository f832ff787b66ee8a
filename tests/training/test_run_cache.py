"""Training on files with features, pixels or nothing cached: the same weights and losses to the last bit."""

import errno
from dataclasses import replace

import pytest

from image_files import make_images, truncate
from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.checkpoints.runs import save_tensors
from spot_fast.data.datasets import folder as folder_module
from spot_fast.errors import UserError
from spot_fast.training import trainer as trainer_module
from spot_fast.training.run_cache import frozen_fields
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, assert_same_run, go_on, metrics, tiny, train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """22 images, one of them cut off."""
    root = make_images(tmp_path_factory.mktemp("images"), 22, size=(48, 32))
    truncate(root / "013.png")
    return root


@pytest.fixture
def on_files(monkeypatch, images, tmp_path):
    """Runs on the images, with a cache folder of their own: (mode, config) → run folder."""

    def open_files(config, split):
        return folder_module.Folder(images, image_size=config.image_size, crop=config.crop, flip=config.flip)

    monkeypatch.setattr(trainer_module, "open_set", open_files)

    def run(mode, config, teacher=None):
        config = replace(config, cache=mode, cache_dir=str(tmp_path / "cache"))
        return train(tmp_path, config, teacher if config.stage == 2 else None)[0]

    return run


def small(stage=1, **changes):
    return tiny(stage, **({"eval_images": 0, "epochs": 3, "warmup_steps": 5, "flip": True} | changes))


@pytest.mark.parametrize("stage, precision", [(1, "float32"), (2, "float32"), (2, "bf16")])
def test_features_on_disk(on_files, stage, precision, teacher):
    config = small(stage, precision=precision)
    runs = [on_files(mode, config, teacher) for mode in ("none", "features", "features")]
    for run in runs[1:]:  # built, then read
        assert_same_run(runs[0], run)
    assert all("013.png" in (run / "corrupt.txt").read_text() for run in runs)
    assert len(metrics(runs[0])) > 5


def test_dali_with_and_without_cache(on_files, tmp_path_factory, images, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    jpegs = make_images(tmp_path_factory.mktemp("jpegs"), 22, size=(60, 45), ending="jpg")
    truncate(jpegs / "013.jpg")
    monkeypatch.setattr(
        trainer_module,
        "open_set",
        lambda config, split: folder_module.Folder(jpegs, image_size=config.image_size, flip=config.flip),
    )
    by_dali = [on_files(mode, small(loader="dali")) for mode in ("none", "features", "features", "pixels", "pixels")]
    for run in by_dali[1:]:
        assert_same_run(by_dali[0], run)
    by_pillow = on_files("features", small(loader="torch"))  # not from the features of DALI's pixels
    losses = [[line["loss"] for line in metrics(run) if line["kind"] == "epoch"] for run in (by_dali[0], by_pillow)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert "013.jpg" in (by_dali[0] / "corrupt.txt").read_text()


def test_features_are_of_weights_and_of_what_computes_with_them(tmp_path):
    """Heads do not show in the weights: two files that are equal bit for bit give other features."""
    shape = "vit:patch=8,width=16,depth=1,hidden=16,heads="
    weights = frozen_encoder(tiny(encoder=f"{shape}2", train_blocks=0)).vit.state_dict()
    keys = set()
    for place, (name, heads, change) in enumerate(
        [("a", 2, 0), ("renamed", 2, 0), ("a", 4, 0), ("a", 2, 1), ("a", 2, 0)]
    ):
        file = tmp_path / f"{name}.safetensors"
        weights["norm.bias"] += change
        save_tensors(file, weights, {})
        config = tiny(encoder=f"{shape}{heads}", encoder_weights=str(file), train_blocks=0)
        trainer = Trainer(config, device=CPU)
        keys.add(frozen_fields(config, trainer.forward, trainer.encoder_metadata["encoder_sha256"], "torch")[0].key)
        assert len(keys) == (1, 1, 2, 3, 3)[place]
        weights["norm.bias"] -= change


def test_stage_2_reads_the_targets_of_stage_1(on_files, teacher, tmp_path):
    on_files("features", small())
    (targets,) = (tmp_path / "cache").glob("features-target-*")
    before = (targets / "rows.bin").stat().st_mtime_ns
    on_files("features", small(2), teacher)
    assert {path.name.split("-")[1] for path in (tmp_path / "cache").iterdir()} == {"target", "hidden"}
    assert (targets / "rows.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("crop", ["center", "random"])
def test_pixels_on_disk(on_files, crop, tmp_path):
    config = small(crop=crop)
    runs = [on_files(mode, config) for mode in ("none", "pixels", "pixels")]
    for run in runs[1:]:
        assert_same_run(runs[0], run)
        assert "013.png" in (run / "corrupt.txt").read_text()
    assert len(list((tmp_path / "cache").glob("pixels-*"))) == 1


def test_whole_images_are_decoded_by_pillow(on_files):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    with pytest.raises(UserError, match="--cache pixels keeps whole images, as Pillow .*--loader torch"):
        on_files("pixels", small(crop="random", loader="dali"))


def test_auto_says_what_it_chose(on_files, capsys):
    on_files("auto", small(crop="random"))
    assert "a random crop of image folder has unlimited outcomes" in capsys.readouterr().out
    on_files("auto", small())
    assert "features of 22 images, mirrored and not" in capsys.readouterr().out


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_cache_that_fails_costs_a_note_where_nobody_asked_for_it(on_files, monkeypatch, capsys, crop):
    """A quota, another user's folder: the run goes on without, and ends in the same bits."""
    plain = on_files("none", small(crop=crop))

    def refused(path, size):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("spot_fast.data.caching.store._appended", refused)
    assert_same_run(plain, on_files("auto", small(crop=crop)))
    assert "nothing is cached: the cache " in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be written .Disk quota exceeded.: free some space"):
        on_files("pixels", small(crop=crop))


def test_a_run_goes_on_with_its_own_images_wherever_they_lie(tmp_path, monkeypatch):
    """As many other images of the same names would be trained on without a word."""
    roots = {name: tmp_path / name for name in ("own", "copy", "other")}
    for root in roots.values():
        root.mkdir()
        make_images(root, 22, size=(48, 32), seed=root.name == "other")
    (roots["copy"] / "000.png").write_bytes((roots["other"] / "000.png").read_bytes())
    given = ["own"]
    monkeypatch.setattr(
        trainer_module,
        "open_set",
        lambda config, split: folder_module.Folder(roots[given[0]], image_size=config.image_size),
    )
    path, _ = train(tmp_path, small(epochs=1, cache="none"))
    given[0] = "other"
    with pytest.raises(UserError, match="cannot be resumed: 16 of 16 training images .*: give --data their folder"):
        go_on(path, small(epochs=1, cache="none"))
    given[0] = "copy"
    assert go_on(path, small(epochs=1, cache="none")).finished
