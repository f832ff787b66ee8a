"""The user's home folder, which a process may lack: containers run as numbers that no passwd file knows."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(name: str) -> Path | None:
    """`name` with a leading ~ or ~user as that home folder; None where there is none."""
    if not name.startswith("~"):
        return Path(name)
    if name.split(os.sep)[0] == "~" and os.environ.get("HOME") == "":
        return None  # os.path.expanduser takes it for the root
    found = os.path.expanduser(name)
    return None if found.startswith("~") else Path(found)
