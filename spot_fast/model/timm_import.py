"""Imports timm even if torchvision cannot load its compiled operators.

timm needs torchvision, and package indexes serve a torchvision for Linux that is built for CUDA. With a CPU-only torch
its compiled library does not load, and the import fails with `operator torchvision::nms does not exist`: torchvision
registers shape rules for operators that were never declared. ViTs use none of them, so declaring them is enough.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType

import torch

from spot_fast.errors import UserError, one_line

_declared: list[torch.library.Library] = []  # kept alive: a collected Library removes its operators


def import_timm() -> ModuleType:
    """The timm module; UserError if it cannot be imported."""
    for _ in range(32):  # each failed import names one missing operator
        try:
            import timm

            return timm
        except Exception as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise UserError(
                    f"timm cannot be imported ({one_line(error)}): pip install timm torchvision, in the "
                    "versions that fit this torch"
                ) from error
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{missing[1]}(Tensor input) -> Tensor")
        _declared.append(library)
        # Half-imported modules would be found in sys.modules and fail differently.
        for name in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
    raise UserError("torchvision cannot be imported: install the torchvision build that matches torch")
