"""What a step's kernels are for, from their names: where the time of a profile goes, in a few lines.

A name decides: cuBLAS's (`nvjet`, `gemm`), cuDNN's and the flash attention's, ATen's, Inductor's (`triton_poi_…`, which
lists the operators it has fused), and those of spot_kernels, which are its functions' own names.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

PRODUCTS, ATTENTION, OURS, NORM = "products", "attention", "ours", "LayerNorm"
CASTS, ELEMENTWISE, REDUCTIONS = "casts", "elementwise", "reductions"
OPTIMISER, COPIES, RANDOM, OTHER = "optimiser and clipping", "copies and fills", "random numbers", "other"

# The first pattern that occurs decides.
_PATTERNS = (
    (PRODUCTS, r"nvjet|gemm|gemv|splitKreduce|cublas|triton_tem_|triton_mm"),
    (ATTENTION, r"sdpa|flash|fmha|attention|compute_dot_do_o|convert_dq_to_16bits|flex"),
    (OPTIMISER, r"multi_tensor_apply_kernel|lpnorm_cleanup|_adam"),
    (COPIES, r"^Memcpy|^Memset|^memcpy|FillFunctor|direct_copy_kernel|CatArrayBatchedCopy"),
    (RANDOM, r"distribution_elementwise|philox|randperm"),
    (NORM, r"layer_norm|LayerNorm"),
    (REDUCTIONS, r"reduce_kernel|^triton_red_|^triton_per_|softmax"),
    (ELEMENTWISE, r"elementwise|^triton_poi_|gather_kernel|index|scatter|CUDAFunctor"),
)
# What a kernel of Inductor may have in its name and still only convert and lay out anew.
_LAYOUT = {"to", "copy", "t", "view", "unsafe", "transpose", "permute", "clone", "cat", "slice", "expand"}


class Share(NamedTuple):
    """What kernels of one name or kind take in a step: microseconds and launches."""

    us: float
    launches: float

    def __add__(self, other: Share) -> Share:
        return Share(self.us + other.us, self.launches + other.launches)


def our_kernels() -> set[str]:
    """Names of all kernels of spot_kernels; empty without Triton."""
    try:
        from triton import JITFunction

        from spot_kernels import gpu
    except ImportError:
        return set()
    names = set()
    for module in pkgutil.iter_modules(gpu.__path__):
        members = vars(importlib.import_module(f"{gpu.__name__}.{module.name}"))
        # under the interpreter they are of another class, with the same attribute
        names |= {
            member.fn.__name__
            for member in members.values()
            if isinstance(member, JITFunction) or type(member).__name__ == "InterpretedFunction"
        }
    return names


def kind_of(name: str, ours: Collection[str]) -> str:
    """The kind of a kernel; of ours with its name."""
    if name in ours:
        return f"{OURS}: {name}"
    fused = re.fullmatch(r"triton_poi_fused_(.*?)_*\d*", name)
    if fused:
        words = set(fused[1].split("_")) - {""}
        if words <= _LAYOUT:
            return CASTS if {"to", "copy"} <= words else COPIES
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), OTHER)


def by_kind(kernels: Mapping[str, Share], ours: Collection[str]) -> dict[str, Share]:
    """Shares of kernels by name → shares by kind, the longest first."""
    found: dict[str, Share] = defaultdict(lambda: Share(0.0, 0.0))
    for name, share in kernels.items():
        found[kind_of(name, ours)] += share
    return dict(sorted(found.items(), key=lambda item: -item[1].us))
