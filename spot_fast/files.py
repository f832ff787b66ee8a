"""Writing files that appear whole or not at all, JSON that every reader takes, and paths with a home folder."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spot_fast.errors import UserError

# CIFS, vboxsf, 9p and some of FUSE answer so for folders, a few for files too.
_UNSUPPORTED = frozenset(
    {
        errno.EINVAL,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EBADF,
        errno.EPERM,
        errno.EACCES,
        errno.EISDIR,
        errno.ENOTTY,
    }
)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file and puts it in the place of `path`; on failure `path` stays as it was.

    The contents are on the disk before the name is, so that neither a kill nor a power cut leaves half a file.
    UserError where the file cannot be written (such as no space left).
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        write(partial)
        descriptor = os.open(partial, os.O_RDWR)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({reason(error)}): free some space or make it writable; "
            "what was saved before is intact"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """What was written to an open file is on the disk when this returns, where its file system can promise that.

    OSError where the disk fails or is full.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Has the names in `folder` on the disk. What cannot be opened, such as a folder without read permission, is left
    to the system: the files are there already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """The operating system's or safetensors' own words about a file that failed."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    # safetensors passes the operating system's error on as text.
    return os.strerror(errno.ENOSPC) if f"os error {errno.ENOSPC})" in text else text


def writable_target(option: str, name: str | None) -> Path | None:
    """The file that --`option` names; UserError where it is a folder, its folder is missing, or it cannot be written.

    Called before hours of work: `atomic_write` finds out only after them.
    """
    if name is None:
        return None
    target = Path(name)
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else f"lies in {target.parent}, which is not a folder"
        raise UserError(f"--{option} {target} {problem}: give a file name in a folder that exists")
    try:
        # A byte, not only a name: full disks and quotas refuse no earlier.
        with tempfile.TemporaryFile(dir=target.parent) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(
            f"--{option} {target} cannot be written ({error.strerror}): choose a file in a folder that you may write to"
        ) from None
    return target


def finite(value: Any) -> Any:
    """`value` with null in place of numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` indented, in UTF-8, without NaN and Infinity. UserError where the file cannot be written."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 has surrogates, which become JSON's own escapes.
    atomic_write(path, lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")))


def expanded(name: str) -> Path | None:
    """`name` with a leading ~ or ~user as that home folder; None where there is none.

    A process may have no home folder: containers run as numbers that no passwd file knows.
    """
    if not name.startswith("~"):
        return Path(name)
    if name.split(os.sep)[0] == "~" and os.environ.get("HOME") == "":
        return None  # os.path.expanduser takes it for the root
    path = os.path.expanduser(name)
    return None if path.startswith("~") else Path(path)
