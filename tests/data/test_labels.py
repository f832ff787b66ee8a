"""Label images: formats that keep labels, formats that do not, soft edges, and labels of every size."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from spot_fast.data.masks.labels import open_labels, open_lossless
from spot_fast.errors import UserError


def scene(objects, *, size=(90, 60), radius=(1, 9), seed=0, order="random"):
    """int32 label map of ellipses, numbered at random, from left to right, or as Cityscapes numbers them."""
    rng = np.random.default_rng(seed)
    image = Image.new("I", size)
    draw = ImageDraw.Draw(image)
    centres = rng.uniform(0, size, (objects, 2))
    numbers = rng.permutation(objects) + 1
    if order == "sorted":
        centres, numbers = centres[np.lexsort(centres.T)], np.arange(objects) + 1
    if order == "cityscapes":
        numbers = rng.integers(24, 34, objects) * 1000 + np.arange(objects)
    for (x, y), number in zip(centres, numbers, strict=True):
        width, height = rng.uniform(*radius, 2)
        draw.ellipse([x - width, y - height, x + width, y + height], fill=int(number))
    return np.array(image)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["m.png", "m.tif", "m.gif", "m.bmp", "m.pgm", "m.tga"])
def test_lossless_formats(tmp_path, name):
    """Grey values come back as they are, from every format that keeps them; Pillow renumbers the greys of a GIF."""
    labels = scene(6) * 30
    assert np.array_equal(open_labels(save(tmp_path / name, Image.fromarray(labels.astype(np.uint8)))), labels)


def test_palettes_of_gif_and_bmp_are_indices(tmp_path):
    labels = scene(6)
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 80, 0, 80, 0, 80, 80])
    for name in ("m.gif", "m.bmp", "m.tiff"):
        assert np.array_equal(open_labels(save(tmp_path / name, image)), labels)


@pytest.mark.parametrize(
    "dtype, number", [(np.uint16, 40_000), (np.uint16, 65_535), (np.int32, 16_000_000), (np.float32, 40_000)]
)
def test_deep_labels_are_not_wrapped(tmp_path, dtype, number):
    labels = np.array([[0, 1], [number, number]], dtype)
    assert open_labels(save(tmp_path / "m.tif", Image.fromarray(labels))).tolist() == [[0, 1], [number, number]]


@pytest.mark.parametrize(
    "values",
    [
        np.int32([[0, -1]]),
        np.float32([[0, 0.5]]),
        np.float32([[0, np.nan]]),
        np.float32([[0, np.inf]]),
        np.float32([[0, 3e9]]),
    ],
)
def test_values_that_are_no_labels(tmp_path, values):
    """A negative one would pass for a pixel that is not counted."""
    with pytest.raises(UserError, match="m.tif has labels from .*: expected whole numbers"):
        open_labels(save(tmp_path / "m.tif", Image.fromarray(values)))


@pytest.mark.parametrize(
    "kind, options, name",
    [
        ("JPEG", {}, "a JPEG"),
        ("WEBP", {"quality": 80}, "a WEBP"),
        ("TIFF", {"compression": "jpeg"}, "a TIFF with lossy"),
    ],
)
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_lossy_formats_are_refused_whatever_their_ending(tmp_path, kind, options, name, ending):
    image = Image.fromarray(((scene(3) > 0) * 255).astype(np.uint8))
    path = save(tmp_path / f"m{ending}", image, format=kind, **options)
    for read in (open_labels, open_lossless):
        with pytest.raises(UserError, match=rf"m{ending} is {name}.* \([1-9]\d* labels seen\): masks have to be"):
            read(path)


def test_several_pages_are_refused(tmp_path):
    """A page for each instance: the first alone would be one object."""
    pages = [Image.new("L", (8, 8), n) for n in range(3)]
    path = save(tmp_path / "m.tif", pages[0], save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match="m.tif has 3 pages"):
        open_labels(path)


SMOOTHED = {
    "halved": lambda image: image.resize((45, 30), Image.Resampling.BILINEAR),
    "doubled": lambda image: image.resize((180, 120), Image.Resampling.BILINEAR),
    "much larger": lambda image: image.resize((450, 300), Image.Resampling.BICUBIC),
    "scaled": lambda image: image.resize((117, 78), Image.Resampling.LANCZOS),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "from a JPEG": lambda image: Image.open(io.BytesIO(_jpeg(image))),
}


def _jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return file.getvalue()


@pytest.mark.parametrize("smooth", SMOOTHED.values(), ids=SMOOTHED)
@pytest.mark.parametrize("objects", [1, 4])
def test_soft_edges_are_refused(tmp_path, smooth, objects):
    """Every grey along an edge would be an instance."""
    labels = scene(objects, radius=(6, 15), seed=objects) * (255 // objects)
    path = save(tmp_path / "m.png", smooth(Image.fromarray(labels.astype(np.uint8))))
    with pytest.raises(UserError, match=r"m.png has soft edges: \d+ of the \d+ labels seen lie between others"):
        open_labels(path)


@pytest.mark.parametrize("order", ["random", "sorted", "cityscapes"])
@pytest.mark.parametrize("radius", [(0, 1), (0.4, 0.6), (0, 2), (1, 3), (2, 30)])
@pytest.mark.parametrize("objects", [1, 2, 3, 8, 60, 300])
def test_small_objects_are_no_soft_edges(tmp_path, objects, radius, order):
    """Down to single pixels, crowded, in any numbering, and where the nearest neighbour has shrunk them."""
    for seed in range(3):
        labels = scene(objects, size=(160, 120), radius=radius, seed=seed, order=order)
        for seen in (labels, labels[::2, ::2]):
            path = save(tmp_path / "m.png", Image.fromarray(seen.astype(np.uint16)))
            assert np.array_equal(open_labels(path), seen)


@pytest.mark.parametrize("cell", [2, 3, 5])
def test_packed_cells_are_no_soft_edges(tmp_path, cell):
    """Superpixels, numbered from left to right: each lies between a smaller and a larger one."""
    rows = np.arange(96) // cell
    labels = (rows[:, None] * rows.max() + rows).astype(np.uint16)
    assert np.array_equal(open_labels(save(tmp_path / "m.png", Image.fromarray(labels))), labels)
