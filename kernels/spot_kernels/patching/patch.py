"""`patch(model)`: published slot-attention modules inside a model run on our operators, in place; `unpatch(model)`.

A module is replaced in four steps, and left alone with a reason in the report where one of them fails:

1. it has the attributes and methods of a published class (`implementations`), whatever its own class is called;
2. nothing is attached that the replacement would bypass: hooks on its layers, torch.compile, sharding;
3. its own methods and ours agree on small inputs (`comparison`);
4. its code reads nothing that ours does not (`switches`): what has no effect now may have one later.

Replacing a module exchanges its class for one derived from it, in which only the methods of `implementations` are
ours. So parameters, state-dict keys, hooks, `isinstance` and the optimiser's references stay; and deepcopy, pickle,
replicas and torch.compile, which all go by the class, bind the methods to the module at hand: a function bound to the
instance would not survive those.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spot_kernels.modules.slot_attention import SlotAttention
from spot_kernels.patching.comparison import OTHER_LAYOUT, disagreement
from spot_kernels.patching.implementations import IMPLEMENTATIONS, Implementation
from spot_kernels.patching.switches import has_attribute, unknown_reads

_REMEDY = "its forward can call spot_kernels.slot_attention_step"
_SHARDED = "is sharded: patch before fully_shard or FullyShardedDataParallel"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAME_OF_SLOT_ATTENTION = re.compile(r"slot_?att|att\w*slot", re.IGNORECASE)


@dataclass(frozen=True)
class Patched:
    """One slot-attention module of a model.

    path: as in `named_modules`. implementation: whose it is, empty if unknown. replaced: what of it, empty: nothing.
    note: why it was left alone, or what else there is to know.
    """

    path: str
    class_name: str
    implementation: str
    replaced: str
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """The slot-attention modules that `patch` saw, in the model's order. Prints as a table."""

    modules: tuple[Patched, ...]

    @property
    def replaced(self) -> tuple[Patched, ...]:
        return tuple(module for module in self.modules if module.replaced)

    @property
    def left(self) -> tuple[Patched, ...]:
        return tuple(module for module in self.modules if not module.replaced)

    def __str__(self) -> str:
        if not self.modules:
            known = ", ".join(dict.fromkeys(re.split(", | \\(", known.name)[0] for known in IMPLEMENTATIONS))
            return (
                f"no slot attention found: nothing was replaced (looked for the modules of {known}; of another form, "
                f"{_REMEDY})"
            )
        rows = [("module", "class", "implementation", "replaced", "note")]
        for module in self.modules:
            implementation, replaced = module.implementation or "unknown", module.replaced or "nothing"
            rows.append((module.path or "(the model)", module.class_name, implementation, replaced, module.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )


def patch(model: nn.Module) -> PatchReport:
    """Makes the published slot-attention modules in `model`, or the model itself, run on our operators, in place.

        report = spot_kernels.patch(model)
        print(report)

    Outputs and gradients stay up to rounding, random draws exactly. A second call changes nothing; `unpatch` undoes it.
    Patch before torch.compile and fully_shard, and while no other thread makes tensors: during the comparison the
    default dtype of the process is float64.

    Returns:
        which modules were replaced, and which were left alone and why.

    Raises:
        ValueError: if `model` is not a torch.nn.Module.
    """
    _check_is_module("patch", model)
    entries, wrapped, unknown = [], {}, []
    for path, module in list(model.named_modules()):
        if reason := _wrapped(module):
            wrapped[path] = reason
        entry = _patch_one(path, module, next((wrapped[outer] for outer in wrapped if _is_inside(path, outer)), ""))
        if entry is not None:
            entries.append(entry)
            if not entry.implementation:
                unknown.append(entry)
    # An unknown class with a name like SlotAttentionModel often is the model that holds the module.
    holders = [a for a in unknown if any(a is not b and _is_inside(b.path, a.path) for b in entries)]
    return PatchReport(tuple(entry for entry in entries if entry not in holders))


def unpatch(model: nn.Module) -> list[str]:
    """Gives every module that `patch` replaced its own class back.

    Returns:
        the paths of these modules, as in `named_modules`.

    Raises:
        ValueError: if `model` is not a torch.nn.Module.
    """
    _check_is_module("unpatch", model)
    paths = []
    for path, module in model.named_modules():
        if hasattr(type(module), "_published_class"):
            module.__class__ = _without_ours(type(module))
            paths.append(path)
    return paths


def _without_ours(kind: type) -> type:
    """The class without what `patch` put in: the published class itself; or, if fully_shard or a parametrisation
    derived a class from the patched one since, such a class derived from the published one.
    """
    if "_published_class" in vars(kind):
        return kind._published_class
    bases = tuple(_without_ours(base) if hasattr(base, "_published_class") else base for base in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, body)


def _check_is_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function}: model is a {type(model).__name__}: pass a torch.nn.Module")


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _patch_one(path: str, module: nn.Module, wrapped: str) -> Patched | None:
    """Replaces the module if it can be. None: it is no slot attention. wrapped: why nothing at this path can be."""
    kind = type(module)
    entry = functools.partial(Patched, path, kind.__name__)
    if hasattr(kind, "_published_class"):
        known = _implementation(kind._published_as)
        return entry(known.name, known.replaced, "; ".join(filter(None, ("was patched before", known.note))))
    if isinstance(module, SlotAttention):
        return entry("spot_kernels", "", "runs on our operators as it is")
    mismatches = {known.name: _mismatches(module, known) for known in IMPLEMENTATIONS}
    fitting = [known for known in IMPLEMENTATIONS if not mismatches[known.name]]
    if not fitting and not _resembles_slot_attention(module):
        return None
    if not fitting:
        closest = min(mismatches, key=lambda name: len(mismatches[name]))
        unlike = _enumerated(mismatches[closest], "; ")
        return entry("", "", wrapped or f"fits no known form (closest is {closest}, but {unlike}): {_REMEDY}")
    if obstacle := wrapped or _obstacle(module, fitting[0]):
        return entry(fitting[0].name, "", obstacle)
    # Some forms have the same attributes: the first one that agrees is taken. A fork of one of them differs from each;
    # the note is about the closest one: it agreed but for a switch, or at least gave as many results.
    notes = []
    for known in fitting:
        try:
            patched = _patched_class(kind, known.name)
        except Exception as error:  # a metaclass or __init_subclass__ may refuse
            return entry(known.name, "", f"no class can be derived from it: {error}")
        if note := disagreement(module, patched, known.example_calls):
            notes.append((2 if OTHER_LAYOUT in note else 1, known.name, note))
        elif switches := unknown_reads(module, known.methods, known.reads):
            method, read = next(iter(known.methods)), _enumerated(switches, ", ")
            notes.append((0, known.name, f"its {method} reads {read}, which {known.name} does not: {_REMEDY}"))
        else:
            module.__class__ = patched
            return entry(known.name, known.replaced, known.note)
    _, name, note = min(notes, key=lambda each: each[0])
    return entry(name, "", note)


def _mismatches(module: nn.Module, known: Implementation) -> list[str]:
    """What a module lacks that the replacement of an implementation needs."""
    mismatches = [f"it has no {name}" for name in sorted(known.reads) if not has_attribute(module, name)]
    for name, replacement in known.methods.items():
        original = inspect.getattr_static(type(module), name, None)
        if not inspect.isfunction(original):
            mismatches.append(f"it has no method {name}")
        elif _arguments(original) != _arguments(replacement):
            mismatches.append(f"its {name} takes {inspect.signature(original)}")
    return mismatches


def _arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _resembles_slot_attention(module: nn.Module) -> bool:
    """By the name of its class, or by a GRU cell beside projections and a LayerNorm."""
    layers = [*module.children()]
    projections = sum(isinstance(layer, (nn.Linear, nn.Sequential)) for layer in layers)
    cells_and_norms = all(any(isinstance(layer, kind) for layer in layers) for kind in (nn.GRUCell, nn.LayerNorm))
    return bool(_NAME_OF_SLOT_ATTENTION.search(type(module).__name__)) or (cells_and_norms and projections >= 3)


def _obstacle(module: nn.Module, known: Implementation) -> str:
    """What of the module its replacement would bypass or the comparison would trigger; empty: nothing."""
    for name in known.methods:
        if name in vars(module):
            return f"its {name} was replaced on the instance"
    if any(type(parameter).__name__ == "DTensor" for parameter in module.parameters()):
        return _SHARDED
    for path, layer in module.named_modules():
        if path and (reason := _wrapped(layer)):
            return f"its layer {path} {reason}"
        if path and any(getattr(layer, hooks, None) for hooks in _HOOKS):
            return f"its layer {path} has hooks"
    return ""


def _wrapped(module: nn.Module) -> str:
    """Why `module` and what is inside cannot be patched any more."""
    kind = type(module)
    if getattr(module, "_compiled_call_impl", None) is not None or kind.__name__ == "OptimizedModule":
        return "is compiled: patch before torch.compile"
    # by name: they need not be imported
    return _SHARDED if {base.__name__ for base in kind.__mro__} & {"FSDPModule", "FullyShardedDataParallel"} else ""


def _enumerated(things: Iterable[str], separator: str) -> str:
    """The first three, and how many more there are."""
    first, rest = list(things)[:3], list(things)[3:]
    return separator.join(first) + (f" and {len(rest)} more" if rest else "")


def _implementation(name: str) -> Implementation:
    return next(known for known in IMPLEMENTATIONS if known.name == name)


@functools.cache
def _patched_class(published: type, name: str) -> type:
    known = _implementation(name)
    body = {
        "__module__": published.__module__,
        "__qualname__": published.__qualname__,
        "__doc__": published.__doc__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "_published_class": published,
        "_published_as": name,
        "_published_default_noise": known.default_noise,
    }
    return type(published)(published.__name__, (published,), body | known.methods)


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
