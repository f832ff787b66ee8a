"""What a published forward pass reads beside its inputs, layers and known numbers, by name.

A fork's own switch does nothing while it is at its default: no comparison of results finds it, and a forward of ours
would go on without it when it is changed later. So the code of the class is read (`read_by_code`), with the methods,
properties and functions of its package that it reaches, for attributes of `self` and for data of modules, classes and
closures; and the attributes that it asks for while it runs are recorded (`Recorder`), whatever way it asks for them.
"""

from __future__ import annotations

import dis
import inspect
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# How a module was built says what else it has.
_OF_EVERY_MODULE = (set(dir(nn.Module)) | set(vars(nn.Module()))) - {"__dict__", "__class__"}
# Their constants are no switches of a fork.
_LIBRARIES = {"torch", "numpy", "math", "einops", "typing", "builtins"}
# What published classes call the sizes of their layers.
_WIDTHS = {
    "dim",
    "embed_dim",
    "feature_dim",
    "feature_size",
    "hidden_dim",
    "hidden_size",
    "in_dim",
    "in_features",
    "inner_dim",
    "inp_dim",
    "input_dim",
    "input_size",
    "kvq_dim",
    "mlp_hidden_size",
    "mlp_size",
    "out_dim",
    "out_size",
    "slot_dim",
    "slot_size",
    "slots_dim",
}
_SELF, _NOTHING = object(), object()
# A function and what it calls the module, empty where that is none of its arguments.
_Code = tuple[FunctionType, str]


def unknown_attributes(
    module: nn.Module, names: Iterable[str], known: Collection[str], widths: Collection[int]
) -> set[str]:
    """Those of `names` that are no known attribute, nothing that every module has and no code of the class.

    widths: sizes of the layers, which attributes such as `dim` may repeat.
    """

    def is_harmless(name: str) -> bool:
        if name in vars(module):
            value = vars(module)[name]
            return name in _WIDTHS and type(value) is int and value in widths
        return bool(_code_of(inspect.getattr_static(type(module), name, None)))

    return {name for name in set(names) - set(known) - _OF_EVERY_MODULE if not is_harmless(name)}


class Recorder:
    """`kind`, a class derived from a module's, notes in `names` the attributes that its methods ask for."""

    def __init__(self, published: type):
        names, quiet = set(), []

        def get_attribute(self, name):
            if not quiet:
                names.add(name)
            return super(kind, self).__getattribute__(name)

        def without_notes(method):
            """PyTorch's own, which finds parameters and layers by way of __dict__."""

            def call(self, *arguments):
                quiet.append(True)
                try:
                    return getattr(super(kind, self), method)(*arguments)
                finally:
                    quiet.pop()

            return call

        body = {method: without_notes(method) for method in ("__getattr__", "__setattr__")}
        body["__getattribute__"] = get_attribute
        kind = type(published)(published.__name__, (published,), body)
        self.names, self.kind = names, kind


def read_by_code(module: nn.Module, methods: Iterable[str]) -> tuple[set[str], set[str]]:
    """What the code of the methods can reach: names of attributes of `self` that there are; and data of modules,
    classes, closures and layers, as it is written there ("config.temperature").
    """
    kind, attributes, data, seen = type(module), set(), set(), set()
    todo = [code for name in methods for code in _code_of(inspect.getattr_static(kind, name, None))]
    own = {_package(base) for base in kind.__mro__} - _LIBRARIES
    while todo:
        function, this = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        if hasattr(function, "__wrapped__"):
            todo += _code_of(function.__wrapped__)
        if _package(function) not in own:
            continue
        data |= {f"{name}={value!r}" for name, value in _defaults(function) if _is_data(value)}
        for what, name, value in _reads(function, this, module):
            if what == "attribute":
                attributes |= {name} if _has(module, name) else set()
                todo += _code_of(inspect.getattr_static(kind, name, None))
            elif what == "super":
                todo += [code for base in kind.__mro__ for code in _code_of(vars(base).get(name))]
            elif _is_data(value):
                data.add(name)
            elif isinstance(value, FunctionType):
                todo += [(value, "self" if value.__code__.co_varnames[:1] == ("self",) else "")]
    return attributes, data


def _defaults(function: FunctionType) -> list[tuple[str, Any]]:
    """Default arguments that can change within."""
    arguments = inspect.signature(function).parameters.values()
    constants = (bool, int, float, str, type(None))
    return [(p.name, p.default) for p in arguments if p.default is not p.empty and not isinstance(p.default, constants)]


def _has(module: nn.Module, name: str) -> bool:
    own = vars(module), module._parameters, module._buffers, module._modules
    return any(name in names for names in own) or inspect.getattr_static(type(module), name, _NOTHING) is not _NOTHING


def _code_of(value: Any) -> list[_Code]:
    """The code of a method, of a static or class method, or of a property."""
    if isinstance(value, property):
        value = value.fget
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType):
        return []
    return [(function, "" if isinstance(value, staticmethod) else (*function.__code__.co_varnames, "")[0])]


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return (name or "").partition(".")[0]


def _is_data(value: Any) -> bool:
    is_code = isinstance(value, (ModuleType, logging.Logger)) or callable(value) and not isinstance(value, nn.Module)
    return not is_code or value is os.getenv


def _reads(function: FunctionType, this: str, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """("attribute", name, None) of `self`, ("super", name, None), ("value", as written, value) of anything else."""
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def begins(how: str, name: Any) -> Any:
        """The value of a name with which an expression begins."""
        if how.startswith("LOAD_FAST") or how in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            if name == this:
                return _SELF
            try:
                return closure[name].cell_contents
            except (KeyError, ValueError):  # of an enclosing call, or not filled yet
                return _NOTHING
        return function.__globals__.get(name, _NOTHING) if how in ("LOAD_GLOBAL", "LOAD_NAME") else _NOTHING

    for code in _nested(function.__code__):
        if "super" in code.co_names:
            yield from (("super", name, None) for name in code.co_names)
        value, name, of_library = _NOTHING, "", False
        for instruction in dis.get_instructions(code):
            how, argument = instruction.opname, instruction.argval
            if how in ("LOAD_ATTR", "LOAD_METHOD") and value is not _NOTHING:
                name = f"{name}.{argument}"
                if value is _SELF:
                    yield "attribute", argument, None
                    value, of_library = module._modules.get(argument), True
                    value = _NOTHING if value is None else value
                elif isinstance(value, (ModuleType, type, FunctionType)):
                    value = getattr(value, argument, _NOTHING)
                elif of_library:
                    if not _is_of_layer(value, argument):
                        yield "value", name, None
                    value = _NOTHING
                continue
            if value is not _NOTHING and value is not _SELF and not of_library:
                yield "value", name, value
            if how == "IMPORT_NAME" and argument.partition(".")[0] not in _LIBRARIES:
                yield "value", f"import {argument}", None
            name, value = argument, begins(how, argument)
            is_code = isinstance(value, (ModuleType, type, FunctionType, BuiltinFunctionType))
            of_library = is_code and _package(value) in _LIBRARIES


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code and that of functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_of_layer(layer: nn.Module, name: str) -> bool:
    """Whether an attribute of a layer is one that its class gives it."""
    return name in {*_OF_EVERY_MODULE, *layer._parameters, *layer._buffers, *layer._modules} or (
        name in getattr(layer, "__constants__", ()) or hasattr(type(layer), name)
    )
