"""What a folder holds, whether it is complete and whole, and how to train on it: `python -m spot_fast.data check`.

Every file is looked at, most of them only at both ends (`damage`); of TFRecord files every checksum is computed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from spot_fast.config import preset
from spot_fast.data.base import ImageFiles
from spot_fast.data.datasets import coco, folder, movi, movi_tfrecord, tfrecord, voc
from spot_fast.data.decoding.damage import data_damage, file_damage
from spot_fast.data.loading.loader import MAX_CORRUPT
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.errors import UserError
from spot_fast.training.schedule import learning_rate

SHOWN = 10  # damaged files that are printed
_BATCH = 64  # files a thread takes at a time

# Looks at one image or clip: (file, what is wrong with it) of all that is wrong.
Inspection = Callable[[], list[tuple[str, str]]]


@dataclass
class Split:
    """One split of what was found. trouble: why it cannot be opened; unit: what an inspection looks at."""

    name: str
    summary: str = ""
    inspections: list[Inspection] = field(default_factory=list)
    trouble: str = ""
    unit: str = "images"
    images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    bad_inspections: int = 0

    @property
    def usable(self) -> bool:
        """Whether it can be opened and no more of it is damaged than the loader puts up with."""
        return not self.trouble and self.bad_inspections <= max(1.0, MAX_CORRUPT * len(self.inspections))


@dataclass
class Found:
    """A recognised data set: what it is, its preset, its splits, and remarks that stop nothing."""

    title: str
    preset: str
    splits: list[Split]
    notes: list[str]


def find(path: Path, *, sbd: str | None = None, decode: bool = False) -> Found:
    """Recognises what is at `path` and lists what there is to inspect; UserError where it is no data set at all."""
    if not path.exists():
        raise UserError(f"PATH {path} does not exist: name the folder of a data set")
    annotations = path / "annotations"
    if any(
        (annotations / f"instances_{split}2017.json").is_file() or (path / inside / f"{split}2017").is_dir()
        for split in ("train", "val")
        for inside in ("", "images")
    ):
        return _of_files("COCO 2017", "coco", partial(coco.Coco, path), decode)
    if any(_is_voc(path / inside) for inside in ("", "VOC2012", "VOCdevkit/VOC2012")):
        return _of_files("PASCAL VOC 2012", "voc", partial(voc.Voc, path, sbd=sbd), decode)
    clips = (path / movi.SPLITS[split] for split in ("train", "val"))
    if any(next(clip.glob("*/*_image.png"), None) for clip in clips):
        return _of_files(
            "MOVi as PNG clips", _movi_preset(path), partial(movi.Movi, path, frames_per_clip=1 << 30), decode
        )
    released = [name for split in movi.SPLITS.values() for _, name, _ in movi_tfrecord.releases(path, split)]
    if released:
        name = "movi_e" if released[0] == "movi_e" else "movi_c"
        splits = [_of_shards(path, split, released[0], decode) for split in ("train", "val")]
        return Found(f"MOVi as TFRecord ({released[0]})", name, splits, [])
    found = _of_files(
        "image folder" if path.is_dir() else "list of images", "folder", partial(folder.Folder, path), decode
    )
    if found.splits[0].trouble:
        movi_tfrecord.refuse_other_formats(path)
        raise UserError(found.splits[0].trouble)
    return found


def _is_voc(folder: Path) -> bool:
    """Whether it has VOC's images; those of DAVIS and YouTube-VOS lie in folders of their own."""
    images = folder / "JPEGImages"
    return images.is_dir() and ((folder / "ImageSets" / "Segmentation").is_dir() or any(images.glob("*.*")))


def _movi_preset(path: Path) -> str:
    names = {part.lower() for part in path.absolute().parts}
    return "movi_e" if names & {"movi_e", "movi-e", "e"} else "movi_c"


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" + "s" * (number != 1)


def _of_files(title: str, name: str, reader: Callable[..., ImageFiles], decode: bool) -> Found:
    found = Found(title, name, [], [])
    seen: set[Path] = set()
    for split in ("train", "val"):
        try:
            image_set = reader(split)
        except UserError as error:
            found.splits.append(Split(split, trouble=str(error)))
            continue
        summary = _count(len(image_set), "image")
        if isinstance(image_set, movi.Movi):
            clips = len({path.parent for path in image_set.paths})
            summary = f"{_count(clips, 'clip')}, {_count(len(image_set), 'frame')}"
        if image_set.has_masks:
            summary += f", {_masks(image_set)}"
        elif split == "val":
            found.notes.append("no masks: it trains and segments, but cannot be evaluated")
        if split == "val" and name == "coco" and image_set.instances.class_of is not coco.CLASS_OF_CATEGORY:
            count = len(image_set.instances.class_of)
            found.notes.append(f"its {count} categories are its own, not COCO's: classes are their places in its list")
        if split == "train" and name == "voc" and len(image_set) != voc.TRAINAUG:
            names = _count(len(image_set), "name")
            found.notes.append(f"trainaug has {names} here and {voc.TRAINAUG:,} in published results")
        inspections = [
            partial(_inspect, image_set, index, path not in seen, decode) for index, path in enumerate(image_set.paths)
        ]
        seen.update(image_set.paths)
        found.notes += [note for note in image_set.notes if note not in found.notes]
        found.splits.append(Split(split, summary, inspections, images=len(image_set)))
    if name.startswith("movi"):
        found.notes.append("the files do not tell MOVi-C from MOVi-E: take the preset, movi_c or movi_e, that fits")
    return found


def _masks(image_set: ImageFiles) -> str:
    """How many masks a set has, in words."""
    instances = getattr(image_set, "instances", None)
    if instances is not None:
        return _count(sum(map(instances.count, image_set.listed)), "annotation")
    if isinstance(image_set, movi.Movi):
        return "masks"
    return _count(sum(len(image_set.mask_files(index)) for index in range(len(image_set))), "mask file")


def _inspect(image_set: ImageFiles, index: int, image: bool, decode: bool) -> list[tuple[str, str]]:
    """An image (unless it has been inspected already) and its masks."""
    path = image_set.paths[index]
    bad = [(str(path), reason)] if image and (reason := file_damage(path, decode=decode)) else []
    if not image_set.has_masks or bad and bad[0][1] == "missing":
        return bad
    try:
        files = image_set.mask_files(index)
        masks = [(str(file), reason) for file in files if (reason := file_damage(file))]
        if decode and not bad and not masks:
            image_set.val_masks(index)
    except UserError as error:
        masks = [(str(path), str(error))]
    return bad + masks


def _of_shards(path: Path, split: str, release: str, decode: bool) -> Split:
    try:
        shards = movi_tfrecord.find_shards(path, movi.SPLITS[split], release)
    except UserError as error:
        return Split(split, trouble=str(error))
    inspections: list[Inspection] = []
    troubles = []
    features = [movi_tfrecord.VIDEO] + [movi_tfrecord.MASKS] * (split == "val")
    for shard in shards:
        try:
            inspections += [
                partial(_inspect_record, record, features, decode) for record in movi_tfrecord.shard_records(shard)
            ]
        except UserError as error:
            troubles.append((str(shard), str(error)))
    count = len(inspections)
    found = Split(
        split,
        f"{_count(count, 'clip')} in {_count(len(shards), 'shard')}",
        inspections,
        unit="clips",
        images=movi.TRAIN_FRAMES * count,
        bad=troubles,
    )
    if not count:
        found.trouble = f"{shards[0].parent} has no clips in its {movi.SPLITS[split]} shards: download them again"
    if troubles:
        found.trouble = troubles[0][1]
        if len(troubles) > 1:
            found.trouble += f" ({len(troubles)} shards are missing or damaged)"
    return found


def _inspect_record(record: tfrecord.Record, features: list[str], decode: bool) -> list[tuple[str, str]]:
    try:
        data = tfrecord.verified(record)
        example = tfrecord.Example(record)
        troubles = []
        for feature in features:
            places = example.bytes_list(feature)
            if not places:
                troubles.append(f'no feature "{feature}"')
            for number, (offset, length) in enumerate(places):
                start = offset - record.offset
                damage = data_damage(record.path, data[start : start + length], decode=decode)
                troubles += [f"{feature} {number}: {damage}"] if damage else []
        return [(str(record), "; ".join(troubles))] if troubles else []
    except UserError as error:
        return [(str(record), str(error).removeprefix(f"{record} "))]


def inspect(found: Found, *, jobs: int = 2, progress: bool | None = None) -> None:
    """Runs the inspections on `jobs` threads and notes in each split what is bad."""
    total = sum(len(split.inspections) for split in found.splits)
    shown = None if progress is None else not progress
    with tqdm(total=total, desc="check", leave=False, disable=shown) as bar:
        for split in found.splits:
            batches = (split.inspections[start : start + _BATCH] for start in range(0, len(split.inspections), _BATCH))
            with closing(read_ahead(_run, batches, depth=4 * jobs, workers=jobs, name="check")) as futures:
                for future in futures:
                    results = future.result()
                    split.bad_inspections += sum(map(bool, results))
                    split.bad += chain.from_iterable(results)
                    bar.update(len(results))


def _run(batch: Iterable[Inspection]) -> list[list[tuple[str, str]]]:
    return [inspection() for inspection in batch]


def report(path: Path, found: Found, *, sbd: str | None = None) -> Iterator[str]:
    """Lines for the user; the last one is the command to train with, where there is one."""
    sentence = verdict(found)
    yield f"{path}: {found.title}"
    for split in found.splits:
        known = sentence if split.trouble == sentence else ""
        yield f"  {split.name:5}  {split.summary or known and 'not usable' or split.trouble}"
    bad = bad_files(found)
    if bad:
        yield f"missing or damaged: {len(bad):,}"
        yield from (f"  {name}: {reason}" for name, reason in list(bad.items())[:SHOWN])
        if len(bad) > SHOWN:
            yield f"  and {len(bad) - SHOWN:,} more: --list FILE writes them all"
    else:
        whole = not any(split.trouble for split in found.splits)
        yield "nothing is missing or damaged" if whole else "of the files that were found none is damaged"
    yield from (f"note: {note}" for note in found.notes)
    if sentence is None:
        yield "train with:"
        yield "  " + " ".join(_command(path, found, sbd))


def _command(path: Path, found: Found, sbd: str | None) -> Iterator[str]:
    yield f"python -m spot_fast.train --preset {found.preset} --data {shlex.quote(str(path))}"
    if sbd is not None and found.preset == "voc":
        yield f"--sbd {shlex.quote(sbd)}"
    train, val = found.splits
    config = preset(found.preset)
    if train.images < config.batch_size:
        config = replace(config, batch_size=1 << train.images.bit_length() - 1)
        yield f"--batch-size {config.batch_size}"
    try:
        learning_rate(config, train.images)
    except UserError:  # the warm-up of a large set is longer than all training on a small one
        yield f"--warmup-steps {config.epochs * (train.images // config.batch_size) // 10}"
    if val.trouble:
        yield "--eval-images 0"


def bad_files(found: Found) -> dict[str, str]:
    """Each missing or damaged file and what is wrong with it."""
    return {name: reason for split in found.splits for name, reason in split.bad}


def verdict(found: Found) -> str | None:
    """Why one cannot train on it, in a sentence; None where one can."""
    for split in found.splits:
        if split.trouble and split.name == "train":
            return split.trouble
        if not split.usable and not split.trouble:
            name, reason = split.bad[0]
            return (
                f"{split.bad_inspections:,} of {len(split.inspections):,} {split.unit} of {split.name} are missing "
                f"or damaged, more than {MAX_CORRUPT:.0%}: get them again, beginning with {name} ({reason})"
            )
    return None
