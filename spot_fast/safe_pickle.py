"""Reads checkpoints that are pickles (`.pt`, `.pth`, `.ckpt`, `.tar`) without running any code in them.

PyTorch's restricted unpickler knows tensors and plain containers; NumPy's scalars, which optimiser states of older
training code hold, are allowed beside them. Everything else is refused by its name.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The file's contents as plain data; UserError when it is no checkpoint or would run code on loading.

    Tensors of PyTorch's zip format stay on the disk until they are used.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} is not a file: pass a .pt, .pth or .pt.tar file")
    with torch.serialization.safe_globals(_allowed()):
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(path, error)) from None
        except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            raise UserError(f"checkpoint {path} cannot be read ({first_line(error)}): it is damaged or no checkpoint"
                            ) from None  # fmt: skip
    if not isinstance(contents, dict):
        kind = type(contents).__name__
        raise UserError(f"checkpoint {path} holds a {kind}, not a state dict: pass a file of weights")
    return contents


def _allowed() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # the function has moved between NumPy versions, and so has its pickled name
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype,
            *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]  # fmt: skip


def _refusal(path: Path, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: the name is only in the unpickler's message
        found = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
        names = [name if "." in name else f"builtins.{name}" for name in found]
    if not names:
        return f"checkpoint {path} cannot be read ({first_line(error)}): it is damaged or no checkpoint"
    return (f"checkpoint {path} was not loaded: it calls {', '.join(sorted(names))}, which a file of weights has no "
            "need for; get the file from its authors again")  # fmt: skip


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
