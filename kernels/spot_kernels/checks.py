"""Argument checks shared by the operators: a ValueError that names the operator, the argument and its shape."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Whether every call checks its order, for debugging: it costs a sort and waits for the device. Read once, so that a
# traced graph depends on plain values.
CHECK_ORDERS = os.environ.get("SPOT_KERNELS_CHECK", "0") not in ("", "0")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(operator: str, **tensors: torch.Tensor) -> None:
    """Requires one floating dtype and one device of all tensors."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{operator}: {name} is {tensor.dtype}: pass float64, float32, bfloat16 or float16")
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{operator}: {name} is {tensor.dtype} but {first} is {reference.dtype}: cast one")
        if tensor.device != reference.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} but {first} on {reference.device}: move one")


def shape(
    operator: str, name: str, tensor: torch.Tensor, layout: str, expected: Sequence[int | None] | None = None
) -> None:
    """Requires a dense tensor with as many axes as `layout` ("[B, N, D]") and the sizes in `expected` (None: any)."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{operator}: {name} is {tensor.layout}: pass an ordinary dense tensor")
    sizes = tuple(tensor.shape)
    if len(sizes) != layout.count(",") + 1:
        raise ValueError(f"{operator}: {name} {sizes} must have the layout {layout}")
    if expected is not None and any(want not in (None, size) for want, size in zip(expected, sizes, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{operator}: {name} {sizes} does not fit the other arguments: expected [{wanted}]")


def order(operator: str, tensor: torch.Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """Requires a patch order: int64, [N] or [B, N], on the tokens' device. `permutation` checks its values."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{operator}: order is {tensor.dtype}: pass an int64 tensor of raster indices")
    if tuple(tensor.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{operator}: order {tuple(tensor.shape)} must be [{tokens}] or [{batch}, {tokens}]")
    if tensor.device != device:
        raise ValueError(f"{operator}: order is on {tensor.device} but the tokens are on {device}: move one")


def refuse_second_gradients(operator: str) -> Callable[..., NoReturn]:
    """The autograd formula of a backward operator without one: a ValueError."""

    def refuse(ctx, *gradients):
        raise ValueError(f"{operator}: gradients of gradients are not implemented by its kernels: use backend torch")

    return refuse


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in torch.autocast's dtype where it is enabled, as it casts attention's inputs; float64 stays."""
    kind = tensors[0].device.type
    # PyTorch has no autocast for the meta device, and raises
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that `autocast` would give the tensor."""
    kind = tensor.device.type
    if kind == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block in which products keep their operands' dtypes, whatever torch.autocast would cast them to."""
    kind = tensor.device.type
    # Where nothing is cast, torch.export need not record the block, as an operator that is not ATen's.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def permutation(operator: str, order: torch.Tensor) -> None:
    """Requires that every row of the order is a permutation of 0…N−1, which waits for the device.

    Under torch.compile and in the capture of a CUDA graph, which cannot wait, it is an assertion on the device instead:
    a RuntimeError at the next call that waits.
    """
    steps = torch.arange(order.shape[-1], device=order.device)
    valid = (order.sort(-1).values == steps).all()
    message = f"{operator}: order {tuple(order.shape)} is not a permutation of 0 to {order.shape[-1] - 1}"
    if order.device.type == "meta" or isinstance(order, FakeTensor):
        return  # no values to check
    if torch.compiler.is_compiling() or (order.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(valid, message)
    elif not valid:
        raise ValueError(message)
