"""Forks of published classes, for `test_patch_forks`.

Those of SLATE's class compute the same while a switch of their own is at its default, and every one reads its switch in
another way. The rest differ from their class by a line.
"""

import functools
import os
import types

import torch
import torch.nn.functional as F
from torch import nn

import published_frameworks as frameworks
import published_modules as published
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


class ObjectCentricLibraryWithMean(published.ObjectCentricLibrary):
    """No noise in evaluation."""

    def initial(self, inputs, num_slots):
        slots = super().initial(inputs, num_slots)
        return slots if self.training else self.slots_mu.expand_as(slots)


class OsrtWithTwoNorms(published.Osrt):
    def forward(self, inputs):
        return super().forward(self.norm_input(inputs))


class MotionGroupingWithTemperature(published.MotionGrouping):
    temperature = 1.0

    def forward(self, inputs, num_slots=None):
        return super().forward(inputs / self.temperature, num_slots)


class AdaSlotWithTemperature(frameworks.AdaSlot):
    """A switch in what is replaced."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0

    def attention(self, slots, k, masks=None):
        return super().attention(slots, k / self.temperature, masks)


class AdaSlotOverTokens(frameworks.AdaSlot):
    def attention(self, slots, k, masks=None):
        return super().attention(slots, k, masks).softmax(-1)


class MotWithOtherStep(frameworks.Mot):
    """A step of its own, which its iterations do not call."""

    def step(self, slots, k, v, masks=None):
        slots, attn = super().step(slots, k, v, masks)
        return 2 * slots, attn

    def iterate(self, slots, k, v, masks=None):
        for _ in range(self.iters):
            slots, attn = frameworks.Mot.step(self, slots, k, v, masks)
        return slots, attn


class FtDinosaurWithOtherEps(frameworks.FtDinosaur):
    """Added to the weights, and larger."""

    def step(self, slots, k, v):
        attn = self.attention(slots, k)
        weights = attn + 1e-6
        return self.updated(slots, weights / weights.sum(-1, keepdim=True), v), attn.mean(dim=2)


class FtDinosaurThatCounts(frameworks.FtDinosaur):
    calls = 0

    def step(self, slots, k, v):
        self.calls += 1
        return super().step(slots, k, v)


class CodaWithOtherNoise(published.Coda):
    """Noise that is given is a draw of the initial slots themselves."""

    def forward_slots(self, inputs, eps=None):
        if eps is not None:
            eps = (eps - self.slot_mu) / self.slot_log_sigma.exp()
        return self.frames(inputs, eps)


class CodaWithScaledNoise(published.Coda):
    noise_scale = 1.0

    def forward_slots(self, inputs, eps=None):
        return self.frames(inputs, None if eps is None else self.noise_scale * eps)


class DiasWithNormedAttention(frameworks.OcBenchWithAllAttention):
    def forward(self, input, query, smask=None, num_iter=None):
        slots, attention = super().forward(input, query, smask, num_iter)
        return slots, [attn / (attn.sum(2, keepdim=True) + 1e-5) for attn in attention]


class DiasWithoutTheFirst(frameworks.OcBenchWithAllAttention):
    def forward(self, input, query, smask=None, num_iter=None):
        slots, attention = super().forward(input, query, smask, num_iter)
        return slots, attention[1:]


class MetaSlotWithoutMlp(frameworks.MetaSlot):
    def __init__(self):
        super().__init__(dropout=0.0)

    def step(self, q, k, v, smask=None):
        slots, attn = self.iteration(q, k, v, smask)
        return slots - self.ffn(self.norm2(slots)), attn


class MetaSlotWithTemperature(frameworks.MetaSlot):
    temperature = 1.0

    def step(self, q, k, v, smask=None):
        return self.iteration(q, k / self.temperature, v, smask)


_OCLF_STEPS = "AdaSlot, MOT (OCLF in another forward)"
_DIAS = "OCBench, attention of every iteration"
# Fork, the form that it is reported as, and how the note begins.
CHANGED = [
    (
        ObjectCentricLibraryWithMean,
        "object-centric-library",
        "its forward computes something else: results differ by",
    ),
    (OsrtWithTwoNorms, "OSRT", "its forward computes something else: results differ by"),
    (MotionGroupingWithTemperature, "Motion Grouping", "its forward reads self.temperature, which"),
    (AdaSlotWithTemperature, _OCLF_STEPS, "its iterate reads self.temperature, which"),
    (AdaSlotOverTokens, _OCLF_STEPS, "its iterate computes something else: results differ by"),
    (MotWithOtherStep, _OCLF_STEPS, "its step computes something else: results differ by"),
    (FtDinosaurWithOtherEps, "FT-DINOSAUR", "its forward computes something else: results differ by"),
    (FtDinosaurThatCounts, "FT-DINOSAUR", "its forward computes something else: it sets calls"),
    (CodaWithOtherNoise, "CODA", "its forward_slots computes something else: results differ by"),
    (CodaWithScaledNoise, "CODA", "its forward_slots reads self.noise_scale, which"),
    (DiasWithNormedAttention, _DIAS, "its forward computes something else: results differ by"),
    (DiasWithoutTheFirst, "OCBench", "its forward computes something else: the results differ in number"),
    (MetaSlotWithoutMlp, "MetaSlot", "its step computes something else: results differ by"),
    (MetaSlotWithTemperature, "MetaSlot", "its step reads self.temperature, which"),
]


class OclfWithGate(frameworks.OclfSteps):
    """A forward of its own, with a switch and another result: it stays, so that it may read what it wants."""

    def __init__(self):
        super().__init__()
        self.gate = 1.0

    def forward(self, inputs, conditioning, mask_of_slots=None):
        slots, attn = self.grouped(conditioning, *self.keys_values(inputs), mask_of_slots)
        return self.gate * slots, attn, attn.amax(1)
