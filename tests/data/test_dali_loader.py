"""The DALI loader on the CPU: the images of Loader in the order of Loader, with pixels within a stated distance.

The distance comes from rounding (Pillow rounds between its two passes, DALI does not) and from the image's border,
where the filter reaches beyond it: Pillow weighs what is there anew, DALI repeats the last pixel.
"""

import contextlib
import io
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data import Folder, Loader, open_set
from spot_fast.data.loading.dali_pipeline import EncodedImage, Pipeline, Request, unavailable
from spot_fast.errors import UserError
from spot_fast.model.encoder import normalise

missing = unavailable(torch.device("cpu"))
if missing:
    pytest.skip(missing, allow_module_level=True)

from spot_fast.data.loading import dali_loader  # noqa: E402
from spot_fast.data.loading.dali_loader import DaliLoader  # noqa: E402

SIZE = 96
COUNT = 23


def photo(seed, width, height):
    """Noise with a photo's spectrum."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(width, height)) ** -1.2
    values = np.fft.ifft2(amplitude * np.exp(2j * np.pi * rng.random((3, height, width)))).real
    values = 128 + 50 * (values + values[:1]) / values.std()
    return Image.fromarray(values.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def translucent(mode):
    image = photo(5, 160, 120).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return dict(exif=exif.tobytes(), quality=90)


KINDS = {
    "photo": (photo(0, 640, 480), "JPEG", dict(quality=90)),
    "portrait": (photo(1, 480, 640), "JPEG", dict(quality=90)),
    "odd": (photo(2, 333, 227), "JPEG", dict(quality=75, subsampling=1)),
    "panorama": (photo(3, 900, 100), "JPEG", dict(quality=90)),
    "small": (photo(4, 40, 24), "JPEG", dict(quality=95)),
    "progressive": (photo(5, 320, 240), "JPEG", dict(progressive=True)),
    "grey": (photo(6, 320, 240).convert("L"), "JPEG", {}),
    "cmyk": (photo(7, 320, 240).convert("CMYK"), "JPEG", {}),
    "stored as rgb": (photo(8, 320, 240), "JPEG", dict(keep_rgb=True)),
    "png": (photo(9, 256, 256), "PNG", {}),
    "palette": (photo(10, 160, 120).convert("P"), "PNG", {}),
    "rgba": (translucent("RGBA"), "PNG", {}),
    "grey and alpha": (translucent("L"), "PNG", {}),
    "16 bits": (Image.fromarray(np.arange(120 * 160, dtype=np.uint16).reshape(120, 160) * 3), "PNG", {}),
    "bilevel": (photo(11, 160, 120).convert("1"), "PNG", {}),
    "gif": (photo(12, 160, 120).convert("P"), "GIF", {}),
    "webp": (photo(13, 160, 120), "WEBP", {}),
} | {f"orientation {o}": (photo(20 + o, 320, 240), "JPEG", turned(o)) for o in range(1, 9)}


def written(folder, kinds=KINDS):
    for number, (image, kind, options) in enumerate(kinds.values()):
        image.save(folder / f"{number:03d}.bin", kind, **options)
    return [folder / f"{number:03d}.bin" for number in range(len(kinds))]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return written(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 small JPEGs, some upright and some wide."""
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        photo(i, *((60, 44) if i % 3 else (44, 60))).save(root / f"{i:03d}.jpg", quality=92)
    return root


def random_crops(folder, **options):
    return Folder(folder, image_size=32, crop="random", flip=True, **options)


def assert_close(batches, others, most=12):
    """The same images in the same order, as of two loaders, whose pixels differ by `most` levels."""
    for a, b in itertools.zip_longest(batches, others):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.flipped, b.flipped)
        assert a.images.dtype == b.images.dtype == torch.uint8
        assert (a.images.int() - b.images.int()).abs().max() <= most


def assert_same(batches, others):
    """Bit for bit, as of one loader."""
    assert_close(batches, others, most=0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["center", "random", "stretch"])
def test_pixels_of_every_kind_of_image(kinds, crop, flip):
    """Bilinear: 1 level and, where the filter reaches over the border, 8; bicubic: 9, and 18 for black and white,
    because Pillow cuts overshoot off between its passes. On average 0.35 of a level at most."""
    images = Folder(kinds, image_size=SIZE, crop=crop, flip=flip)
    dali, pillow = (kind(images, len(kinds), seed=3) for kind in (DaliLoader, Loader))
    (ours,), (pillows,) = dali.epoch(0), pillow.epoch(0)
    assert torch.equal(ours.indices, pillows.indices) and torch.equal(ours.flipped, pillows.flipped)
    assert flip == bool(ours.flipped.any())
    assert ours.images.dtype == torch.uint8 and ours.images.shape == (len(kinds), 3, SIZE, SIZE)
    differences = (ours.images.int() - pillows.images.int()).abs()
    for index, difference in zip(ours.indices.tolist(), differences, strict=True):
        name = list(KINDS)[index]
        harsh = crop == "stretch" and name == "bilevel"
        most, inside = (18, 18) if harsh else (9, 9) if crop == "stretch" else (8, 1)
        assert difference.max() <= most, name
        assert difference[:, 2:-2, 2:-2].max() <= inside, name
        assert difference.float().mean() <= (1.5 if harsh else 0.35), name
    assert not dali.corrupt and not dali._by_pillow


def test_features_of_the_packaged_encoder(kinds):
    """What the pixels' distance does to what the model sees: half a percent of an image's features."""
    encoder = frozen_encoder(preset("scenes"))
    images = Folder(kinds, image_size=96)
    (ours,), (pillows,) = DaliLoader(images, len(kinds)).epoch(0), Loader(images, len(kinds)).epoch(0)
    ours, pillows = (encoder.finish(encoder.trunk(normalise(batch.images))) for batch in (ours, pillows))
    apart = (ours - pillows).norm(dim=(1, 2)) / pillows.norm(dim=(1, 2))
    assert apart.mean() < 0.01 and apart.max() < 0.02


def test_images_left_as_they_are_stored(kinds):
    images = Folder(kinds, image_size=SIZE)
    images.upright = False
    assert_close(DaliLoader(images, len(kinds)).epoch(0), Loader(images, len(kinds)).epoch(0))


def test_orientation_that_only_xmp_has(tmp_path):
    """Pillow reads it there, DALI does not; and what EXIF says goes first."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    photo(0, 120, 90).save(tmp_path / "0.jpg", xmp=xmp, quality=90)
    photo(1, 120, 90).save(tmp_path / "1.jpg", xmp=xmp, **turned(3))
    images = Folder(tmp_path, image_size=48)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg")).size == (90, 120)
    assert_close(DaliLoader(images, 2).epoch(0), Loader(images, 2).epoch(0), most=8)


@pytest.mark.parametrize("workers", [0, 3])
def test_order_and_resume(folder, workers):
    dali = DaliLoader(random_crops(folder), 4, seed=7, workers=workers)
    for epoch in (0, 3):
        whole = list(dali.epoch(epoch))
        assert len(whole) == 5
        assert_close(whole, Loader(random_crops(folder), 4, seed=7).epoch(epoch))
        for step in range(6):
            assert_same(whole[step:], dali.epoch(epoch, start_step=step))
    assert len(dali._idle) == 1  # one pipeline has served all epochs


def test_two_processes_see_what_one_does(folder):
    whole = DaliLoader(random_crops(folder), 4, seed=2).epoch(1)
    shares = (DaliLoader(random_crops(folder), 4, seed=2, rank=rank, world=2).epoch(1) for rank in range(2))
    for batch, first, second in itertools.zip_longest(whole, *shares):
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_output(folder, dtype):
    plain = DaliLoader(random_crops(folder), 4).epoch(0)
    for batch, raw in zip(DaliLoader(random_crops(folder), 4, dtype=dtype).epoch(0), plain, strict=True):
        assert batch.images.dtype == dtype and torch.equal(batch.indices, raw.indices)
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        assert torch.allclose(batch.images.float(), normalise(raw.images), rtol=tolerance, atol=1e-5)
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        DaliLoader(random_crops(folder), 4, dtype=torch.float16)


def damage(path, how):
    """Breaks the JPEG at `path`."""
    whole = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "end":
        path.write_bytes(whole[:-2])
    elif how == "text":
        path.write_text("this is not an image")
    elif how == "png":
        file = io.BytesIO()
        photo(0, 60, 44).save(file, "PNG")
        path.write_bytes(file.getvalue()[:1500])
    elif how == "tables":  # whole as far as the header goes, but no decoder can read it
        at = whole.index(b"\xff\xc4") + 5
        path.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])


@pytest.fixture
def many(folder, tmp_path):
    """Copies of the images, 250 in all."""
    for i in range(250):
        (tmp_path / f"{i:03d}.jpg").write_bytes((folder / f"{i % COUNT:03d}.jpg").read_bytes())
    return tmp_path


@pytest.mark.parametrize("hows", [("cut", "text"), ("end", "missing"), ("png", "tables"), ("tables", "tables")])
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_as_loader_does(many, hows, workers):
    images = random_crops(many)
    for number, how in zip((10, 31), hows, strict=True):
        damage(many / f"{number:03d}.jpg", how)
    dali, pillow = DaliLoader(images, 50, seed=5, workers=workers), Loader(images, 50, seed=5)
    first = list(dali.epoch(2))
    assert_close(first, pillow.epoch(2))
    assert dali.corrupt == pillow.corrupt and len(dali.corrupt) == 2
    assert len(dali._by_pillow) == hows.count("tables")  # all else is found before DALI sees it
    assert_same(first, dali.epoch(2))
    assert_same(first[3:], dali.epoch(2, start_step=3))


def test_a_replacement_at_which_dali_fails(many):
    images = random_crops(many)
    damage(many / "010.jpg", "cut")
    damage(many / f"{Loader(images, 50).load(0, 10).index:03d}.jpg", "tables")
    dali, pillow = DaliLoader(images, 50), Loader(images, 50)
    assert_close(dali.epoch(0), pillow.epoch(0))
    assert dali.corrupt == pillow.corrupt and len(dali.corrupt) == 2


def test_damage_that_pillow_does_not_mind(many):
    """Zeros in the middle of the scan, and bytes behind the end: Pillow decodes what there is, and so does DALI."""
    images = random_crops(many)
    file = many / "004.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:900] + bytes(50) + whole[950:])
    (many / "005.jpg").write_bytes((many / "005.jpg").read_bytes() + b"and more")
    dali, pillow = DaliLoader(images, 50), Loader(images, 50)
    assert_close(dali.epoch(0), pillow.epoch(0))
    assert dali.corrupt == pillow.corrupt == {}


@pytest.mark.parametrize("how", ["cut", "tables"])
def test_more_than_one_percent_corrupt_stops(many, how):
    images = random_crops(many)
    for number in (10, 31, 77):
        damage(many / f"{number:03d}.jpg", how)
    with pytest.raises(UserError, match=r"3 of 250 images .* are corrupt or missing, more than 1%: image "):
        list(DaliLoader(images, 50, workers=2).epoch(0))


def test_images_larger_than_pillow_opens_are_corrupt(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 44 // 2 - 1)
    with pytest.raises(UserError, match="exceeds the limit"):
        next(DaliLoader(random_crops(folder), 4).epoch(0))


@pytest.fixture
def with_gifs(folder, tmp_path, monkeypatch):
    """Twelve images; three are GIF, which DALI cannot decode, and are passed off as something it can."""
    for i in range(12):
        source = Image.open(folder / f"{i:03d}.jpg")
        if i in (3, 4, 9):
            source.convert("P").save(tmp_path / f"{i:03d}.jpg", "GIF")
        else:
            source.save(tmp_path / f"{i:03d}.jpg", quality=92)
    header = dali_loader.jpeg.plain_header

    def any_header(data):
        return dali_loader.jpeg.Header(*Image.open(io.BytesIO(data)).size, ()) if data[:3] == b"GIF" else header(data)

    monkeypatch.setattr(dali_loader.jpeg, "plain_header", any_header)
    return random_crops(tmp_path)


def test_an_image_at_which_dali_fails_is_pillows(with_gifs):
    """No step is lost and nothing counts as corrupt."""
    dali = DaliLoader(with_gifs, 3, seed=1, workers=2)
    first = list(dali.epoch(0))
    assert_close(first, Loader(with_gifs, 3, seed=1).epoch(0))
    assert dali._by_pillow == {3, 4, 9} and not dali.corrupt
    assert_same(first, dali.epoch(0))


def break_at(images, index, monkeypatch):
    """Reading image `index` fails for a reason that is not its own."""
    encoded = images.encoded

    def fails(asked):
        if asked == index:
            raise OSError("the disk is gone")
        return encoded(asked)

    monkeypatch.setattr(images, "encoded", fails)


def test_other_errors_come_through_after_the_batches_before_them(folder, monkeypatch):
    images = random_crops(folder)
    dali = DaliLoader(images, 4, seed=1)
    break_at(images, int(dali.steps(0)[3][0]), monkeypatch)
    batches = dali.epoch(0)
    assert_close(itertools.islice(batches, 3), itertools.islice(Loader(random_crops(folder), 4, seed=1).epoch(0), 3))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_other_errors_come_through_although_dali_has_failed_before_them(with_gifs, monkeypatch):
    dali = DaliLoader(with_gifs, 3, seed=1)
    steps = [set(step.tolist()) for step in dali.steps(0)]
    first = next(number for number, step in enumerate(steps) if step & {3, 4, 9})
    assert first < 3
    break_at(with_gifs, next(iter(steps[first + 1] - {3, 4, 9})), monkeypatch)
    batches = dali.epoch(0)
    assert len(list(itertools.islice(batches, first + 1))) == first + 1 and dali._by_pillow
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_leaving_early_leaves_nothing_behind(folder):
    dali = DaliLoader(random_crops(folder), 2, seed=1, workers=2)
    whole = list(dali.epoch(0))
    for _ in range(3):
        batches = dali.epoch(0)
        next(batches)
        batches.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
    assert_same(whole, dali.epoch(0))
    assert len(dali._idle) == 1


def test_two_epochs_at_once(folder):
    dali = DaliLoader(random_crops(folder), 4, seed=1)
    expected = [list(dali.epoch(epoch)) for epoch in (0, 1)]
    for pair in zip(zip(*expected, strict=True), zip(dali.epoch(0), dali.epoch(1), strict=True), strict=True):
        assert_same(*pair)


def test_sets_without_files_are_refused():
    with pytest.raises(ValueError, match="image_set is Scenes"):
        DaliLoader(open_set(preset("scenes", train_images=12), "train"), 4)


def test_on_a_gpu_the_host_waits_neither_for_dali_nor_for_the_copy(monkeypatch):
    """Outputs are bound to the stream that trains, and copied on it: DALI's defaults wait on the host for both."""
    asked = []

    class Images:
        def as_tensor(self):
            return self

        def shape(self):
            return [2, 3, 4, 4]

        def copy_to_external(self, target, stream=None, non_blocking=False):
            asked.append(("copy", stream.value, non_blocking))

    class Dali:
        def schedule_run(self):
            with contextlib.suppress(StopIteration):
                pipeline._next()

        def share_outputs(self, cuda_stream=None):
            asked.append(("outputs", cuda_stream.cuda_stream))
            return (Images(),)

        def release_outputs(self):
            asked.append("release")

        def reset(self):
            pass

    monkeypatch.setattr(Pipeline, "_build", lambda self, *arguments: Dali())
    monkeypatch.setattr(Pipeline, "_stream", lambda self: SimpleNamespace(cuda_stream=7))
    pipeline = Pipeline(2, 4, device=torch.device("cpu"))
    image = EncodedImage(np.zeros(3, np.uint8), np.zeros(2, np.float32), np.ones(2, np.float32))
    assert len(list(pipeline.run(iter([Request([image] * 2, np.zeros(2, bool))] * 3)))) == 3
    assert asked == [("outputs", 7), ("copy", 7, True), "release"] * 3
