"""`python -m spot_fast.data check`: what a folder holds, whether it is undamaged, and how to train on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from spot_fast.config import preset
from spot_fast.data import READERS, open_set
from spot_fast.data.datasets import movi_tfrecord
from spot_fast.data.inspection import CheckResult, Inspection, of_sets
from spot_fast.data.loading.loader import MAX_CORRUPT
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.errors import UserError
from spot_fast.recipes import DATA_SETS

SHOWN = 10  # damaged files that are printed
_BATCH = 64  # files a thread takes at a time
_FALLBACK = "folder"  # what no reader recognises


def find(path: Path, options: Mapping[str, str | None], *, decode: bool) -> CheckResult:
    """Recognises the data set at `path` and lists what to inspect; UserError if it is none.

    options: values of the Config fields that some readers take, such as sbd.
    """
    if not path.exists():
        raise UserError(f"PATH {path} does not exist: name the folder of a data set")
    name = next((name for name, reader in READERS.items() if reader.recognises(path)), _FALLBACK)
    reader = READERS[name]
    if reader.inspect is not None:
        return reader.inspect(path, decode)
    config = preset(name, data=str(path), **{option: options.get(option) for option in reader.options})
    title = "list of images" if path.is_file() else reader.title or DATA_SETS[name].title
    result = of_sets(title, name, lambda split: open_set(config, split), decode, remarks=reader.remarks)
    if name == _FALLBACK and result.splits[0].trouble:
        movi_tfrecord.refuse_other_formats(path)
        raise UserError(result.splits[0].trouble)
    return result


def inspect(result: CheckResult, *, jobs: int) -> None:
    """Runs the inspections on `jobs` threads and adds what is bad to each split."""
    total = sum(len(split.inspections) for split in result.splits)
    with tqdm(total=total, desc="check", leave=False, disable=None) as bar:  # None: shown on a terminal only
        for split in result.splits:
            batches = (split.inspections[start : start + _BATCH] for start in range(0, len(split.inspections), _BATCH))
            with closing(read_ahead(_run, batches, depth=4 * jobs, workers=jobs, name="check")) as futures:
                for future in futures:
                    results = future.result()
                    split.bad_inspections += sum(map(bool, results))
                    split.bad += chain.from_iterable(results)
                    bar.update(len(results))


def _run(batch: Iterable[Inspection]) -> list[list[tuple[str, str]]]:
    return [inspection() for inspection in batch]


def report(path: Path, result: CheckResult, options: Mapping[str, str | None]) -> Iterator[str]:
    """Lines for the user, at their end the command to train with if there is one."""
    sentence = verdict(result)
    yield f"{path}: {result.title}"
    for split in result.splits:
        known = sentence if split.trouble == sentence else ""
        yield f"  {split.name:5}  {split.summary or known and 'not usable' or split.trouble}"
    bad = bad_files(result)
    if bad:
        yield f"missing or damaged: {len(bad):,}"
        yield from (f"  {name}: {reason}" for name, reason in list(bad.items())[:SHOWN])
        if len(bad) > SHOWN:
            yield f"  and {len(bad) - SHOWN:,} more: --list FILE writes them all"
    else:
        whole = not any(split.trouble for split in result.splits)
        yield "nothing is missing or damaged" if whole else "of the files that were found none is damaged"
    yield from (f"note: {note}" for note in result.notes)
    if sentence is None:
        yield "train with:"
        yield "  " + " ".join(_command(path, result, options))


def _command(path: Path, result: CheckResult, options: Mapping[str, str | None]) -> Iterator[str]:
    yield f"python -m spot_fast.train --preset {result.preset} --data {shlex.quote(str(path))}"
    for name in READERS[result.preset].options:
        if options.get(name) is not None:
            yield f"--{name} {shlex.quote(options[name])}"
    train, val = result.splits
    config = preset(result.preset)
    if train.images < config.batch_size:
        config = replace(config, batch_size=1 << train.images.bit_length() - 1)  # the largest power of two
        yield f"--batch-size {config.batch_size}"
    if config.warmup_epochs(train.images) > config.epochs:  # a large set's warm-up outlasts training on a small one
        yield f"--warmup-steps {config.epochs * (train.images // config.batch_size) // 10}"
    if val.trouble:
        yield "--eval-images 0"


def bad_files(result: CheckResult) -> dict[str, str]:
    """Each missing or damaged file and what is wrong with it."""
    return {name: reason for split in result.splits for name, reason in split.bad}


def verdict(result: CheckResult) -> str | None:
    """Why it cannot be trained on, in a sentence; None if it can."""
    for split in result.splits:
        if split.trouble and split.name == "train":
            return split.trouble
        if not split.usable and not split.trouble:
            name, reason = split.bad[0]
            return (
                f"{split.bad_inspections:,} of {len(split.inspections):,} {split.unit} of {split.name} are missing "
                f"or damaged, more than {MAX_CORRUPT:.0%}: get them again, beginning with {name} ({reason})"
            )
    return None
