"""Checks of a file's tensors before a model loads them: plain, finite, and written to the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spot_fast.errors import UserError


def require_plain(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError naming a tensor that is quantised, complex, sparse or without values."""
    for name, value in tensors.items():
        if value.is_meta:
            problem = "has a shape but no values (meta device): save it after its weights are loaded"
        elif value.layout != torch.strided:
            problem = f"is sparse ({value.layout}): save it after to_dense()"
        elif value.is_quantized or (value.is_floating_point() and value.dtype.itemsize < 2):
            problem = f"is quantised ({value.dtype}): pass weights in float32, float16 or bfloat16"
        elif value.is_complex():
            problem = f"is complex ({value.dtype}): pass weights in real numbers"
        else:
            continue
        raise UserError(f"{source}: tensor {name} {problem}")


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError naming a tensor with NaN or infinite values."""
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            number = value.numel() - int(finite.sum())
            raise UserError(
                f"{source}: tensor {name} has {number} of {value.numel()} values that are NaN or infinite: "
                "its training diverged or the file is damaged, use another"
            )


def require_filled(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError naming a weight matrix of zeros. No training leaves one: the file was allocated but never filled."""
    for name, value in tensors.items():
        if value.ndim > 1 and name.endswith(".weight") and not value.any():
            raise UserError(
                f"{source}: tensor {name} holds nothing but zeros: the file was not written or downloaded "
                "to its end, get it again"
            )
