"""Small image files for tests of loaders and caches."""

import numpy as np
from PIL import Image

from spot_fast.data import Folder
from spot_fast.errors import CorruptImage


def make_images(root, count, size=(40, 24), seed=0, ending="png"):
    """`count` images of noise, named 000.png and so on."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(root / f"{i:03d}.{ending}")
    return root


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def folder(root, **options):
    return Folder(root, **({"image_size": 16} | options))


def unreadable(monkeypatch, name):
    """Reading the image of that name fails as on a server that does not answer, until the patch is undone."""
    real = Folder.encoded

    def fails(images, index):
        if images.paths[index].name == name:
            raise CorruptImage(f"image {images.paths[index]} cannot be read: Input/output error")
        return real(images, index)

    monkeypatch.setattr(Folder, "encoded", fails)
