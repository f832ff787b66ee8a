"""Forks that differ from a published class by a line, for `test_patch_forks`: each with the note about it."""

import published_frameworks as frameworks
import published_modules as published
import published_ports as ports


class ObjectCentricLibraryWithMean(ports.ObjectCentricLibrary):
    """No noise in evaluation."""

    def initial(self, inputs, num_slots):
        slots = super().initial(inputs, num_slots)
        return slots if self.training else self.slots_mu.expand_as(slots)


class OsrtWithTwoNorms(ports.Osrt):
    def forward(self, inputs):
        return super().forward(self.norm_input(inputs))


class MotionGroupingWithTemperature(ports.MotionGrouping):
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
