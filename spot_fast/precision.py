"""Which arithmetic a run uses: float32 throughout, or bfloat16 matrix products around float32 weights.

Under bf16, autocast rounds the inputs of linear layers and attention products; weights and Adam's moments stay
float32, and so do softmax, LayerNorm statistics, losses and the assignment.
"""

from __future__ import annotations

import contextlib

import torch

PRECISIONS = ("auto", "float32", "bf16")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16); without, float32 is faster."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def resolve(precision: str, device: torch.device) -> str:
    """`auto` → bf16 where `device` multiplies it in hardware, else float32; ValueError for an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is unknown: use one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    fast = cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if fast else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a model of a resolved `precision` runs forward."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
