"""Recognises MOVi for `data check` and inspects its clips: PNG files, or shards with all of their checksums."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from spot_fast.data.datasets import movi, movi_tfrecord, tfrecord
from spot_fast.data.decoding.damage import data_damage
from spot_fast.data.inspection import CheckResult, Inspection, Split, of_sets
from spot_fast.data.listing.search import counted
from spot_fast.data.masks import fit
from spot_fast.errors import UserError

_ALL_FRAMES = 1 << 30
_UNKNOWN = "the files do not tell MOVi-C from MOVi-E: take the preset, movi_c or movi_e, that fits"


def recognised(path: Path) -> str | None:
    """The preset of the clips at `path`; None if it holds none."""
    if _has_png_clips(path):
        names = {part.lower() for part in path.absolute().parts}
        release = "movi_e" if names & {"movi_e", "movi-e", "e"} else "movi_c"
    elif release := _release(path):
        release = "movi_e" if release == "movi_e" else "movi_c"
    else:
        return None
    return f"{release}_{movi_tfrecord.LARGE}" if _is_large(path) else release


def _is_large(path: Path) -> bool:
    """Whether the first frame is one of the release at 256 pixels."""
    for split in movi.SPLITS:
        try:
            clips = movi_tfrecord.open_clips(path, split, limit=1)
            return fit.stored_size(clips.paths[0], clips.encoded(0)) == (movi_tfrecord.LARGE,) * 2
        except UserError:  # `inspect` reports it
            continue
    return False


def inspect(path: Path, decode: bool, name: str) -> CheckResult:
    """The clips at `path` to inspect, with all frames, of which training draws nine."""
    if _has_png_clips(path):
        clips = partial(movi.Movi, path, frames_per_clip=_ALL_FRAMES)
        result = of_sets("MOVi as PNG clips", name, clips, decode, summary=_png_summary)
        result.notes.append(_UNKNOWN)
        return result
    release = _release(path)
    splits = [_shards(path, split, release, decode) for split in movi.SPLITS]
    return CheckResult(f"MOVi as TFRecord ({release})", name, splits, [])


def _has_png_clips(path: Path) -> bool:
    return any(next((path / folder).glob("*/*_image.png"), None) for folder in movi.SPLITS.values())


def _release(path: Path) -> str | None:
    """The name of the first release whose shards lie under `path`, those of training first."""
    releases = movi_tfrecord.releases(path)
    return next((name for split in movi.SPLITS.values() for _, name, _ in releases[split]), None)


def _png_summary(clips: movi.Movi) -> str:
    count = len({path.parent for path in clips.paths})
    masks = ", masks" if clips.has_masks else ""
    return f"{counted(count, 'clip')}, {counted(len(clips), 'frame')}{masks}"


def _shards(path: Path, split: str, release: str, decode: bool) -> Split:
    try:
        shards = movi_tfrecord.find_shards(path, movi.SPLITS[split], release)
    except UserError as error:
        return Split(split, trouble=str(error))
    inspections: list[Inspection] = []
    damaged: list[tuple[str, str]] = []
    features = [movi_tfrecord.VIDEO] + [movi_tfrecord.MASKS] * (split == "val")
    for shard in shards:
        try:
            records = movi_tfrecord.shard_records(shard)
            inspections += [partial(_inspect_record, record, features, decode) for record in records]
        except UserError as error:
            damaged.append((str(shard), str(error)))
    count = len(inspections)
    checked = Split(
        split,
        f"{counted(count, 'clip')} in {counted(len(shards), 'shard')}",
        inspections,
        unit="clips",
        images=movi.TRAIN_FRAMES * count,
        bad=damaged,
    )
    if damaged:
        more = f" ({len(damaged)} shards are missing or damaged)" if len(damaged) > 1 else ""
        checked.trouble = damaged[0][1] + more
    elif not count:
        checked.trouble = f"{shards[0].parent} has no clips in its {movi.SPLITS[split]} shards: download them again"
    return checked


def _inspect_record(record: tfrecord.Record, features: list[str], decode: bool) -> list[tuple[str, str]]:
    troubles = []
    try:
        data, example = tfrecord.verified(record), tfrecord.Example(record)
        for feature in features:
            frames = example.bytes_list(feature)
            if not frames:
                troubles.append(f'no feature "{feature}"')
            for number, (offset, length) in enumerate(frames):
                start = offset - record.offset
                if damage := data_damage(record.path, data[start : start + length], decode=decode):
                    troubles.append(f"{feature} {number}: {damage}")
    except UserError as error:
        troubles = [str(error).removeprefix(f"{record} ")]
    return [(str(record), "; ".join(troubles))] if troubles else []
