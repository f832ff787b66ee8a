"""Runs a spot_fast command with bfloat16 products computed in float32, for CPUs that cannot multiply bfloat16.

    python bench/emulated_bf16.py train --precision bf16 …

Factors are bfloat16 already; they are multiplied and summed in float32 and the result is rounded, which is what
hardware with float32 sums does, in another order of summation. PyTorch's own bfloat16 products on such a CPU do the
same, twenty times slower.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("kernels", "")]

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN.convolution.default}


class Float32Products(TorchDispatchMode):
    """Products of bfloat16 tensors in float32, their results rounded to bfloat16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS or args[-1 if func is _ATEN.mm.default else 0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_widened, args), **(kwargs or {})).bfloat16()


def _widened(value):
    return value.float() if isinstance(value, torch.Tensor) else value


def main() -> int:
    command, *words = sys.argv[1:]
    with Float32Products():
        return importlib.import_module(f"spot_fast.{command}").main(words)


if __name__ == "__main__":
    sys.exit(main())
