"""Every published class that `patch` knows, with the inputs it takes, and what tests of `patch` do with one."""

import torch
from torch.utils._pytree import tree_leaves

import published_frameworks as frameworks
import published_modules as published
import published_ports as ports
from published_modules import SLOT_WIDTH, SLOTS, WIDTH

INPUTS = {
    "alone": ((3, 25, SLOT_WIDTH),),
    "narrow": ((3, 25, WIDTH),),
    "video": ((3, 2, 25, WIDTH),),
    "maps": ((3, 2, WIDTH, 4, 4),),
    "slots": ((3, 25, WIDTH), (3, SLOTS, SLOT_WIDTH)),
    "slots first": ((3, SLOTS, SLOT_WIDTH), (3, 25, WIDTH)),
    "as wide as slots": ((3, 25, SLOT_WIDTH), (3, SLOTS, SLOT_WIDTH)),
}
# Implementation as reports name it (and after ": " another class of it) → class, the options of each variant, the
# inputs it takes.
MODULES = {
    "Slot Attention (evelinehong)": (published.Evelinehong, [{}], "alone"),
    "Slot Attention (evelinehong, 2021)": (published.Evelinehong2021, [{}], "alone"),
    "Slot Attention (untitled-ai)": (published.Untitled, [{}], "alone"),
    "object-centric-library": (ports.ObjectCentricLibrary, [{}], "alone"),
    "OSRT": (ports.Osrt, [{}], "narrow"),
    "Motion Grouping": (ports.MotionGrouping, [{}, {"slots": SLOTS}], "alone"),
    "lucidrains": (published.LucidrainsSlots, [{}], "alone"),
    "lucidrains, heads": (published.LucidrainsHeads, [{}], "alone"),
    "SLATE": (published.Slate, [{}, {"heads": 4}], "slots"),
    "STEVE": (published.Steve, [{}], "video"),
    "BO-QSA": (
        published.BoQsa,
        [{}, {"truncate": "fixed-point", "drop_path": 0}, {"truncate": "none"}],
        "as wide as slots",
    ),
    "BO-QSA, its Slot Attention": (published.BoQsaPlain, [{}], "as wide as slots"),
    "SPOT": (published.Spot, [{}, {"truncate": "bi-level"}, {"truncate": "fixed-point", "heads": 2}], "slots"),
    "OCLF (DINOSAUR)": (
        frameworks.Oclf,
        [{}, {"n_heads": 2, "kvq_dim": 24, "bias": True}, {"implicit": True}, {"with_mlp": False}],
        "slots",
    ),
    "AdaSlot, MOT (OCLF in another forward)": (
        frameworks.AdaSlot,
        [{}, {"n_heads": 2, "kvq_dim": 24, "low_bound": 4}, {"implicit": True, "with_mlp": False}],
        "slots",
    ),
    "AdaSlot, MOT (OCLF in another forward): MOT": (frameworks.Mot, [{}, {"n_heads": 2, "implicit": True}], "slots"),
    "FT-DINOSAUR": (
        frameworks.FtDinosaur,
        [{}, {"n_heads": 2, "kvq_dim": 24, "bias": True}, {"with_mlp": False}],
        "slots",
    ),
    "VideoSAUR, SlotContrast": (
        frameworks.Videosaur,
        [{}, {"kvq_dim": 24, "use_mlp": False}, {"use_gru": False}],
        "slots first",
    ),
    "OCBench": (frameworks.OcBench, [{}, {"trunc_bp": "bi-level", "dropout": 0.0}], "slots"),
    "OCBench, attention of every iteration": (
        frameworks.OcBenchWithAllAttention,
        [{}, {"trunc_bp": "bi-level", "dropout": 0.0}],
        "slots",
    ),
    "MetaSlot": (frameworks.MetaSlot, [{}, {"dropout": 0.0}], "slots"),
    "LSD": (published.Lsd, [{}, {"heads": 4}], "maps"),
    "LSD, learned slots": (published.Lsd, [{"learned": True}], "maps"),
    "CODA": (published.Coda, [{}, {"heads": 4}], "maps"),
    "CODA, learned slots": (published.Coda, [{"learned": True}], "maps"),
    "SlotDiffusion, SlotFormer": (frameworks.SlotFormer, [{}], "slots"),
    "SlotDiffusion, SlotFormer, with masks": (frameworks.SlotFormerWithMask, [{}], "slots"),
}


def known_as(name):
    return name.partition(": ")[0]


def build(name, variant=0):
    """A module with parameters of trained size: no layer is idle."""
    torch.manual_seed(variant)
    cls, options, _ = MODULES[name]
    module = cls(**options[variant])
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return module


def inputs_of(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = INPUTS[MODULES[name][2]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(module, inputs, *, seed=7, **kwargs):
    """All results, and the gradients of all inputs and parameters, from one state of the random generator."""
    torch.manual_seed(seed)
    results = tree_leaves(module(*inputs, **kwargs))
    weights = torch.Generator().manual_seed(6)
    loss = sum((x * torch.randn(x.shape, generator=weights).to(x)).sum() for x in results if x.requires_grad)
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return results, [torch.zeros(()) if g is None else g for g in gradients]


def assert_equal_to_rounding(results, expected, units=100.0):
    """Same shapes, dtypes and layouts; no difference above `units` roundings of the largest value."""
    for a, b in zip(results, expected, strict=True):
        assert len(a) == len(b)
        largest = max(x.abs().max().item() for x in b)
        for x, y in zip(a, b, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
            assert (x - y).abs().max().item() <= units * torch.finfo(y.dtype).eps * largest


def only(report):
    (module,) = report.modules
    return module
