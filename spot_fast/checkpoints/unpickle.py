"""Reads checkpoints (`.pt`, `.pth`, `.ckpt`, `.tar`, `.safetensors`) without running any code in them.

PyTorch's restricted unpickler knows tensors and plain containers. Checkpoints hold other objects beside them:
`argparse.Namespace`, paths, dates, configurations. Stand-ins take the place of these classes and keep their data:
nothing that the file names is imported or run. A file that *calls* something is refused, naming the callee, except for
constructors known to hold only data and for classes of the user's own code.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING, REVERSE_IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from spot_fast.checkpoints.file_kinds import file_problem
from spot_fast.errors import UserError


class Data:
    """Replaces an object whose contents nobody needs."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Names that a file may call, and their replacements.
_CALLED: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda *arguments: {},
    "collections.deque": lambda *arguments: [],
    "copyreg._reconstructor": lambda *arguments: OrderedDict(),
    "builtins.frozenset": lambda items=(): frozenset(items),
    **{
        f"{module}.{name}": lambda *parts: "/".join(parts)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        name: Data
        for name in (
            "builtins.range",
            "builtins.slice",
            "functools.partial",
            "decimal.Decimal",
            "fractions.Fraction",
            "uuid.UUID",
            "types.SimpleNamespace",
            "re._compile",
            "datetime.date",
            "datetime.datetime",
            "datetime.time",
            "datetime.timedelta",
            "datetime.timezone",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            *(f"numpy.random._pickle.__{kind}_ctor" for kind in ("generator", "bit_generator", "randomstate")),
            "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        )
    },
}
# Packages, with Python 2's names, whose classes are no data of the user: calling them may do something.
_NO_DATA = {"torch", "numpy", *sys.stdlib_module_names, *IMPORT_MAPPING, *REVERSE_IMPORT_MAPPING.values()}
_WHOLE = (
    "checkpoint {} holds a whole model object, not a state dict: save its tensors alone with "
    "torch.save(model.state_dict(), 'weights.pth')"
)
# A damaged file may raise any of these.
_DAMAGE = (SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError)
_SAVE_ALONE = "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')"


class _StandIn(type):
    """Metaclass of stand-ins for a file's classes; their instances are OrderedDicts with the object's data."""

    def __call__(cls, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {cls.__name__} is called")

    def __new__(mcs, name: str) -> _StandIn:
        return super().__new__(mcs, name, (), {"__new__": lambda cls, *arguments: OrderedDict()})

    def __init__(cls, name: str) -> None:
        super().__init__(name, (), {})


class _OwnClass(_StandIn):
    """Stand-ins for the user's own classes, which may be called: an enum's members are stored as calls."""

    def __call__(cls, *arguments: Any) -> Any:
        return Data()


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The file's contents as plain data; UserError if it is no checkpoint or would run code when loaded.

    Tensors in PyTorch's zip format are memory-mapped.
    """
    path = Path(path)
    if not path.is_file():
        problem = file_problem(path) or "is not a file: pass a .pt, .pth, .pt.tar or .safetensors file"
        raise UserError(f"checkpoint {path} {problem}")
    try:
        contents = load_file(path) if _is_safetensors(path) else _unpickled(path)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from None
    except _DAMAGE as error:
        raise UserError(_unreadable(path, error)) from None
    if not isinstance(contents, Mapping):
        kind = type(contents).__name__
        raise UserError(f"checkpoint {path} holds a {kind}, not a state dict: pass a file of weights")
    if "_modules" in getattr(contents, "__dict__", {}):
        raise UserError(_WHOLE.format(path))
    return contents


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _unpickled(path: Path) -> Any:
    try:
        return _load(path, _allowed())
    except pickle.UnpicklingError:
        # Only now are the names listed: a plain state dict, the usual case, is read once.
        names = _unknown(path)
        if sharded := [name for name in names if name.endswith(("DTensor", "ShardedTensor"))]:
            raise pickle.UnpicklingError(sharded[0]) from None
        try:
            return _load(path, [*_allowed(), *((_in_place_of(name), name) for name in names), Data])
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(str(error)) from None


def _in_place_of(name: str) -> Callable[..., Any]:
    module, _, own = name.rpartition(".")
    if name not in _CALLED and own[:1].isupper() and module.split(".")[0] not in _NO_DATA:
        return _OwnClass(name)
    return _CALLED.get(name) or _StandIn(name)


def _load(path: Path, allowed: list[Any]) -> Any:
    """UnpicklingError if the file names anything that is neither PyTorch's nor `allowed`."""
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _allowed() -> list[tuple[Any, str]]:
    """NumPy's scalars under all their names in files."""
    scalar = np.float64(0).__reduce__()[0]  # its module, and so its pickled name, differs between NumPy versions
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
    return [
        *((scalar, name) for name in names),
        (np.dtype, "numpy.dtype"),
        *((kind, f"{kind.__module__}.{kind.__name__}") for kind in kinds),
    ]


def _unknown(path: Path) -> set[str]:
    """Names in the file other than tensors, plain containers and NumPy's scalars; none of them is imported."""
    known = {"collections.OrderedDict", *(name for _, name in _allowed())}
    return {name for name in _names(path) - known if not name.startswith("torch._utils._rebuild")}


def _names(path: Path) -> set[str]:
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found: set[str] = set()
    with path.open("rb") as file:
        try:
            # PyTorch's old format is five pickles: magic number, version, machine, contents, names of storages.
            for _ in range(5):
                found |= {
                    _today(*argument.split(" ", 1))
                    for opcode, argument, _ in pickletools.genops(file)
                    if opcode.name == "GLOBAL"
                }
        except Exception:  # a damaged file: what was read so far is enough for the message
            pass
    return found


def _today(module: str, name: str) -> str:
    """Python 3's name for Python 2's, which a pickle of protocol 2 stores."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _refusal(path: Path, error: Exception) -> str:
    if str(error).endswith(("DTensor", "ShardedTensor")):
        return (
            f"checkpoint {path} holds tensors that are split over several processes: gather them before saving, "
            "with torch.distributed.checkpoint.state_dict and full_state_dict=True"
        )
    message = _first_line(error)
    if "persistent_load of storage" in message:  # a module object in the format before PyTorch 1.6
        return _WHOLE.format(path)
    if re.match(r"Unsupported operand (66|67|14\d)\b", message):  # opcodes of protocols 3 to 5
        return (
            f"checkpoint {path} is pickled by another protocol than 2, which cannot be read without running code: "
            "save it again with torch.save's own protocol"
        )
    if callee := re.search(r"GLOBAL ([\w.]+)", message):
        name = callee[1] if "." in callee[1] else f"builtins.{callee[1]}"
        return (
            f"checkpoint {path} was not loaded: it calls {name}, which a file of weights has no need for; get it "
            f"from its authors again, or if you trust it, save its tensors alone: {_SAVE_ALONE}"
        )
    if not file_problem(path) and (names := _unknown(path)):
        return (
            f"checkpoint {path} was not loaded: it holds objects beside its tensors that cannot be read, such as "
            f"{sorted(names)[0]}; if you trust it, save its tensors alone: {_SAVE_ALONE}"
        )
    return _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"checkpoint {path} cannot be read ({error.strerror}): make it readable for you"
    if problem := file_problem(path):
        return f"checkpoint {path} {problem}"
    return f"checkpoint {path} cannot be read ({_first_line(error)}): it is damaged or no checkpoint, download it again"


def _first_line(error: Exception) -> str:
    """The first line of an error's message without PyTorch's advice about its options, or the error's type."""
    lines = re.split(r"WeightsUnpickler error: |trusted source\.\s", str(error))[-1].strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
