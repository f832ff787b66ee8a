"""What a file's tensors have to be before a model takes them: plain numbers that are all there and finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spot_fast.errors import UserError


def require_plain(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError that names a tensor which is quantised, complex, sparse or without values."""
    for name, value in tensors.items():
        if value.is_meta:
            what = "has a shape but no values (meta device): save it after its weights are loaded"
        elif value.layout != torch.strided:
            what = f"is sparse ({value.layout}): save it after to_dense()"
        elif value.is_quantized or (value.is_floating_point() and value.dtype.itemsize < 2):
            what = f"is quantised ({value.dtype}): pass weights in float32, float16 or bfloat16"
        elif value.is_complex():
            what = f"is complex ({value.dtype}): pass weights in real numbers"
        else:
            continue
        raise UserError(f"{source}: tensor {name} {what}")


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError that names a tensor with NaN or infinite values."""
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            number = value.numel() - int(finite.sum())
            raise UserError(
                f"{source}: tensor {name} has {number} of {value.numel()} values that are NaN or infinite: "
                "its training diverged or the file is damaged, use another"
            )
