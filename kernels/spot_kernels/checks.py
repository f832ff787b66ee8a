"""Argument checks shared by the operators: a ValueError that names the operator, the argument and its shape."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Whether every call checks its order, which costs a sort and a wait: for debugging. Read once, so that a traced graph
# depends on plain values.
CHECK_ORDERS = os.environ.get("SPOT_KERNELS_CHECK", "0") not in ("", "0")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(operator: str, **tensors: torch.Tensor) -> None:
    """All tensors are of one floating dtype and on one device."""
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
    """The tensor is strided and has as many axes as `layout` ("[B, N, D]") and the sizes in `expected`, None: any."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{operator}: {name} is {tensor.layout}: pass an ordinary dense tensor")
    found = tuple(tensor.shape)
    if len(found) != layout.count(",") + 1:
        raise ValueError(f"{operator}: {name} {found} must have the layout {layout}")
    if expected is not None and any(want not in (None, size) for want, size in zip(expected, found, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{operator}: {name} {found} does not fit the other arguments: expected [{wanted}]")


def order(operator: str, tensor: torch.Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """A patch order: int64, [N] or [B, N], on the tokens' device. Whether it is a permutation, `permutation` asks."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{operator}: order is {tensor.dtype}: pass an int64 tensor of raster indices")
    if tuple(tensor.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(f"{operator}: order {tuple(tensor.shape)} must be [{tokens}] or [{batch}, {tokens}]")
    if tensor.device != device:
        raise ValueError(f"{operator}: order is on {tensor.device} but the tokens are on {device}: move one")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as torch.autocast wants attention's inputs: in its dtype where it is on, as they are otherwise."""
    kind = tensors[0].device.type
    # the meta device has no autocast, and raises when asked
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def permutation(operator: str, order: torch.Tensor) -> None:
    """ValueError unless every row of the order is a permutation of 0…N−1, which waits for the device.

    Under torch.compile and in a recording of a CUDA graph, where nothing can wait, it is an assertion on the device: a
    RuntimeError at the next call that waits.
    """
    steps = torch.arange(order.shape[-1], device=order.device)
    right = (order.sort(-1).values == steps).all()
    wrong = f"{operator}: order {tuple(order.shape)} is not a permutation of 0 to {order.shape[-1] - 1}"
    if order.device.type == "meta" or isinstance(order, FakeTensor):
        return  # there is nothing to look at
    if torch.compiler.is_compiling() or (order.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(right, wrong)
    elif not right:
        raise ValueError(wrong)
