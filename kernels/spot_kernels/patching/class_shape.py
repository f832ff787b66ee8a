"""What a published class looks like from outside: its layers with types and sizes, its own parameters, its numbers.

Sizes are letters: wherever a shape says "U" the module must have the same number. Nothing is matched loosely: a layer
of a derived type (quantised, with adapters, parametrised) and a layer too many are differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

Sizes = dict[str, int]


@dataclass(frozen=True)
class Layer:
    """One layer. kind: its type, or the names its type may have (of libraries that need not be installed); None: any.

    sizes: of a Linear (in, out), a LayerNorm (width,) or a GRUCell (in, hidden). parts: of a Sequential. optional:
    whether None may stand in its place.
    """

    kind: type | tuple[str, ...] | None = None
    sizes: tuple[str, ...] = ()
    bias: bool | None = None
    parts: tuple[Layer, ...] = ()
    optional: bool = False

    def difference(self, layer: nn.Module, sizes: Sizes) -> str:
        """What is another one in `layer`, in a few words; empty: nothing. Adds to `sizes` what it finds."""
        found = type(layer)
        if isinstance(self.kind, tuple):
            return "" if found.__name__ in self.kind else f"is a {found.__name__}"
        if self.kind is None:
            return ""
        if found is not self.kind:
            return f"is a {found.__name__}"
        if self.kind is nn.Sequential and len(layer) != len(self.parts):
            return f"has {len(layer)} layers"
        for i, part in enumerate(self.parts):
            if difference := part.difference(layer[i], sizes):
                return f"at {i} {difference}"
        if self.bias is not None and (layer.bias is not None) != self.bias:
            return "has no bias" if self.bias else "has a bias"
        if self.kind is nn.LayerNorm and (layer.weight is None or layer.bias is None):
            return "has no weight or bias"
        return _misfit(_sizes_of(layer), self.sizes, sizes)


def linear(inputs: str, outputs: str, *, bias: bool | None = None) -> Layer:
    return Layer(nn.Linear, (inputs, outputs), bias)


def norm(width: str) -> Layer:
    return Layer(nn.LayerNorm, (width,))


def gru(inputs: str, width: str, *, optional: bool = False) -> Layer:
    return Layer(nn.GRUCell, (inputs, width), optional=optional)


def chain(*parts: Layer) -> Layer:
    return Layer(nn.Sequential, parts=parts)


def named(*names: str) -> Layer:
    return Layer(names)


def _sizes_of(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    return (layer.input_size, layer.hidden_size) if isinstance(layer, nn.GRUCell) else ()


def _misfit(found: tuple[int, ...], wanted: tuple[str | int, ...], sizes: Sizes) -> str:
    if len(found) != len(wanted):
        return f"has the size {found}"
    for size, name in zip(found, wanted, strict=True):
        if size != (sizes.setdefault(name, size) if isinstance(name, str) else name):
            return f"has the size {found}, which does not fit the other layers"
    return ""


@dataclass(frozen=True)
class ClassShape:
    """A class by its name, its layers, its own parameters and buffers (shapes) and its numbers (attribute → type)."""

    name: str
    layers: Mapping[str, Layer]
    numbers: Mapping[str, type | tuple[type, ...]]
    parameters: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)

    @property
    def attributes(self) -> set[str]:
        """All names that it knows."""
        return {*self.layers, *self.numbers, *self.parameters, *self.buffers}

    def has_layers_of(self, module: nn.Module) -> bool:
        """Whether the module's layers have these names, before anything else is compared."""
        return all(name in module._modules or layer.optional for name, layer in self.layers.items())

    def compare(self, module: nn.Module) -> tuple[list[str], Sizes]:
        """In what `module` differs from this shape, each in a few words, and the sizes of its layers by letter."""
        sizes: Sizes = {}
        return [*self._differences(module, sizes)], sizes

    def _differences(self, module: nn.Module, sizes: Sizes) -> Iterator[str]:
        children = dict(module.named_children())
        for name, layer in self.layers.items():
            if name in children:
                if difference := layer.difference(children.pop(name), sizes):
                    yield f"{name} {difference}"
            elif not (layer.optional and getattr(module, name, module) is None):
                yield f"it has no {name}"
        for kind, wanted, found in (
            ("parameter", self.parameters, module.named_parameters(recurse=False)),
            ("buffer", self.buffers, module.named_buffers(recurse=False)),
        ):
            found = dict(found)
            for name, shape in wanted.items():
                if name not in found:
                    yield f"it has no {name}"
                elif difference := _misfit(tuple(found.pop(name).shape), shape, sizes):
                    yield f"{name} {difference}"
            yield from (f"it has a {kind} {name}" for name in found)
        yield from (f"it has a layer {name}" for name in children)
        for name, kind in self.numbers.items():
            if not isinstance(getattr(module, name, None), kind):
                yield f"its {name} is {getattr(module, name, 'missing')!r}"
