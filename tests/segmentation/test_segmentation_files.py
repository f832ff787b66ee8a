"""Images on a command line, names of their outputs, and that no output replaces another file."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from spot_fast.errors import UserError
from spot_fast.segmentation.files import (
    OVERLAY,
    SLOTS,
    Origin,
    check_overwriting,
    find_images,
    output_names,
    save,
    save_tensors,
)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)
    return path


def names(sources, out="out"):
    return [name for _, name in find_images(sources, Path(out))]


def test_names_are_relative_to_the_folder_or_list_of_an_image(tmp_path):
    for name in ("a/x.jpg", "a/sub/y.v2.png", "b/x.jpg"):
        image(tmp_path / name)
    (tmp_path / "b" / "some.txt").write_text("x.jpg\n../a/x.jpg\n")
    assert names([tmp_path / "a"]) == ["sub/y.v2", "x"]
    assert names([tmp_path / "a" / "x.jpg"]) == ["x"]
    assert names([tmp_path / "b" / "some.txt"]) == ["x", "x"]
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a/sub/y.v2", "a/x", "b/x"]


def test_an_image_named_twice_is_one(tmp_path):
    one = image(tmp_path / "a" / "x.jpg")
    assert [path for path, _ in find_images([one, tmp_path / "a", one], tmp_path / "out")] == [one]


def test_a_file_without_an_ending_may_be_an_image_or_a_list(tmp_path):
    image(tmp_path / "x.png").rename(tmp_path / "photo")
    (tmp_path / "list").write_text("photo\n")
    assert names([tmp_path / "photo"]) == ["photo"] and names([tmp_path / "list"]) == ["photo"]
    (tmp_path / "nothing").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="neither a folder, nor an image"):
        names([tmp_path / "nothing"])


def test_equal_stems_and_inputs_get_numbers(tmp_path):
    inputs = [tmp_path / name for name in ("x_overlay.png", "a/x.jpg")]
    assert output_names(["x", "X", "x-2", "y"], inputs, tmp_path) == ["x-2", "X-3", "x-2-2", "y"]


@pytest.mark.parametrize("kind", ["png", "safetensors"])
def test_outputs_are_overwritten_for_the_same_image_and_model_only(tmp_path, kind):
    origin = Origin("x.jpg", "/images/x.jpg", "run a")
    ending = OVERLAY if kind == "png" else SLOTS
    path = tmp_path / f"sub/x_{ending}"
    if kind == "png":
        save(Image.new("RGB", (2, 2)), path, origin.metadata())
    else:
        save_tensors({"slots": torch.zeros(2)}, path, origin.metadata())
    check_overwriting(tmp_path, ["sub/x"], [origin], [ending])
    for other in (Origin("x.jpg", "/others/x.jpg", "run a"), Origin("x.jpg", "/images/x.jpg", "run b")):
        with pytest.raises(UserError, match="not of the same image and model: choose another --out, or add"):
            check_overwriting(tmp_path, ["sub/x"], [other], [ending])
    path.write_bytes(b"a user's file")
    with pytest.raises(UserError, match="not of the same image"):
        check_overwriting(tmp_path, ["sub/x"], [origin], [ending])


def test_outputs_do_not_tell_where_the_image_lies(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "x.png", Origin("x.jpg", "/secret/x.jpg", "run /secret/a").metadata())
    assert b"secret" not in (tmp_path / "x.png").read_bytes()


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.: free some space"):
        save(Image.new("RGB", (2, 2)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
