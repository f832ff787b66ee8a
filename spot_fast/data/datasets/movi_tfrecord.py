"""MOVi-C and MOVi-E as they are released: TFRecord shards such as movi_c-train.tfrecord-00000-of-01024.

Both sizes of the release, 128 × 128 and 256 × 256 pixels, have the same names and are read alike.

A record is a clip. Its feature "video" is a list of encoded RGB frames, "segmentations" a list of encoded maps of
instance numbers, 0 for the background (Kubric, challenges/movi). Clips are numbered in the order in which TensorFlow
Datasets reads them unshuffled: conversions to PNG clips name their folders so, 00000000 and so on, and both give the
same nine frames a clip (`movi.draw_frames`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from spot_fast.data.base import ImageFiles, Masks
from spot_fast.data.datasets import movi, tfrecord
from spot_fast.data.masks import fit
from spot_fast.data.masks.labels import open_labels
from spot_fast.errors import CorruptImage, UserError

_PRESETS = ("movi_c", "movi_e")
_SHARD = re.compile(r"(?P<set>.+)-(?P<split>train|validation)\.tfrecord-\d{5}-of-(?P<count>\d{5})")
_OTHER_SHARD = re.compile(r".+-(train|validation)\.(?P<format>array_record|riegeli|parquet)-\d{5}-of-\d{5}")
_DEPTH = 6  # folders below the root that are searched
_INTERLEAVED, _BLOCK = 16, 16  # files that TensorFlow Datasets reads in turn, and records per turn
LARGE = 256  # side of the larger release, in pixels
VIDEO, MASKS = "video", "segmentations"  # names of the features


class MoviRecords(ImageFiles):
    """One split ("train" or "val") of the shards under `root`, as `movi.Movi` gives it.

    release: which set to take if `root` holds several, such as "movi_c". Opening reads the headers of the records that
    `limit` frames need (0 = all). UserError names a shard that is missing, cut off or damaged, CorruptImage a record.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        release: str = "",
        mask_size: int = 128,
        crop: str = "stretch",
        limit: int = 0,
        frames_per_clip: int = movi.TRAIN_FRAMES,
        **geometry: Any,
    ) -> None:
        self.name = f"MOVi {split}"
        self.has_masks = split == "val"
        self.shards = find_shards(Path(root), movi.SPLITS[split], release)
        self._offsets: dict[tuple[int, str], list[tuple[int, int]]] = {}
        self.records: list[tfrecord.Record] = []
        self.frames: list[tuple[int, int]] = []  # clip and frame of each image
        count = 0
        for clip, record in enumerate(read_order(map(shard_records, self.shards))):
            self.records.append(record)
            count = count or len(self._offsets_of(clip, VIDEO))  # all clips have as many frames as the first
            every = list(range(count))
            drawn = every if self.has_masks else movi.draw_frames(_clip_name(clip), every, frames_per_clip)
            self.frames += [(clip, frame) for frame in drawn]
            if limit and len(self.frames) >= limit:
                del self.frames[limit:]
                break
        if not self.frames:
            raise UserError(
                f"{self.shards[0].parent} has no frames in its {movi.SPLITS[split]} shards: download them again"
            )
        paths = [self.records[clip].path / _clip_name(clip) / f"{frame:08d}_image.png" for clip, frame in self.frames]
        super().__init__(paths, mask_size=mask_size, crop=crop, **geometry)
        self.drawn = f"{frames_per_clip} frames a clip"
        self._shard_indices = {path: index for index, path in enumerate(dict.fromkeys(r.path for r in self.records))}

    def label(self, index: int) -> str:
        return f"{self.paths[index].parent.name}/{self.paths[index].name}"

    def encoded(self, index: int) -> bytes:
        return self._stored(index, VIDEO)

    def val_masks(self, index: int) -> Masks:
        if not self.has_masks:
            raise UserError(f"{self.name} is read without masks: evaluate on the validation clips")
        source = self.paths[index].with_suffix(f".{MASKS}")
        labels = open_labels(source, self._stored(index, MASKS))
        self.fitting(index, labels.shape[::-1], source)
        return Masks(self.square_labels(labels))

    def sources(self) -> list[Path]:
        return list(self._shard_indices)

    def source(self, index: int) -> int:
        return self._shard_indices[self.records[self.frames[index][0]].path]

    def _stored(self, index: int, feature: str) -> bytes:
        clip, frame = self.frames[index]
        offsets = self._offsets_of(clip, feature)
        if frame >= len(offsets):
            raise CorruptImage(
                f"clip {_clip_name(clip)} ({self.records[clip]}) has {len(offsets)} {feature}, none for frame {frame}"
            )
        return tfrecord.read(self.records[clip], *offsets[frame])

    def _offsets_of(self, clip: int, feature: str) -> list[tuple[int, int]]:
        """(offset, length) of each frame of a clip, kept for its later images."""
        offsets = self._offsets.get((clip, feature))
        if offsets is None:
            offsets = tfrecord.Example(self.records[clip]).bytes_list(feature)
            if not offsets:
                raise CorruptImage(f'{self.records[clip]} has no feature "{feature}": it is not a clip of MOVi')
            self._offsets[clip, feature] = offsets
        return offsets


def open_clips(root: str | Path, split: str, *, release: str = "", side: int = 0, **options: Any) -> ImageFiles:
    """Opens one split of MOVi under `root`: PNG clips if there are any, else TFRecord shards.

    side: of the frames that the preset is for, in pixels, which UserError demands; 0 for the preset of any.
    """
    clips = _open_clips(root, split, release=release, **options)
    try:
        size = fit.stored_size(clips.paths[0], clips.encoded(0))
    except CorruptImage:  # reported when it is read
        return clips
    if side and size != (side, side):
        raise UserError(
            f"--data {root} holds frames of {size[0]} x {size[1]}, not {side} x {side}: use --preset {release}"
        )
    if not side and size == (LARGE, LARGE):
        clips.notes = (f"frames are {LARGE} x {LARGE}: --preset {release}_{LARGE} also compares masks at that size",)
    return clips


def _open_clips(root: str | Path, split: str, *, release: str, **options: Any) -> ImageFiles:
    if (Path(root) / movi.SPLITS[split]).is_dir():  # a listing of its millions of files would take minutes
        return movi.Movi(root, split, **options)
    if not releases(Path(root))[movi.SPLITS[split]]:
        refuse_other_formats(Path(root))
        return movi.Movi(root, split, **options)  # its error names what is missing
    return MoviRecords(root, split, release=release, **options)


def find_shards(root: Path, split: str, release: str = "") -> list[Path]:
    """All shards of a split ("train" or "validation") under `root`, in order, existing or not.

    UserError if there are none, or several sets between which `release` does not decide.
    """
    found = releases(root)[split]
    if not found:
        refuse_other_formats(root)
        raise UserError(f"--data {root} has no {split} shards: MOVi needs {movi.EXPECTED}")
    of_release = [key for key in found if key[1] == release] or found
    if len(of_release) > 1:
        names = ", ".join(f"{folder}/{name}-{split}.tfrecord-*-of-{count}" for folder, name, count in of_release)
        raise UserError(f"--data {root} has several sets ({names}): give the folder of one of them")
    folder, name, count = of_release[0]
    if release and name in _PRESETS and name != release:
        raise UserError(f"--data {root} holds {name}, not {release}: add --preset {name}")
    return [folder / f"{name}-{split}.tfrecord-{number:05d}-of-{count}" for number in range(int(count))]


def releases(root: Path) -> dict[str, list[tuple[Path, str, str]]]:
    """(folder, name such as "movi_c", number of shards as written) of the sets under `root`, by split."""
    found: dict[str, dict[tuple[Path, str, str], None]] = {split: {} for split in movi.SPLITS.values()}
    for folder, file in _files(root):
        if shard := _SHARD.fullmatch(file):
            found[shard["split"]][folder, shard["set"], shard["count"]] = None
    return {split: list(sets) for split, sets in found.items()}


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """(folder, name) of the files under `root` that may be shards."""
    depth = len(root.parts)
    for folder, inside, files in os.walk(root):
        # Unfinished downloads have folders of their own.
        inside[:] = sorted(name for name in inside if "incomplete" not in name and not name.startswith("."))
        if len(Path(folder).parts) - depth >= _DEPTH:
            inside.clear()
        yield from ((Path(folder), file) for file in files)


def refuse_other_formats(root: Path) -> None:
    """UserError if `root` holds shards that TensorFlow Datasets wrote in a format that is not read here."""
    for folder, file in _files(root):
        if shard := _OTHER_SHARD.fullmatch(file):
            convert = f"tfds convert_format --dataset_dir={folder} --out_file_format=tfrecord --out_dir=OTHER_DIR"
            raise UserError(
                f"{folder} holds {shard['format']} ({file}), which is not read: convert it with {convert}, "
                'download MOVi as it is released, or prepare it with tfds.builder(NAME, file_format="tfrecord")'
            )


def shard_records(path: Path) -> Iterator[tfrecord.Record]:
    """The clips of a shard; UserError if it is missing, cut off or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: download all shards of the split (a few are enough for as many "
            "--train-images or --val-images as they hold)"
        )
    return tfrecord.records(path)


def read_order(files: Iterable[Iterator[tfrecord.Record]]) -> Iterator[tfrecord.Record]:
    """Records in the order of an unshuffled tfds.load: blocks of 16 in turn from 16 open files."""
    waiting, more = iter(files), True
    turns: list[Iterator[tfrecord.Record] | None] = [None] * _INTERLEAVED
    while more or any(file is not None for file in turns):
        for turn, file in enumerate(turns):
            # TFDS replaces a file that has ended only when its turn comes again.
            if file is None and (file := next(waiting, None)) is None:
                more = False
                continue
            block = list(islice(file, _BLOCK))
            yield from block
            turns[turn] = file if len(block) == _BLOCK else None


def _clip_name(clip: int) -> str:
    return f"{clip:08d}"
