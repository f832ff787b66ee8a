"""MOVi's release gives what a conversion of it to PNG clips gives: images, masks, names and drawn frames."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tfrecord_files as files
from spot_fast.config import preset
from spot_fast.data import open_set
from spot_fast.data.datasets import movi, movi_tfrecord
from spot_fast.data.datasets.movi_tfrecord import MoviRecords, read_order
from spot_fast.data.loading.loader import Loader
from spot_fast.errors import CorruptImage, UserError

FRAMES, SIDE, OBJECTS = 24, 12, 5


def random_clip(seed):
    """Frames and maps of instance numbers."""
    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(FRAMES)]
    masks = [Image.fromarray(rng.integers(0, OBJECTS, (SIDE, SIDE), np.uint8)) for _ in range(FRAMES)]
    return frames, masks


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same five training and three validation clips as shards and as PNG clips."""
    root = tmp_path_factory.mktemp("movi")
    for split, per_shard in (("train", [2, 0, 3]), ("validation", [1, 2])):
        clips = [random_clip([len(split), i]) for i in range(sum(per_shard))]
        messages = iter([files.clip(*clip) for clip in clips])
        shards = [[next(messages) for _ in range(count)] for count in per_shard]
        files.write_shards(root / "tfds/movi_c/128x128/1.0.0", f"movi_c-{split}.tfrecord", shards)
        for number, (frames, masks) in enumerate(clips):
            folder = root / "png" / split / f"{number:08d}"
            folder.mkdir(parents=True)
            for t, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
                frame.save(folder / f"{t:08d}_image.png")
                for n in range(OBJECTS if split == "validation" else 0):
                    Image.fromarray((np.asarray(mask) == n).astype(np.uint8) * 255).save(
                        folder / f"{t:08d}_mask_{n:02d}.png"
                    )
    return root / "tfds", root / "png"


@pytest.mark.parametrize("inside", ["", "movi_c", "movi_c/128x128/1.0.0"])
def test_found_in_any_folder_above(both, inside):
    assert isinstance(open_set(preset("movi_c", data=str(both[0] / inside)), "train"), MoviRecords)


def test_training_images_are_those_of_the_png_clips(both):
    shards, clips = (open_set(preset("movi_c", data=str(root), image_size=16), "train") for root in both)
    assert len(shards) == 5 * 9 and not shards.has_masks and not shards.flip and not shards.random_crop
    assert [shards.label(i) for i in range(len(shards))] == [clips.label(i) for i in range(len(clips))]
    rng = np.random.default_rng(0)
    for i in range(len(clips)):
        assert torch.equal(shards.train_image(i, rng), clips.train_image(i, rng))


def test_validation_images_and_masks_are_those_of_the_png_clips(both):
    shards, clips = (open_set(preset("movi_c", data=str(root), image_size=16, mask_size=12), "val") for root in both)
    assert len(shards) == 3 * FRAMES and shards.has_masks and not shards.has_classes
    assert [shards.label(i) for i in range(len(shards))] == [clips.label(i) for i in range(len(clips))]
    for i in (0, 1, 30, 71):
        assert torch.equal(shards.val_image(i), clips.val_image(i))
        ours, theirs = shards.val_masks(i), clips.val_masks(i)
        assert torch.equal(ours.instances, theirs.instances) and len(ours.instances.unique()) == OBJECTS
        assert ours.classes is None and ours.ignore is None


def test_png_clips_are_opened_without_a_walk_through_them(both, monkeypatch):
    """MOVi has millions of such files."""
    monkeypatch.setattr(movi_tfrecord, "_files", lambda root: pytest.fail(f"{root} is searched"))
    assert len(movi_tfrecord.open_clips(both[1], "train")) == len(movi.Movi(both[1], "train"))


def test_threads_read_the_same_batches(both):
    loaders = [Loader(MoviRecords(both[0], "train", image_size=16), 10, seed=1, workers=workers) for workers in (0, 3)]
    batches = [list(loader.epoch(0)) for loader in loaders]
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.images, theirs.images)


def test_limit_needs_only_the_first_shards(both, tmp_path):
    """A part of the download is enough for a part of the images."""
    folder = tmp_path / "part"
    folder.mkdir()
    name = "movi_c-train.tfrecord-00000-of-00003"
    shutil.copy(both[0] / "movi_c/128x128/1.0.0" / name, folder)
    assert len(MoviRecords(folder, "train", limit=10)) == 10
    with pytest.raises(UserError, match="movi_c-train.tfrecord-00001-of-00003 is missing: download all shards"):
        MoviRecords(folder, "train")


def test_content_key_follows_the_shards(both, tmp_path):
    root = shutil.copytree(both[0], tmp_path / "copy")
    key = MoviRecords(root, "train").content_key()
    assert key == MoviRecords(root, "train").content_key()
    assert key != MoviRecords(root, "train", frames_per_clip=8).content_key()
    shard = next(root.rglob("movi_c-train.tfrecord-00002-*"))
    shard.touch()
    assert key != MoviRecords(root, "train").content_key()


@pytest.mark.parametrize("counts", [[3, 0, 2], [40], [17, 16, 1], [5] * 40, [16] * 20, [33, 2] * 12])
def test_reading_order_is_that_of_an_unshuffled_interleave(counts):
    """tf.data's interleave, state by state: 16 open files, 16 records of each in turn."""
    names = [[(file, record) for record in range(count)] for file, count in enumerate(counts)]
    expected, waiting, turn = [], list(names), 0
    current = [None] * 16
    while waiting or any(file is not None for file in current):
        if current[turn] is None and waiting:
            current[turn] = waiting.pop(0)[:]
        taken = 0
        while current[turn] is not None and taken < 16:
            if not current[turn]:
                current[turn] = None
                break
            expected.append(current[turn].pop(0))
            taken += 1
        turn = (turn + 1) % 16
    assert list(read_order(map(iter, names))) == expected
    if max(counts) <= 16:
        assert expected == sorted(expected)


def test_several_sets_are_told_apart_by_the_preset_or_named(both, tmp_path):
    message = files.clip(*random_clip(0))
    for name in ("movi_c", "movi_e"):
        files.write_shards(tmp_path / name, f"{name}-train.tfrecord", [[message]])
    assert len(open_set(preset("movi_e", data=str(tmp_path)), "train")) == 9
    with pytest.raises(UserError, match="holds movi_c, not movi_e: add --preset movi_c"):
        open_set(preset("movi_e", data=str(tmp_path / "movi_c")), "train")
    files.write_shards(tmp_path / "256x256", "movi_c-train.tfrecord", [[message]])
    files.write_shards(tmp_path / "1.0.0.incompleteA1", "movi_e-train.tfrecord", [[message]])
    assert len(open_set(preset("movi_e", data=str(tmp_path)), "train")) == 9
    with pytest.raises(UserError, match=r"has several sets \(.*256x256/movi_c-train.* give the folder of one"):
        open_set(preset("movi_c", data=str(tmp_path)), "train")


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match="has no validation shards: MOVi needs"):
        MoviRecords(tmp_path, "val")
    frames, masks = random_clip(1)
    no_clip = files.example({"image": files.bytes_feature([b"x"])})
    files.write_shards(tmp_path, "movi_c-train.tfrecord", [[no_clip]])
    with pytest.raises(CorruptImage, match='record 0 of .* has no feature "video": it is not a clip of MOVi'):
        MoviRecords(tmp_path, "train")
    files.write_shards(tmp_path, "movi_c-train.tfrecord", [[]])
    with pytest.raises(UserError, match="has no frames in its train shards"):
        MoviRecords(tmp_path, "train")
    both = [files.clip(frames, masks), files.clip(frames[:3], masks)]
    files.write_shards(tmp_path, "movi_c-validation.tfrecord", [both])
    val = MoviRecords(tmp_path, "val")
    val.val_image(FRAMES + 2)
    with pytest.raises(CorruptImage, match=r"clip 00000001 \(record 1 of .*\) has 3 video, none for frame 3"):
        val.val_image(FRAMES + 3)
    files.write_shards(tmp_path, "movi_c-train.tfrecord", [[files.clip(frames, masks)]])
    with pytest.raises(UserError, match="read without masks"):
        MoviRecords(tmp_path, "train").val_masks(0)


def test_damaged_frame_is_a_corrupt_image(tmp_path):
    """Like a damaged file: the loader replaces it."""
    frames, masks = random_clip(2)
    [path] = files.write_shards(tmp_path, "movi_c-train.tfrecord", [[files.clip(frames, masks)]])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x89PNG", b"\x89XNG"))
    train = MoviRecords(tmp_path, "train")
    with pytest.raises(CorruptImage, match=r"00000-of-00001/00000000/\d{8}_image.png cannot be read: not an image"):
        train.train_image(0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A clip of each split as the release at 256 × 256 has them: a square of object 3 in the left upper corner."""
    root = tmp_path_factory.mktemp("large")
    instances = np.zeros((256, 256), np.uint8)
    instances[:101, :99] = 3
    frame = Image.effect_noise((256, 256), 60).convert("RGB")
    for split in ("train", "validation"):
        clip = files.clip([frame] * 2, [Image.fromarray(instances)] * 2)
        files.write_shards(root / "movi_e/256x256/1.0.0", f"movi_e-{split}.tfrecord", [[clip]])
    return root, frame, instances


def test_frames_of_256_pixels(large):
    """Read whole: images are resized from 256, masks compared at that size; movi_e compares them at 128 and says so."""
    root, frame, instances = large
    images = open_set(preset("movi_e_256", data=str(root), image_size=256), "val")
    assert len(images) == 2 and not images.notes
    assert torch.equal(images.val_image(0), torch.from_numpy(np.asarray(frame).transpose(2, 0, 1).copy()))
    assert torch.equal(images.val_masks(1).instances, torch.from_numpy(instances.astype(np.int64)))
    assert len(open_set(preset("movi_e_256+336px", data=str(root)), "train")) == 2
    halved = open_set(preset("movi_e", data=str(root)), "val")
    assert halved.val_masks(0).instances.shape == (128, 128)
    assert halved.notes == ("frames are 256 x 256: --preset movi_e_256 also compares masks at that size",)


def test_the_preset_of_256_pixels_refuses_smaller_frames(both):
    for root in both:
        with pytest.raises(UserError, match=r"holds frames of 12 x 12, not 256 x 256: use --preset movi_c$"):
            open_set(preset("movi_c_256", data=str(root)), "val")
