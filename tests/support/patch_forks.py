"""Forks of SLATE's class that compute the same while a switch of their own is at its default, for `test_patch_forks`.

Every one reads its switch in another way.
"""

import functools
import os
import types

import torch
import torch.nn.functional as F
from torch import nn

from published_modules import SLOTS, WIDTH, Projected, gru_step, heads_of, joint_softmax, weighted_mean

TEMPERATURE = 1.0
SETTINGS = {"temperature": 1.0}
settings = types.SimpleNamespace(temperature=1.0)
tensor_temperature = torch.ones(())


class Fork(Projected):
    """SLATE's formula with logits divided by `divisor`."""

    def __init__(self):
        super().__init__()
        self.num_iterations, self.num_slots, self.num_heads, self.input_size = 3, SLOTS, 2, WIDTH

    def divisor(self):
        return 1.0

    def forward(self, inputs, slots):
        k, v = (heads_of(x, self.num_heads) for x in self.keys_values(inputs))
        k = (self.slot_size // self.num_heads) ** -0.5 * k
        for _ in range(self.num_iterations):
            logits = k @ heads_of(self.queries(slots), self.num_heads).transpose(-1, -2) / self.divisor()
            attn = joint_softmax(logits)
            updates = weighted_mean(attn, v, self.epsilon).transpose(1, 2).flatten(2)
            slots = gru_step(self.gru, updates, slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attn.sum(1)


class Temperature(Fork):
    """With a switch that nothing reads yet."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0


class InstanceAttribute(Temperature):
    def divisor(self):
        return self.temperature


class ClassAttribute(Fork):
    temperature = 1.0

    def divisor(self):
        return self.temperature


class NamedClassAttribute(Fork):
    temperature = 1.0

    def divisor(self):
        return NamedClassAttribute.temperature


class TypeOfSelf(Fork):
    temperature = 1.0

    def divisor(self):
        return self.__class__.temperature


class Property(Fork):
    def __init__(self):
        super().__init__()
        self._temperature = 1.0

    @property
    def temperature(self):
        return self._temperature

    def divisor(self):
        return self.temperature


class GetAttr(Fork):
    """It has no such attribute yet."""

    def divisor(self):
        return getattr(self, "temperature", 1.0)


class ThroughDict(Temperature):
    def divisor(self):
        return vars(self)["temperature"]


class PlainTensor(Fork):
    def __init__(self):
        super().__init__()
        self.temperature = torch.ones(())

    def divisor(self):
        return self.temperature


class Configuration(Fork):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(temperature=1.0)

    def divisor(self):
        return self.config.temperature


class OwnFunction(Fork):
    """A function that is exchanged."""

    def __init__(self):
        super().__init__()
        self.divide_by = float

    def divisor(self):
        return self.divide_by(1)


class OnALayer(Fork):
    def __init__(self):
        super().__init__()
        self.gru.temperature = 1.0

    def divisor(self):
        return self.gru.temperature


class ExtraLayer(Fork):
    def __init__(self):
        super().__init__()
        self.gate = nn.Identity()

    def divisor(self):
        return self.gate(1.0)


class Global(Fork):
    def divisor(self):
        return TEMPERATURE


class GlobalDict(Fork):
    def divisor(self):
        return SETTINGS["temperature"]


class GlobalObject(Fork):
    def divisor(self):
        return settings.temperature


class GlobalTensor(Fork):
    def divisor(self):
        return tensor_temperature


def temperature_of_the_module():
    return TEMPERATURE


class GlobalInAFunction(Fork):
    def divisor(self):
        return temperature_of_the_module()


def temperature_of(module):
    return module.temperature


class FunctionOfSelf(Temperature):
    def divisor(self):
        return temperature_of(self)


class Environment(Fork):
    def divisor(self):
        return float(os.environ.get("FORK_TEMPERATURE", 1))


class GetEnvironment(Fork):
    def divisor(self):
        return float(os.getenv("FORK_TEMPERATURE", 1))


class Lambda(Temperature):
    def divisor(self):
        return (lambda: self.temperature)()


class RareBranch(Temperature):
    """The small inputs of the comparison never take it."""

    def divisor(self):
        return self.temperature if self.num_iterations > 3 else 1.0


class StaticMethod(Fork):
    @staticmethod
    def temperature():
        return TEMPERATURE

    def divisor(self):
        return self.temperature()


class OfTheBase(InstanceAttribute):
    def divisor(self):
        return super().divisor()


def decorated(function):
    @functools.wraps(function)
    def call(self, *arguments):
        return function(self, *arguments) * self.temperature

    return call


class Decorated(Temperature):
    @decorated
    def divisor(self):
        return 1.0


def closed_over():
    temperature = 1.0

    class Closure(Fork):
        def divisor(self):
            return temperature

    return Closure()


class Imported(Fork):
    def divisor(self):
        from patch_forks import TEMPERATURE as imported

        return imported


class DefaultArgument(Fork):
    def divisor(self, settings=SETTINGS):
        return settings["temperature"]


class FunctionAttribute(Fork):
    def divisor(self):
        return temperature_of.scale


temperature_of.scale = 1.0


class Counted(Fork):
    """An integer is not a width because it has the value of one."""

    def __init__(self):
        super().__init__()
        self.topk = WIDTH

    def divisor(self):
        return self.topk / WIDTH


_CLASSES = {*Fork.__subclasses__(), *Temperature.__subclasses__(), OfTheBase} - {Temperature}
FORKS = [*sorted(_CLASSES, key=lambda fork: fork.__name__), closed_over]


class Harmless(Fork):
    """Attributes that repeat widths of layers, and code that reads nothing else."""

    def __init__(self):
        super().__init__()
        self.slot_dim, self.history, self.mlp_hidden_size = self.slot_size, [], 20

    @property
    def device(self):
        return self.project_q.weight.device

    @staticmethod
    def one():
        return 1.0

    def divisor(self):
        assert self.slot_dim == self.project_q.out_features and torch.pi > 3 and F.relu is not None
        assert self.device.type == "cpu" and isinstance(self, nn.Module) and len([*self.children()]) == 8
        return self.one() if self.training else 1.0
