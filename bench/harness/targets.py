"""Where a bench writes: looked at when its arguments are read, not when it is done, minutes or hours later."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def target_file(name: str) -> Path:
    """The type of an argument: a file that can be written; ArgumentTypeError otherwise. Nothing is made."""
    path = Path(name)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{path} is not a regular file: name another one")
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{path} cannot be written: {folder} is not a folder")
        # files are written beside and renamed, so the folder decides
        if not os.access(folder, os.W_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"{path} cannot be written: choose a folder that you may write to")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from None
    return path


def target_csv(name: str) -> Path:
    """As `target_file`; where the name does not end in .csv, a folder for a file that is named later."""
    return target_file(name) if name.endswith(".csv") else target_file(f"{name}/.csv").parent
