"""Folders and lists of images."""

import numpy as np
import pytest
from PIL import Image

from spot_fast.data.folder import Folder, list_images
from spot_fast.errors import UserError


@pytest.fixture
def tree(tmp_path):
    for name in ("b/two.PNG", "b/c/three.jpeg", "one.jpg", ".hidden/four.jpg", "b/.five.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_recursive_sorted_without_hidden_files(tree):
    found = [str(path.relative_to(tree)) for path in list_images(tree)]
    assert found == ["b/c/three.jpeg", "b/two.PNG", "one.jpg"]
    assert list_images([tree / "one.jpg", str(tree / "b")])[0] == tree / "one.jpg"


def test_pictures(tree):
    images = Folder(tree, image_size=16, limit=2)
    assert len(images) == 2 and not images.has_masks
    assert images.label(0) == str(tree / "b/c/three.jpeg")
    assert images.val_image(0).shape == images.train_image(1, np.random.default_rng(0)).shape == (3, 16, 16)


def test_missing_things_are_named(tree):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list_images("nowhere")
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        list_images([tree / "one.jpg", tree / "empty"])
    with pytest.raises(UserError, match="no images given"):
        Folder([])
