"""Imports timm also where torchvision cannot load its compiled operators.

timm needs torchvision, and the torchvision that a package index serves for Linux is built for CUDA. Beside a CPU-only
torch its compiled library does not load, and the import stops at `operator torchvision::nms does not exist`, because
torchvision attaches shape rules to operators that were never declared. ViTs use none of them: declaring the names is
enough for the import to go through.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType

import torch

from spot_fast.errors import UserError, one_line

_declared: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def import_timm() -> ModuleType:
    """The timm module; declares the operators torchvision lacks first, where its library does not match torch.

    UserError where it cannot be imported.
    """
    for _ in range(32):
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
        for name in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
    raise UserError("torchvision cannot be imported: install the torchvision build that matches torch")
