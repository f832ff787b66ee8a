"""`patch(model)`: published slot-attention modules inside a model run on our operators, in place; `unpatch(model)`.

A module is known by its class's name, layers, parameters, numbers and method signatures (`implementations`), and is
replaced only after its own forward and ours agreed on small inputs (`patch_check`). Anything else is left alone, and
the report says why.

Replacing a module exchanges its class for one derived from it, in which only the methods that `implementations` lists
are others. So parameters, state-dict keys, hooks, `isinstance` and the optimiser's references stay, and deepcopy,
pickle, replicas and torch.compile, which all go by the class, find the methods of the module they look at; a function
bound to the instance would not survive those.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from spot_kernels.implementations import IMPLEMENTATIONS, Implementation
from spot_kernels.nn import SlotAttention
from spot_kernels.patch_check import disagreement

_UNKNOWN = "no implementation we know has a class of this name"
_LOOKS_LIKE_ONE = re.compile(r"slot_?att|att\w*slot", re.IGNORECASE)


@dataclass(frozen=True)
class Patched:
    """One slot-attention module of a model.

    path: as in `named_modules`. implementation: whose it is, empty where that is not known. replaced: what of it,
    empty: nothing. note: why it was left alone, or what else there is to know.
    """

    path: str
    class_name: str
    implementation: str
    replaced: str
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What `patch` found, in the model's order. Prints as a table."""

    modules: tuple[Patched, ...]

    @property
    def replaced(self) -> tuple[Patched, ...]:
        return tuple(module for module in self.modules if module.replaced)

    @property
    def left(self) -> tuple[Patched, ...]:
        return tuple(module for module in self.modules if not module.replaced)

    def __str__(self) -> str:
        if not self.modules:
            return "no slot attention found: nothing was replaced"
        rows = [("module", "class", "implementation", "replaced", "note")]
        for module in self.modules:
            known, done = module.implementation or "unknown", module.replaced or "nothing"
            rows.append((module.path or "(the model)", module.class_name, known, done, module.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )


def patch(model: nn.Module) -> PatchReport:
    """Known slot-attention modules in `model`, or the model itself, run on our operators from now on.

    Outputs and gradients stay, up to rounding, and so do random draws. A second call changes nothing. Patch before
    torch.compile.

    Returns:
        a report; print it.

    Raises:
        ValueError: where `model` is not a torch.nn.Module.
    """
    _check("patch", model)
    found, compiled = [], []
    for path, module in list(model.named_modules()):
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            compiled.append(path)
        entry = _patch_one(path, module, any(_is_inside(path, outer) for outer in compiled))
        if entry is not None:
            found.append(entry)
    # Where no more is known than a name that speaks of slot attention, it is often a model that holds the module.
    holders = {a.path for a in found for b in found if a is not b and _is_inside(b.path, a.path)}
    return PatchReport(tuple(a for a in found if a.note != _UNKNOWN or a.path not in holders))


def unpatch(model: nn.Module) -> list[str]:
    """Gives every module that `patch` replaced its own class back. Returns their paths.

    Raises ValueError where `model` is not a torch.nn.Module.
    """
    _check("unpatch", model)
    paths = []
    for path, module in model.named_modules():
        if "_published_class" in vars(type(module)):
            module.__class__ = type(module)._published_class
            paths.append(path)
    return paths


def _check(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: model is a {type(model).__name__}: pass a torch.nn.Module")


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _patch_one(path: str, module: nn.Module, compiled: bool) -> Patched | None:
    """Replaces the module if it is a known one. None: it is no slot attention."""
    kind = type(module)

    def entry(implementation: str, replaced: str, note: str = "") -> Patched:
        return Patched(path, kind.__name__, implementation, replaced, note)

    if hasattr(kind, "_published_class"):
        known = _implementation(kind._published_as)
        return entry(known.name, known.replaced, "; ".join(filter(None, ("was patched before", known.note))))
    if isinstance(module, SlotAttention):
        return entry("spot_kernels", "", "runs on our operators as it is")
    compared = {known.name: _compare(module, known) for known in IMPLEMENTATIONS if _named_class(kind, known)}
    if not compared:
        unknown = _LOOKS_LIKE_ONE.search(kind.__name__)
        return entry("", "", _UNKNOWN) if unknown else None
    name, (differences, sizes) = min(compared.items(), key=lambda item: len(item[1][0]))
    known = _implementation(name)
    if differences:
        return entry("", "", f"closest to {name}, but {'; '.join(differences)}")
    if reason := "is compiled: patch before torch.compile" if compiled else _obstacle(module, known):
        return entry(name, "", reason)
    try:
        patched = _patched_class(kind, name)
    except Exception as error:  # a metaclass or __init_subclass__ may refuse
        return entry(name, "", f"no class can be derived from it: {error}")
    if reason := disagreement(module, patched, lambda module, draw: known.calls(module, sizes, draw)):
        return entry(name, "", reason)
    module.__class__ = patched
    return entry(name, known.replaced, known.note)


def _implementation(name: str) -> Implementation:
    return next(known for known in IMPLEMENTATIONS if known.name == name)


def _named_class(kind: type, known: Implementation) -> type | None:
    """The class of that implementation's name that `kind` is, or is derived from."""
    return next((base for base in kind.__mro__ if base.__name__ == known.shape.name), None)


def _compare(module: nn.Module, known: Implementation) -> tuple[list[str], dict[str, int]]:
    """In what the module's class and layers differ from an implementation's, and the sizes of its layers."""
    kind, base = type(module), _named_class(type(module), known)
    differences, sizes = known.shape.compare(module)
    for name, function in known.methods.items():
        original = vars(base).get(name)
        if not inspect.isfunction(original):
            differences.append(f"{base.__name__} defines no method {name}")
        elif inspect.getattr_static(kind, name) is not original:
            differences.append(f"{kind.__name__} has a {name} of its own")
        elif _arguments(original) != _arguments(function):
            differences.append(f"its {name} takes {inspect.signature(original)}")
    return differences, sizes


def _arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _obstacle(module: nn.Module, known: Implementation) -> str:
    """What a known module has that its forward of ours would pass by."""
    for name in known.methods:
        if name in vars(module):
            return f"its {name} was replaced on the instance"
    for path, layer in module.named_modules():
        if path and any(_hooks(layer)):
            return f"its layer {path} has hooks"
    return ""


def _hooks(layer: nn.Module) -> Iterator[Any]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield getattr(layer, name, None)


@functools.cache
def _patched_class(published: type, name: str) -> type:
    body = {
        "__module__": published.__module__, "__qualname__": published.__qualname__, "__doc__": published.__doc__,
        "__reduce_ex__": _reduce, "_published_class": published, "_published_as": name,
    }  # fmt: skip
    return type(published)(published.__name__, (published,), body | _implementation(name).methods)


def _reduce(self: nn.Module, protocol: int) -> Any:
    """The class is made at run time: copies and pickles find it by the published one."""
    function, arguments, *rest = self._published_class.__reduce_ex__(self, protocol)
    if function is copyreg.__newobj__ and arguments[:1] == (type(self),) and "_published_class" in vars(type(self)):
        return _new, (self._published_class, self._published_as, *arguments[1:]), *rest
    return function, arguments, *rest


def _new(published: type, name: str, *arguments: Any) -> nn.Module:
    patched = _patched_class(published, name)
    return patched.__new__(patched, *arguments)
