"""Tensors in tuples and dataclasses: batches, what is drawn for a step, results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def leaves(value: Any) -> list[Any]:
    """Tensors and plain values in `value`, in order."""
    if isinstance(value, tuple):
        return [leaf for each in value for leaf in leaves(each)]
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


def map_tensors(value: T, function: Callable[[Tensor], Any]) -> T:
    """`value` with `function` of each tensor in its place; plain values stay."""
    if isinstance(value, tuple):
        return tuple(map_tensors(each, function) for each in value)
    if is_dataclass(value):
        return replace(
            value, **{field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)}
        )
    return function(value) if isinstance(value, Tensor) else value


def shapes_and_values(value: Any) -> tuple:
    """What a compiled or recorded function of `value` depends on: its tensors' shapes and dtypes, its plain values."""
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves(value))
