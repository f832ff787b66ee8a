"""A run's folder: made once, locked by one process at a time, its metrics cut back when the run resumes."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spot_fast.checkpoints.runs import CONFIG, METRICS, write_config
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.files import atomic_write, finite, sync

CORRUPT = "corrupt.txt"


class RunFolder:
    """An open run folder, locked against other processes until it is closed or this process ends in any way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"run {path} is being trained by another process: wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks: two processes could train in one folder
        # Partial files of a killed process.
        for partial in [*path.glob(".tmp*"), *path.glob(".*.tmp")]:
            partial.unlink(missing_ok=True)
        # Unbuffered: a kill loses no line, and after a full disk no buffer is left that fails again at close.
        self._metrics = open(path / METRICS, "ab", buffering=0)

    @classmethod
    def create(cls, config: Config, *, root: Path, out: Path | None = None) -> RunFolder:
        """A new folder with `config`: `out`, or the next free root/<preset>[-<method>]-stage<stage>-<NNN>."""
        if out is None:
            path = _next_folder(root, f"{config.recipe.replace('+', '-')}-stage{config.stage}")
        else:
            path = out
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                remedy = "add --resume to go on with it" if (path / CONFIG).is_file() else "choose another folder"
                raise UserError(f"--out {path} is not an empty folder: {remedy}")
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        write_config(path, config)
        return folder

    def log(self, **record: Any) -> None:
        """Appends a line to metrics.jsonl; a number that is not finite becomes null, because JSON has no NaN."""
        with self._writing():
            self._metrics.write((json.dumps(finite(record), allow_nan=False) + "\n").encode())

    def write_corrupt(self, corrupt: dict[str, str]) -> None:
        """corrupt.txt: a line with label and reason for each image that could not be read; no file without any."""
        if not corrupt:
            return
        file = self.path / CORRUPT
        # Bytes of file names, which need not be UTF-8, are kept.
        before = file.read_bytes().decode(errors="surrogateescape") if file.is_file() else ""
        new = {f"{' '.join(label.split(chr(10)))}\t{' '.join(why.split())}" for label, why in corrupt.items()}
        # Lines of the run's earlier parts stay.
        text = "\n".join(sorted(new.union(filter(None, before.split("\n"))))) + "\n"
        if text != before:
            atomic_write(file, lambda partial: partial.write_bytes(text.encode(errors="surrogateescape")))

    def sync(self) -> None:
        """Returns when metrics are on the disk: call it before saving a state that includes their steps."""
        with self._writing():
            sync(self._metrics.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / METRICS} cannot be written ({error.strerror}): free some space, then go on "
                f"with python -m spot_fast.train --resume {self.path}"
            ) from error

    def cut_metrics(self, step: int) -> None:
        """Removes what was logged after `step`, and a line that a kill left unfinished."""
        lines = (self.path / METRICS).read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            with self._writing():
                self._metrics.truncate(sum(map(len, kept)))

    def close(self) -> None:
        self._metrics.close()
        os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class OthersFolder:
    """The run folder on ranks other than 0, which write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, **record: Any) -> None:
        pass

    def cut_metrics(self, step: int) -> None:
        pass


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for an unfinished one."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _next_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    taken = [int(match[1]) for path in root.iterdir() if (match := pattern.fullmatch(path.name))]
    number = max(taken, default=0) + 1
    while True:
        path = root / f"{name}-{number:03d}"
        try:
            path.mkdir()  # fails if another process was faster
            return path
        except FileExistsError:
            number += 1


def is_free(path: Path) -> bool:
    """Whether no process is training in the run folder `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
