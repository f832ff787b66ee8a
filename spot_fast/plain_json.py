"""JSON that every reader takes: no NaN, no Infinity, and UTF-8 whatever files are called."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from spot_fast.files import atomic_write


def finite(value: Any) -> Any:
    """`value` with null in the place of numbers that are not finite, for which JSON has no word."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` indented, whole or not at all. UserError where the file cannot be written."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A name that is not UTF-8 has surrogates, which become JSON's own escapes.
    atomic_write(path, lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")))
