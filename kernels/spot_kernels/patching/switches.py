"""What the code of a forward reads that its replacement does not: the difference that no comparison of outputs shows.

A fork's own switch (a temperature, a flag of an ablation) does nothing while it has its default value: outputs and
gradients agree, and once the switch is changed the replacement would silently go on without it. So the bytecode of the
method is read (source text may be missing), and of all methods, properties and functions that it reaches outside of
the libraries. It may read attributes that the replacement reads as well, widths of layers, and code. Anything else is
reported: further attributes of the module, data of modules, classes, closures, default arguments and layers, and
whatever is looked up by a string.

Attributes are matched by name alone, whatever object they are asked of: data flow through bytecode differs between
versions of Python, and a false match only leaves a module as it was.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import logging
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Their functions are not followed and their constants are no switches.
_LIBRARIES = {"torch", "numpy", "math", "einops", "typing", "builtins"}
_OF_EVERY_MODULE = (set(dir(nn.Module)) | set(vars(nn.Module()))) - {"__dict__"}
_LOOKUPS_BY_STRING = {"getattr", "hasattr", "attrgetter", "vars", "__dict__", "globals", "locals", "eval", "exec"}
# What published classes call the sizes of their layers: an attribute of such a name that equals one says nothing new.
_WIDTHS = set(
    "dim embed_dim feature_dim feature_size hidden_dim hidden_size in_dim in_features inner_dim inp_dim input_dim "
    "input_size kvq_dim mlp_hidden_size mlp_size out_dim out_size slot_dim slot_size slots_dim".split()
)
_LOAD_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_LOAD_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_LOAD_CLOSURE = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_NOTHING = object()


def unknown_reads(module: nn.Module, methods: Collection[str], known: Collection[str]) -> list[str]:
    """What the methods read beside the attributes `known`, as it is written: "self.gate", "config.temperature"."""
    kind, unknown, seen = type(module), set(), set()
    widths = {size for parameter in module.parameters() for size in parameter.shape}
    todo = [inspect.getattr_static(kind, method) for method in methods]
    while todo:
        function = _function(todo.pop())
        if function is None or function in seen or _package(function) in _LIBRARIES:
            continue
        seen.add(function)
        todo.append(getattr(function, "__wrapped__", None))
        attributes, looked_up, values = _reads(function, module)
        for name in attributes:
            todo += [vars(base)[name] for base in kind.__mro__ if name in vars(base)]
        present = {name for name in attributes if has_attribute(module, name)}
        for name in (present | looked_up) - set(known) - _OF_EVERY_MODULE:
            if not _is_width(module, name, widths) and not _is_code_of_class(module, name):
                unknown.add(f"self.{name}")
        for text, value in values:
            if isinstance(value, FunctionType):
                todo.append(value)
            elif _is_data(value):
                unknown.add(text)
    return sorted(unknown)


def has_attribute(module: nn.Module, name: str) -> bool:
    """Like hasattr, without running properties."""
    of_class = inspect.getattr_static(type(module), name, _NOTHING)
    own = vars(module), module._parameters, module._buffers, module._modules
    return of_class is not _NOTHING or any(name in names for names in own)


def _is_width(module: nn.Module, name: str, widths: Collection[int]) -> bool:
    value = vars(module).get(name)
    return name in _WIDTHS and type(value) is int and value in widths


def _is_code_of_class(module: nn.Module, name: str) -> bool:
    """A method or property, which is followed; a function on the instance may be exchanged, so it is a switch."""
    return name not in vars(module) and _function(inspect.getattr_static(type(module), name, None)) is not None


def _is_data(value: Any) -> bool:
    is_code = isinstance(value, (ModuleType, logging.Logger)) or callable(value) and not isinstance(value, nn.Module)
    return value is not _NOTHING and not is_code


def _function(value: Any) -> FunctionType | None:
    """The function of a method, static or class method, or property."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (name or "").partition(".")[0]


def _reads(function: FunctionType, module: nn.Module) -> tuple[set[str], set[str], list[tuple[str, Any]]]:
    """Names of attributes, of whatever object; names looked up by a string; other values with how they are written."""
    attributes, names, strings = set(), set(), set()
    values, closure = [*_defaults(function)], _closure(function)
    for code in _nested(function.__code__):
        strings |= {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
        text, value = "", _NOTHING
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation in _LOAD_ATTRIBUTE:
                attributes.add(name)
                # a chain: `self.gru.temperature`, `config.temperature`, `Class.temperature`
                text, value = f"{text}.{name}", _member(value, name)
                if value is _NOTHING and name in module._modules:
                    text, value = f"self.{name}", module._modules[name]
                    continue
            elif operation in _LOAD_GLOBAL:
                names.add(name)
                text, value = name, function.__globals__.get(name, _NOTHING)
            elif operation in _LOAD_CLOSURE:
                text, value = name, closure.get(name, _NOTHING)
            elif operation == "IMPORT_NAME" and name.partition(".")[0] not in _LIBRARIES:
                text, value = f"import {name}", name
            else:
                value = _NOTHING
            values.append((text, value))
    by_string = _LOOKUPS_BY_STRING & (names | attributes)
    return attributes, (strings or by_string) if by_string else set(), values


def _member(owner: Any, name: str) -> Any:
    """An attribute of a module, class, function or layer, where it is no constant of a library."""
    if isinstance(owner, nn.Module):
        return _NOTHING if _is_of_layer(owner, name) else getattr(owner, name, _NOTHING)
    if isinstance(owner, (ModuleType, type, FunctionType)) and _package(owner) not in _LIBRARIES:
        return getattr(owner, name, _NOTHING)
    return _NOTHING


def _is_of_layer(layer: nn.Module, name: str) -> bool:
    """Whether the class of a layer gives it that attribute."""
    own = {*_OF_EVERY_MODULE, *layer._parameters, *layer._buffers, *layer._modules}
    return name in own or name in getattr(layer, "__constants__", ()) or hasattr(type(layer), name)


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Default arguments that can change."""
    for parameter in inspect.signature(function).parameters.values():
        if not isinstance(parameter.default, (int, float, str, type(None))):
            yield parameter.name, parameter.default


def _closure(function: FunctionType) -> dict[str, Any]:
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            values[name] = cell.cell_contents
    return values


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code and that of functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
