"""Clipping by the infinity norm and Adam on flat tensors: `infinity_norm` and `clipped_adam`.

    g  = gradient · min(1, limit / (norm + 1e-6))
    m  = β1 m + (1 − β1) g;  v = β2 v + (1 − β2) g²;  t = step + 1
    w -= rate / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)

weights w and moments m, v float32 [T]; gradients one or two tensors, float32, bfloat16 or float16, that follow each
other; step counts float32 [P]. Parameters of a model are put into w one after another, each from a multiple of UNIT
elements on; owners [T / UNIT] says whose each unit is, because a parameter without a gradient keeps its count.

Counted for T parameters, C of them with a bfloat16 copy and gradient: the norm reads 2 C + 4 (T − C) bytes, the update
reads that again with 12 T and writes 12 T + 2 C. Separate kernels for clipping, Adam and the copy read and write every
gradient once more (8 T), and all weights for the copy (6 C).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from spot_kernels import checks, dispatch
from spot_kernels.reference import clipped_adam as reference

OPERATOR, NORM = "clipped_adam", "infinity_norm"
# Elements that have one owner: the largest block of the kernel.
UNIT = 1024


@functools.cache
def bias_corrections(betas: tuple[float, float], device: torch.device) -> torch.Tensor:
    """1 − β1ᵗ and √(1 − β2ᵗ) for t = 0, 1, …, float32 [2, L], until both round to 1: a kernel needs no powers.

    Computed on the device, in float64 from the float32 values of the betas, with which the moments are weighted.
    """
    first, second = (ctypes.c_float(beta).value for beta in betas)
    largest = max(first, second)
    length = 2 + (math.ceil(26 * math.log(2) / -math.log(largest)) if largest > 0 else 1)
    steps = torch.arange(length, dtype=torch.float64, device=device)
    return torch.stack([1 - first**steps, (1 - second**steps).sqrt()]).float()


@torch.library.custom_op("spot_kernels::infinity_norm", mutates_args=())
def _infinity_norm(tensors: Sequence[torch.Tensor], backend: str) -> torch.Tensor:
    if backend == "triton":
        from spot_kernels.gpu import clipped_adam as kernels

        norm = tensors[0].new_empty((), dtype=torch.float32)
        kernels.infinity_norm(tensors, norm)
        return norm
    return reference.infinity_norm(tensors)


@_infinity_norm.register_fake
def _(tensors, backend):
    return tensors[0].new_empty((), dtype=torch.float32)


@torch.library.custom_op(
    "spot_kernels::clipped_adam", mutates_args=("weights", "exp_avg", "exp_avg_sq", "steps", "copy")
)
def _clipped_adam(
    weights: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    rate: torch.Tensor,
    owners: torch.Tensor,
    corrections: torch.Tensor,
    copy: torch.Tensor | None,
    norm: torch.Tensor | None,
    bad: torch.Tensor | None,
    present: torch.Tensor | None,
    places: torch.Tensor | None,
    limit: float,
    betas: Sequence[float],
    eps: float,
    backend: str,
) -> None:
    if backend == "triton":
        from spot_kernels.gpu import clipped_adam as kernels

        update = kernels.clipped_adam
    else:
        update = reference.clipped_adam
    arguments = (weights, gradients, exp_avg, exp_avg_sq, steps, rate, owners, corrections)
    update(*arguments, copy, norm, bad, present, places, limit, betas, eps)
    if bad is None:
        steps.add_(1 if present is None else present)
    else:
        steps.add_((1 - bad) if present is None else present * (1 - bad))


@_clipped_adam.register_fake
def _(*arguments):
    return None


def infinity_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest absolute value of flat tensors, a float32 scalar on their device; NaN if one is in them.

    Args:
        tensors: one or two, each [T], float32, bfloat16 or float16, not empty.

    Raises:
        ValueError: naming the argument that does not fit, or the requested backend that cannot run.
    """
    _check_flat(NORM, "tensors", tensors)
    return _infinity_norm([t.detach() for t in tensors], dispatch.choose(NORM, tensors[0]))


@torch.no_grad()
def clipped_adam(
    weights: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    rate: torch.Tensor,
    *,
    owners: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    limit: float = 0.0,
    bad: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Adam without weight decay on clipped gradients, in place and without waiting for the device.

    The formula is that of torch.optim.Adam(fused=True) on CUDA. Padding of zeros with gradients of zero stays zero.

    Args:
        weights, exp_avg, exp_avg_sq: [T] float32, changed in place.
        gradients: one or two tensors whose lengths add up to T, all but the last a multiple of UNIT.
        steps: [P] float32, how many steps each parameter has had; counted up by this one.
        rate: learning rate, float32 [].
        owners: int32 [⌈T / UNIT⌉], the parameter 0…P−1 (unchecked) that each UNIT elements belong to; None: P is 1.
        copy: [C], C ≤ T, becomes the first C new weights in its dtype.
        norm: of the gradients, float32 [], with `limit` above 0: they are clipped to it.
        bad: float32 []; if it is 1, nothing changes but `copy`, which stays as it was too.
        present: float32 [P], 0 for parameters without a gradient, which stay as they are; None: all have one.
        places: int64 [⌈T / UNIT⌉], where each unit of the gradients begins in a single tensor of any length, multiples
            of 16 (unchecked); None: units follow each other.
        betas, eps: as torch.optim.Adam's.

    Raises:
        ValueError: naming the argument that does not fit, or the requested backend that cannot run.
    """
    size, device = weights.numel(), weights.device
    _check_flat(OPERATOR, "gradients", gradients)
    parts = [gradient.numel() for gradient in gradients]
    if places is not None and len(parts) > 1:
        raise ValueError(f"{OPERATOR}: gradients are two tensors, which places cannot tell apart: pass one")
    if places is None and (sum(parts) != size or any(part % UNIT for part in parts[:-1])):
        raise ValueError(
            f"{OPERATOR}: gradients have {parts} elements and weights {size}: pass as many, all but the last tensor a "
            f"multiple of {UNIT}"
        )
    if owners is None:
        owners = torch.zeros(-(-size // UNIT), dtype=torch.int32, device=device)
    count = steps.numel()
    for name, tensor, shape, dtype in (
        ("weights", weights, (size,), torch.float32),
        ("exp_avg", exp_avg, (size,), torch.float32),
        ("exp_avg_sq", exp_avg_sq, (size,), torch.float32),
        ("steps", steps, (count,), torch.float32),
        ("rate", rate, (), torch.float32),
        ("owners", owners, (-(-size // UNIT),), torch.int32),
        ("places", places, (-(-size // UNIT),), torch.int64),
        ("norm", norm, (), torch.float32),
        ("bad", bad, (), torch.float32),
        ("present", present, (count,), torch.float32),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
            actual = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{OPERATOR}: {name} is {actual}: pass {dtype} {shape} on {device}")
    if gradients[0].device != device:
        raise ValueError(f"{OPERATOR}: gradients are on {gradients[0].device} but weights on {device}: move one")
    if copy is not None and (copy.dim() != 1 or copy.numel() > size or copy.device != device):
        raise ValueError(f"{OPERATOR}: copy is {tuple(copy.shape)} on {copy.device}: pass at most [{size}] on {device}")
    if limit > 0 and norm is None:
        raise ValueError(f"{OPERATOR}: limit is {limit} and norm None: pass the gradients' norm")
    backend = dispatch.choose(OPERATOR, weights)
    # a table without values may not be kept
    table = bias_corrections.__wrapped__ if isinstance(weights, FakeTensor) else bias_corrections
    arguments = (weights, list(gradients), exp_avg, exp_avg_sq, steps, rate, owners, table(tuple(betas), device))
    _clipped_adam(*arguments, copy, norm, bad, present, places, limit, list(betas), eps, backend)


def _check_flat(operator: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
    if not 1 <= len(tensors) <= 2:
        raise ValueError(f"{operator}: {name} are {len(tensors)} tensors: pass one or two")
    for tensor in tensors:
        checks.shape(operator, name, tensor, "[T]")
        if tensor.dtype not in checks.FLOATING[1:]:
            raise ValueError(f"{operator}: {name} are {tensor.dtype}: pass float32, bfloat16 or float16")
        if tensor.device != tensors[0].device or not tensor.is_contiguous() or not tensor.numel():
            raise ValueError(f"{operator}: {name} {tuple(tensor.shape)} must be contiguous, not empty, on one device")
