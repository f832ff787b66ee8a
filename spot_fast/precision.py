"""Which arithmetic a run uses: float32 throughout, or TF32 or bfloat16 matrix products around float32 weights.

TF32 is float32 whose factors a GPU rounds to 10 bits of mantissa as it multiplies; all else is as in float32.
Under bf16, autocast rounds the inputs of linear layers and attention products; weights and Adam's moments stay
float32, and so do softmax, LayerNorm statistics, losses and the assignment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from spot_fast.config import OPTIONS
from spot_fast.errors import UserError


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16); without, float32 is faster."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def resolve(precision: str, device: torch.device) -> str:
    """`auto` → bf16 where `device` multiplies it in hardware, else float32.

    ValueError for an unknown name, UserError for tf32 on a device without it.
    """
    choices = OPTIONS["precision"].choices
    if precision not in choices:
        raise ValueError(f"--precision {precision} is unknown: use one of {', '.join(choices)}")
    if precision == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise UserError(
            f"--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more, not {device}: use "
            "float32, or bf16 where the device has it"
        )
    if precision != "auto":
        return precision
    fast = cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if fast else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a model of a resolved `precision` runs forward, inside `float32_products`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """The block in which a run of a resolved `precision` lies, backward passes included: float32 in TF32 under tf32.

    torch's setting, which the kernels follow, is as before afterwards; other precisions leave it as the user has it.
    """
    matmul = torch.backends.cuda.matmul
    if precision != "tf32" or matmul.fp32_precision == "tf32":
        yield
        return
    # PyTorch has an older and a newer setting. The older one writes both, which is what torch.compile expects; its
    # functions raise once a user has mixed the two.
    newer, older = matmul.fp32_precision, None
    try:
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
    except RuntimeError:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        matmul.fp32_precision = newer


def store_in_bfloat16(module: nn.Module) -> None:
    """Rounds the weights of `module`'s linear, GRU and convolution layers, which must be frozen, to bfloat16 in place.

    Under a bf16 `autocast` nothing changes: it rounds them in the same way, but at every call, since it remembers only
    the casts of weights that train. All other weights stay float32.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.GRUCell | nn.Conv2d):
            for weight in layer.parameters(recurse=False):
                if weight.requires_grad:
                    raise ValueError("a layer that trains keeps its float32 weights: freeze it first")
                weight.data = weight.data.bfloat16()
