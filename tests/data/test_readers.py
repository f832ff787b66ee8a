"""A data set of one's own touches two registries: every command then knows it as it knows the package's own."""

import csv
import shlex

import numpy as np
import pytest
from PIL import Image

from spot_fast import data, evaluate, presets, recipes, train
from spot_fast.config import preset
from spot_fast.data.__main__ import main as data_main
from spot_fast.data.base import ImageFiles, ImageSet, Masks

TINY = (
    "--encoder spot_scenes --encoder-weights none --image-size 32 --mask-size 32 --num-slots 3 --slot-dim 16 "
    "--slot-mlp 16 --dec-blocks 1 --dec-heads 4 --epochs 1 --batch-size 4 --warmup-steps 0 --precision float32 "
    "--no-tensorboard --threads 1 --cache none"
).split()


class Boxes(ImageFiles):
    """Images of one folder, with boxes in boxes.csv."""

    def __init__(self, root, split, *, image_size, mask_size, crop, flip, limit=0):
        self.boxes = {name: tuple(map(int, box)) for name, *box in csv.reader((root / "boxes.csv").open())}
        self.name, self.has_masks = f"boxes {split}", split == "val"
        paths = [root / name for name in self.boxes]
        super().__init__(paths[: limit or None], image_size=image_size, mask_size=mask_size, crop=crop, flip=flip)

    def val_masks(self, index):
        labels = np.zeros(self.rgb(index).size[::-1], np.int32)
        left, top, right, bottom = self.boxes[self.paths[index].name]
        labels[top:bottom, left:right] = 1
        return Masks(self.square_labels(labels))


class Plain(ImageSet):
    """The images of `Boxes`, from no files that the package knows of."""

    has_masks = True

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return f"image {index}"

    def prepared(self, index):
        return self.files.prepared(index)

    val_image = prepared

    def val_masks(self, index):
        return self.files.val_masks(index)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for n in range(4):
        Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / f"{n}.png")
    (tmp_path / "boxes.csv").write_text("".join(f"{n}.png,3,3,20,20\n" for n in range(4)))

    def register(wrap=lambda files: files):
        reader = data.Reader(
            lambda root, split, **options: wrap(Boxes(tmp_path, split, **options)),
            "a folder with boxes.csv",
            recognises=lambda path: (path / "boxes.csv").is_file(),
            remarks=lambda image_set: ["boxes are rough"],
        )
        monkeypatch.setitem(data.READERS, "boxes", reader)
        settings = recipes.DataSet("images with boxes", "boxes", recipes.DATA_SETS["coco"].values)
        monkeypatch.setitem(recipes.DATA_SETS, "boxes", settings)
        return tmp_path

    return register


def test_every_command_knows_a_registered_data_set(folder, tmp_path, monkeypatch, capsys):
    place, run = folder(), tmp_path / "run"
    assert presets.main(["boxes"]) == 0 and "--preset boxes --data DATA" in capsys.readouterr().out
    assert data_main(["check", str(place), "--decode"]) == 0
    out = capsys.readouterr().out
    assert f"{place}: boxes\n" in out and "val    4 images, masks" in out and "note: boxes are rough" in out
    command = out.splitlines()[-1]
    assert f"--preset boxes --data {place} --batch-size 4" in command
    words = shlex.split(command)[3:]
    assert train.main([*words, *TINY, "--out", str(run)]) == 0
    assert evaluate.main([str(run)]) == 0 and "mBO" in capsys.readouterr().out
    assert train.main(["--preset", "boxes"]) == 2
    assert "--preset boxes needs --data PATH, a folder with boxes.csv" in capsys.readouterr().err


def test_a_set_that_is_not_of_files_is_checked_by_reading_it(folder, capsys):
    place = folder(Plain)
    assert data_main(["check", str(place)]) == 0 and "val    4 images, masks" in capsys.readouterr().out
    (place / "2.png").write_bytes(b"text")
    data_main(["check", str(place), "--decode"])
    assert "image 2: image " in capsys.readouterr().out


def test_built_in_readers_have_a_recipe_each():
    assert list(data.READERS) == list(recipes.DATA_SETS)


def test_a_preset_without_reader_names_those_there_are(monkeypatch):
    monkeypatch.delitem(data.READERS, "voc")
    with pytest.raises(ValueError, match="--preset voc has no data set: use scenes, coco, movi_c"):
        data.open_set(preset("voc"), "train")
