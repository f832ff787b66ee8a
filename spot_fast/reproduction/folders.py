"""Which of the wanted runs are there: their folders below one root, how far they are and how long they took.

A finished run counts whatever its folder is called, if its settings are those wanted and it has the right teacher.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spot_fast.checkpoints.runs import (
    CONFIG,
    METRICS,
    MODEL,
    STATE,
    is_finished,
    read_config,
    read_metadata,
    run_folders,
)
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.reproduction.runs import RunSpec, is_same, steps
from spot_fast.training.teacher import teacher_hash

LOGS = "logs"


@dataclass(frozen=True)
class Found:
    """A run's folder, which may not exist yet. facts: metadata of its saved state, {} before the first."""

    path: Path
    config: Config
    finished: bool
    facts: dict[str, str]

    @property
    def begun(self) -> bool:
        return self.finished or (self.path / CONFIG).is_file()

    @property
    def step(self) -> int:
        return int(self.facts.get("step", 0))

    @property
    def steps(self) -> int | None:
        """Of the whole run, None where the number of its images is not known."""
        return self.step if self.finished and self.facts else steps(self.config, int(self.facts.get("images", 0)))

    @property
    def seconds(self) -> float:
        return float(self.facts.get("seconds", 0))


class Folders:
    """Folders of runs below `root`, found as asked for: parents first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._others = list(run_folders(root)) if root.is_dir() else []
        self._found: dict[str, Found] = {}

    def find(self, run: RunSpec) -> Found:
        """UserError where the folder with the run's own name holds another run."""
        if run.name not in self._found:
            self._found[run.name] = self._search(run)
        return self._found[run.name]

    def refresh(self, run: RunSpec) -> Found:
        """`find` after the run's folder may have changed."""
        self._found.pop(run.name, None)
        return self.find(run)

    @property
    def all_found(self) -> list[Found]:
        return list(self._found.values())

    def log(self, run: RunSpec) -> Path:
        return self.root / LOGS / f"{run.name}.log"

    def about(self, run: RunSpec) -> dict[str, str]:
        """What was noted when the training began (`note`)."""
        file = self._note(run)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def note(self, run: RunSpec, about: dict[str, str]) -> None:
        self._note(run).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def _note(self, run: RunSpec) -> Path:
        return self.root / LOGS / f"{run.name}.json"

    def prepare(self, run: RunSpec) -> Path:
        """The run's folder for a training that begins or goes on: without what a kill before the first line left."""
        path = self.find(run).path
        if path.is_dir() and not (path / CONFIG).is_file():
            for file in [*path.glob(".*"), path / METRICS]:
                file.unlink(missing_ok=True)
        return path

    def _search(self, run: RunSpec) -> Found:
        own = self.root / run.name
        if (own / CONFIG).is_file():
            config = read_config(own)
            if not is_same(run.config, config):
                raise UserError(f"{own} holds a run of other settings than its name says: remove it")
            if not self._fits(run, own, config):
                raise UserError(
                    f"{own} began with another {' or '.join(each.name for each in run.parents.values())} than the "
                    "present one: remove it"
                )
            return _found(own, config)
        for path, config in self._others:
            if is_finished(path) and is_same(run.config, config) and self._fits(run, path, config):
                return _found(path, config)
        return Found(own, run.config, False, {})

    def _fits(self, run: RunSpec, path: Path, config: Config) -> bool:
        """Whether the run in `path` had the teacher wanted, and began with the run wanted.

        True while it has saved nothing.
        """
        if (run.init_from is None) != (config.init_from is None):
            return False
        wanted = {"teacher": run.teacher, "init_from": run.init_from}
        parents = {what: parent for what, parent in wanted.items() if parent is not None}
        file = next((path / name for name in (MODEL, STATE) if (path / name).is_file()), None)
        if file is None or not parents:
            return True
        recorded = read_metadata(file)
        return all(
            self.find(parent).finished and recorded.get(f"{what}_sha256") == model_hash(self.find(parent).path)
            for what, parent in parents.items()
        )


def _found(path: Path, config: Config) -> Found:
    state = path / STATE
    return Found(path, config, is_finished(path), read_metadata(state) if state.is_file() else {})


def model_hash(path: Path) -> str:
    """sha256 of the model file of a run's folder."""
    return _hash(path, (path / MODEL).stat().st_mtime_ns)


@functools.cache
def _hash(path: Path, changed: int) -> str:
    return teacher_hash(path)


# ---- cost


def pace(found: Sequence[Found], like: Config) -> float | None:
    """Seconds a step, the mean of runs of the same kind; None where none was measured."""
    known = [each for each in found if each.step and each.seconds and _kind(each.config) == _kind(like)]
    return sum(each.seconds for each in known) / sum(each.step for each in known) if known else None


def _kind(config: Config) -> tuple:
    """What decides how long a step takes, roughly."""
    student = (config.train_blocks,) if config.stage == 2 else ()
    return (
        config.stage, config.encoder, config.image_size, config.num_slots, config.slot_iterations, config.decoder,
        config.dec_blocks, config.batch_size, *student,
    )  # fmt: skip
