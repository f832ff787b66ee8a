"""Plain PyTorch residual addition and the LayerNorm behind it.

sum    = x + delta                           [..., D]
normed = LayerNorm(sum) · weight + bias      [..., D]

A float32 value in 24 bits is a bfloat16 tensor and an int8 tensor `low`, the next eight bits of the mantissa (`split`,
`join`). Gradients flow to the bfloat16 tensor alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spot_kernels.reference.slot_cross_attention import accumulation_dtype


def split(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 → the nearest bfloat16, and low: what is missing, in units of 2^-8 of bfloat16's last bit."""
    high = value.to(torch.bfloat16)
    # The bits of floats of one sign, read as integers, are in the sequence of their values, across exponents too.
    missing = value.detach().view(torch.int32) - high.detach().float().view(torch.int32)
    return high, ((missing + 128) >> 8).clamp(-128, 127).to(torch.int8)


def join(high: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """float32 from `split`'s results, exact to 2^-15; without low, high as it is."""
    if low is None:
        return high
    wide = high.float()
    exact = (wide.detach().view(torch.int32) + (low.to(torch.int32) << 8)).view(torch.float32)
    return wide + (exact - wide.detach())  # exact as well: both are multiples of the same power of two


def add_norm(
    x: torch.Tensor,
    low: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    low_of: str | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, low, delta [..., D], weight and bias [D] → sum, normed, low of one of them or None.

    sum is in x's dtype, or bfloat16 if low_of is "sum"; normed in `dtype`; float32 at least in between.
    """
    total, kept, result_low = _total(x, low, delta, low_of), x, low
    if delta is not None:
        kept, result_low = split(total) if low_of == "sum" else (total, None)
    wide = total.to(accumulation_dtype(total))
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    normed = F.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    if low_of == "normed":
        normed, result_low = split(normed.float())
    return kept, normed.to(dtype), result_low


def _total(x: torch.Tensor, low: torch.Tensor | None, delta: torch.Tensor | None, low_of: str | None) -> torch.Tensor:
    """The sum that is normalised: as it is stored, in float32 if it has a low."""
    total = join(x, low)
    if delta is None:
        return total
    return (total.float() + delta).float() if low_of == "sum" else (total + delta).to(x.dtype)


def statistics(
    x: torch.Tensor, low: torch.Tensor | None, delta: torch.Tensor | None, eps: float, low_of: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and 1 / √(variance + eps) of the sum's rows, both [M], float32 at least."""
    total = _total(x, low, delta, low_of)
    variance, mean = torch.var_mean(total.to(accumulation_dtype(total)).flatten(0, -2), -1, correction=0)
    return mean, (variance + eps).rsqrt()


def gradients(
    grad_sum: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sum (that of x and of delta) [..., D], weight and bias [D] before rounding, as the kernels compute
    them; None is a zero gradient."""
    wide, (mean, inverse) = mean.dtype, (t.view(*total.shape[:-1], 1) for t in (mean, inverse))
    normal, grad_normed = (total.to(wide) - mean) * inverse, grad_normed.to(wide)
    g = grad_normed if weight is None else grad_normed * weight.to(wide)
    grad = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * inverse
    grad = grad if grad_sum is None else grad + grad_sum.to(wide)
    return grad, (grad_normed * normal).flatten(0, -2).sum(0), grad_normed.flatten(0, -2).sum(0)
