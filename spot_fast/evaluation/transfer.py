"""Zero-shot transfer: runs scored on data sets that they were not trained on, in one table (FT-DINOSAUR, 2408.09162).

A run keeps its weights, input size and number of slots. Everything else is the other set's as its preset has it: which
images are scored, the part of them that a model sees, the size of the label maps.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spot_fast.config import Config
from spot_fast.data import READERS
from spot_fast.data.base import ImageSet
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import METRICS
from spot_fast.evaluation.options import open_val_set
from spot_fast.evaluation.tables import TITLES, ScoredRun, mean_and_deviation, percent, seed_groups, spread, table
from spot_fast.recipes import DATA_SETS, needs_data

Cell = tuple[float, float | None]  # mean and standard deviation; None of a single run
MASKS = ("decoder", "slots", "kmeans")
_OF_SET = ("mask_size", "crop", "val_images")  # settings of `Config` that are a data set's


@dataclass(frozen=True)
class Target:
    """A data set to evaluate on. data: its folder, None where it needs none."""

    name: str
    data: str | None

    def config(self, run: Config) -> Config:
        """The configuration of a run with the set in the place of its own."""
        recipe, default = DATA_SETS[self.name].values, Config()
        own = {name: recipe[name].value if name in recipe else getattr(default, name) for name in _OF_SET}
        if self.name == "scenes":
            own["mask_size"] = run.image_size  # they are drawn at the size of the input
        return replace(run, preset=self.name, data=self.data, **own)


def targets_of(words: Sequence[str]) -> list[Target]:
    """The values of --transfer, SET=PATH or SET alone; UserError for an unknown set, one named twice, a lacking or a
    needless path."""
    found: dict[str, Target] = {}
    for word in words:
        name, given, path = word.partition("=")
        if name not in READERS or name not in DATA_SETS:
            known = ", ".join(f"{each}=PATH" if needs_data(each) else each for each in READERS)
            close = difflib.get_close_matches(name.lower(), READERS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--transfer {word} names no data set: use {known}, and put runs before it{hint}")
        if name in found:
            raise UserError(f"--transfer names {name} twice, but each set has one column: name it once")
        if needs_data(name) and not path:
            raise UserError(f"--transfer {word} has no folder: use {name}=PATH, {READERS[name].needs}")
        if path and not (Path(path).is_dir() or READERS[name].takes_list and Path(path).is_file()) and needs_data(name):
            raise UserError(f"--transfer {word}: {path} is not a folder, use {name}=PATH, {READERS[name].needs}")
        if given and not needs_data(name):
            raise UserError(f"--transfer {word}: {name} needs no folder, use {name} alone")
        found[name] = Target(name, path or None)
    return list(found.values())


@dataclass(frozen=True)
class TransferRow:
    """One kind of masks of a run, or of runs that differ only in their seed. scores: by set and metric, None where
    nothing counts, or not in every run."""

    runs: list[str]
    masks: str
    title: str
    scores: dict[str, dict[str, Cell | None]]


def open_target(target: Target, run: Config, opened: dict[str, ImageSet]) -> ImageSet:
    """The target's validation images for a run; UserError if they cannot be opened or have no masks."""
    given = target.name if target.data is None else f"{target.name}={target.data}"
    try:
        image_set = open_val_set(target.config(run), None, opened)
    except UserError as error:
        raise UserError(str(error).replace(f"--data {target.data}", f"--transfer {given}", 1)) from None
    if not (image_set.has_masks and len(image_set)):
        raise UserError(f"--transfer {given}: {image_set.name} has no masks to compare with, name a set that has them")
    return image_set


def transfer_rows(runs: Sequence[ScoredRun], protocol: str) -> list[TransferRow]:
    """Decoder masks averaged over the orders, slot masks and k-means of every run scored under the protocol.

    runs: each run on every set, in the same order; a last run that is not on all of them yet is left out. Runs that
    differ only in their seed are a row together.
    """
    sets = list(dict.fromkeys(run.data_set for run in runs))
    whole = [runs[at : at + len(sets)] for at in range(0, len(runs) - len(sets) + 1, len(sets))]
    groups = seed_groups([of_run[0].config for of_run in whole])
    single = [[index] for index in range(len(whole)) if not any(index in group for group in groups)]
    return [
        _transfer_row([whole[i] for i in group], masks, protocol)
        for group in sorted(groups + single)
        for masks in MASKS
    ]


def _transfer_row(group: Sequence[Sequence[ScoredRun]], masks: str, protocol: str) -> TransferRow:
    """group: of each run its evaluations, one on each set."""
    scores, title = {}, ""
    for of_set in zip(*group, strict=True):
        # The last of the decoder's rows is the one of all orders.
        rows = [[r for r in run.evaluation.table(protocol).rows if r.masks == masks][-1] for run in of_set]
        title = rows[0].title
        scores[of_set[0].data_set] = {metric: _cell([row.scores[metric] for row in rows]) for metric in METRICS}
    return TransferRow([of_run[0].name for of_run in group], masks, title, scores)


def _cell(values: Sequence[float | None]) -> Cell | None:
    if len(values) > 1:
        return mean_and_deviation(values)
    return None if values[0] is None else (values[0], None)


def transfer_report(runs: Sequence[ScoredRun], protocol: str) -> str:
    """The table of `transfer_rows` in percent, a block of rows for each metric, and what it is of."""
    rows = transfer_rows(runs, protocol)
    sets = list(rows[0].scores)
    several = len(rows) > len(MASKS)
    titles, cells = [], []
    for metric in METRICS:
        if all(row.scores[name][metric] is None for row in rows for name in sets):
            continue
        titles.append(TITLES[metric])
        cells.append([""] * len(sets))
        for row in rows:
            name = row.runs[0] + f" and {len(row.runs) - 1} more seed{'s' * (len(row.runs) > 2)}" * (len(row.runs) > 1)
            titles.append(f"  {name}, {row.title}" if several else f"  {row.title}")
            cells.append([_percent(row.scores[data_set][metric]) for data_set in sets])
    trained = dict.fromkeys(f"{run.name}: {run.config.recipe}, stage {run.config.stage}" for run in runs)
    lines = [
        f"transfer · protocol {protocol} · percent",
        "",
        *map(str.rstrip, table(titles, cells, sets).splitlines()),
        "",
    ]
    lines.append(f"trained on {'; '.join(trained)}")
    for run in runs[: len(sets)]:
        evaluation, scored = run.evaluation, run.evaluation.table(protocol)
        lines.append(
            f"{run.data_set}: {evaluation.images} image{'s' * (evaluation.images != 1)}, "
            f"masks {scored.mask_size} × {scored.mask_size}{', panoptic annotations' * scored.panoptic}"
        )
        lines += [f"  note: {note}" for note in evaluation.notes]
        lines += [f"  skipped {label}: {reason}" for label, reason in evaluation.skipped.items()]
    return "\n".join(lines)


def _percent(cell: Cell | None) -> str:
    return percent(cell and cell[0]) if cell is None or cell[1] is None else spread(cell)


def transfer_json(runs: Sequence[ScoredRun], protocols: Sequence[str]) -> list[dict]:
    """`transfer_rows` of each protocol as plain data; std is null for a single run."""
    return [
        {
            "protocol": protocol,
            "sets": list(dict.fromkeys(run.data_set for run in runs)),
            "rows": [
                {
                    "runs": row.runs,
                    "masks": row.masks,
                    "title": row.title,
                    "scores": {
                        name: {metric: cell and {"mean": cell[0], "std": cell[1]} for metric, cell in scores.items()}
                        for name, scores in row.scores.items()
                    },
                }
                for row in transfer_rows(runs, protocol)
            ],
        }
        for protocol in protocols
    ]
