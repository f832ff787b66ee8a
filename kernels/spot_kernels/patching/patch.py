"""`patch(model)`: published slot-attention modules inside a model run on our operators, in place; `unpatch(model)`.

A module is known by its layers, parameters, numbers and method signatures (`implementations`), whatever its class is
called, and is replaced only after its own forward and ours agreed on small inputs (`patch_check`) and if its code reads
no attribute or global that the known form does not have (`forward_reads`). Anything else is left alone, and the report
says why.

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

from spot_kernels.modules.slot_attention import SlotAttention
from spot_kernels.patching.class_shape import Sizes
from spot_kernels.patching.comparison import disagreement
from spot_kernels.patching.forward_reads import read_by_code, unknown_attributes
from spot_kernels.patching.implementations import IMPLEMENTATIONS, Implementation

_UNKNOWN = "fits no known form"
_STEP = "its forward can call spot_kernels.slot_attention_step"
_SHARDED = "is sharded: patch before fully_shard or FullyShardedDataParallel"
_READS = "its forward reads"
_NAMED_DIFFERENCES = 3
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
            forms = ", ".join(dict.fromkeys(re.split(", | \\(", known.name)[0] for known in IMPLEMENTATIONS))
            looked_for = f"looked for the layers of {forms}; of another form, {_STEP}"
            return f"no slot attention found: nothing was replaced ({looked_for})"
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
    torch.compile and fully_shard, and while no other thread makes tensors: the default dtype is float64 for moments.

    Returns:
        a report; print it.

    Raises:
        ValueError: where `model` is not a torch.nn.Module.
    """
    _check("patch", model)
    found, wrapped = [], {}
    for path, module in list(model.named_modules()):
        if reason := _wrapped(module):
            wrapped[path] = reason
        entry = _patch_one(path, module, next((wrapped[x] for x in wrapped if _is_inside(path, x)), ""))
        if entry is not None:
            found.append(entry)
    # Where no more is known than that it looks like slot attention, it is often a model that holds the module.
    holders = {a.path for a in found for b in found if a is not b and _is_inside(b.path, a.path)}
    return PatchReport(tuple(a for a in found if not a.note.startswith(_UNKNOWN) or a.path not in holders))


def unpatch(model: nn.Module) -> list[str]:
    """Gives every module that `patch` replaced its own class back. Returns their paths.

    Raises ValueError where `model` is not a torch.nn.Module.
    """
    _check("unpatch", model)
    paths = []
    for path, module in model.named_modules():
        if hasattr(type(module), "_published_class"):
            module.__class__ = _without_ours(type(module))
            paths.append(path)
    return paths


def _without_ours(kind: type) -> type:
    """The class without what `patch` put in: the published one itself, or one as fully_shard or a parametrisation has
    derived from the patched class since, derived from the published one.
    """
    if "_published_class" in vars(kind):
        return kind._published_class
    bases = tuple(_without_ours(base) if hasattr(base, "_published_class") else base for base in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, body)


def _check(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: model is a {type(model).__name__}: pass a torch.nn.Module")


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _wrapped(module: nn.Module) -> str:
    """Why `module` and what is inside cannot be patched any more."""
    kind = type(module)
    if getattr(module, "_compiled_call_impl", None) is not None or kind.__name__ == "OptimizedModule":
        return "is compiled: patch before torch.compile"
    # by name: they need not be imported
    return _SHARDED if {base.__name__ for base in kind.__mro__} & {"FSDPModule", "FullyShardedDataParallel"} else ""


def _patch_one(path: str, module: nn.Module, wrapped: str) -> Patched | None:
    """Replaces the module if it is a known one. None: it is no slot attention."""
    kind = type(module)

    def entry(implementation: str, replaced: str, note: str = "") -> Patched:
        return Patched(path, kind.__name__, implementation, replaced, note)

    if hasattr(kind, "_published_class"):
        known = _implementation(kind._published_as)
        return entry(known.name, known.replaced, "; ".join(filter(None, ("was patched before", known.note))))
    if isinstance(module, SlotAttention):
        return entry("spot_kernels", "", "runs on our operators as it is")
    # those whose class has the module's name go first
    named = [known for known in IMPLEMENTATIONS if _named_class(kind, known)]
    others = [known for known in IMPLEMENTATIONS if known not in named and known.shape.has_layers_of(module)]
    compared = [(known, *_compare(module, known)) for known in [*named, *others]]
    fitting = [(known, sizes) for known, differences, sizes in compared if not differences]
    if not fitting and not named and not _looks_like_one(module):
        return None
    if any(type(parameter).__name__ == "DTensor" for parameter in module.parameters()):
        wrapped = wrapped or _SHARDED
    if not fitting:
        compared = compared or [(known, *_compare(module, known)) for known in IMPLEMENTATIONS]
        known, differences, _ = min(compared[: len(named) or None], key=lambda item: len(item[1]))
        if wrapped:
            return entry("", "", wrapped)
        if named:
            return entry("", "", f"closest to {known.name}, but {_listed(differences)}")
        return entry("", "", f"{_UNKNOWN} (closest is {known.name}, but {_listed(differences)}): {_STEP}")
    if reason := wrapped or _obstacle(module, fitting[0][0]):
        return entry(fitting[0][0].name, "", reason)
    reasons = []
    for known, sizes in fitting:
        patched, reason = _examined(module, known, sizes)
        if not reason:
            module.__class__ = patched
            return entry(known.name, known.replaced, known.note)
        reasons.append((known.name, reason))
    # of forms with the same layers, the one with which it agreed but for a switch
    name, reason = next((item for item in reasons if item[1].startswith(_READS)), reasons[0])
    return entry(name, "", reason)


def _examined(module: nn.Module, known: Implementation, sizes: Sizes) -> tuple[type | None, str]:
    """The class to give to the module, and why it must not have it; empty: it may."""
    try:
        patched = _patched_class(type(module), known.name)
    except Exception as error:  # a metaclass or __init_subclass__ may refuse
        return None, f"no class can be derived from it: {error}"
    reason, asked_for = disagreement(module, patched, lambda module, draw: known.calls(module, sizes, draw))
    if reason:
        return None, reason
    attributes, data = read_by_code(module, known.methods)
    unknown = unknown_attributes(module, attributes | asked_for, known.shape.attributes, set(sizes.values()))
    if unknown := sorted({f"self.{name}" for name in unknown} | data):
        return None, f"{_READS} {_listed(unknown, ', ')}, which {known.name} does not: {_STEP}"
    return patched, ""


def _listed(things: list[str], between: str = "; ") -> str:
    """The first few, and how many more there are."""
    more = len(things) - _NAMED_DIFFERENCES
    return between.join(things[:_NAMED_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def _looks_like_one(module: nn.Module) -> bool:
    """By the name of its class, or by a GRU cell beside projections and a LayerNorm."""
    layers = [*module.children()]
    projections = sum(isinstance(layer, (nn.Linear, nn.Sequential)) for layer in layers)
    has = [any(isinstance(layer, kind) for layer in layers) for kind in (nn.GRUCell, nn.LayerNorm)]
    return bool(_LOOKS_LIKE_ONE.search(type(module).__name__)) or (all(has) and projections >= 3)


def _implementation(name: str) -> Implementation:
    return next(known for known in IMPLEMENTATIONS if known.name == name)


def _named_class(kind: type, known: Implementation) -> type | None:
    """The class of that implementation's name that `kind` is, or is derived from."""
    return next((base for base in kind.__mro__ if base.__name__ == known.shape.name), None)


def _compare(module: nn.Module, known: Implementation) -> tuple[list[str], Sizes]:
    """In what the module's class and layers differ from an implementation's, and the sizes of its layers."""
    kind, base = type(module), _named_class(type(module), known)
    differences, sizes = known.shape.compare(module)
    for name, function in known.methods.items():
        original = inspect.getattr_static(kind, name, None)
        if base is not None and not inspect.isfunction(vars(base).get(name)):
            differences.append(f"{base.__name__} defines no method {name}")
        elif base is not None and original is not vars(base)[name]:
            differences.append(f"{kind.__name__} has a {name} of its own")
        elif not inspect.isfunction(original):
            differences.append(f"it has no method {name}")
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
        "__module__": published.__module__,
        "__qualname__": published.__qualname__,
        "__doc__": published.__doc__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "_published_class": published,
        "_published_as": name,
        "_published_default_noise": _implementation(name).default_noise,
    }
    return type(published)(published.__name__, (published,), body | _implementation(name).methods)


def _refuse_script(self: nn.Module) -> Any:
    """What torch.jit.script calls first."""
    name = self._published_class.__name__
    raise ValueError(f"torch.jit.script cannot compile the operators in {name}: unpatch first, or use torch.jit.trace")


def _reduce(self: nn.Module, protocol: int) -> Any:
    """The class is made at run time: copies and pickles find it by the published one."""
    function, arguments, *rest = self._published_class.__reduce_ex__(self, protocol)
    if function is copyreg.__newobj__ and arguments[:1] == (type(self),) and "_published_class" in vars(type(self)):
        return _new, (self._published_class, self._published_as, *arguments[1:]), *rest
    return function, arguments, *rest


def _new(published: type, name: str, *arguments: Any) -> nn.Module:
    patched = _patched_class(published, name)
    return patched.__new__(patched, *arguments)
