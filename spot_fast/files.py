"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

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
    """What the operating system or safetensors says about a file that failed."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    # safetensors passes the operating system's error on as text.
    return os.strerror(errno.ENOSPC) if f"os error {errno.ENOSPC})" in text else text


def writable_target(option: str, name: str | None) -> Path | None:
    """The file that --`option` names, None without one.

    UserError where it is a folder, lies in no folder, or cannot be written.
    """
    if name is None:
        return None
    target = Path(name)
    if target.is_dir() or not target.parent.is_dir():
        reason = "is a folder" if target.is_dir() else f"lies in {target.parent}, which is not a folder"
        raise UserError(f"--{option} {target} {reason}: give a file name in a folder that exists")
    try:
        # As `atomic_write` will: a read-only disk or a full quota has to show before hours of work, not after.
        with tempfile.TemporaryFile(dir=target.parent) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(
            f"--{option} {target} cannot be written ({error.strerror}): choose a file in a folder that you may write to"
        ) from None
    return target
