"""What permuted_causal_attention and shift_by_order launch on a GPU; see compile_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch

# B, N, H, d of q, k, v, which are thirds of one tensor, as the modules have them: few tokens and many, wide heads and
# narrow ones, and a width that is no power of two.
_WIDE, _NARROW, _PADDED, _MANY = (2, 196, 6, 128), (2, 1024, 6, 64), (2, 196, 4, 96), (2, 4096, 2, 128)


def _attend(shape: tuple[int, int, int, int], dtype: torch.dtype, per_sample: bool) -> None:
    from spot_kernels.gpu import permuted_attention

    batch, tokens, heads, width = shape
    parts = torch.empty((batch, tokens, 3, heads, width), dtype=dtype).permute(2, 0, 3, 1, 4)
    order = torch.empty((batch, tokens) if per_sample else (tokens,), dtype=torch.int64)
    out, lse = permuted_attention.forward(*parts, order)
    permuted_attention.backward(torch.empty_like(out), *parts, order, out, lse)


def _attend_tf32() -> None:
    """What runs where the user allows tf32, which AMD's chips do not have."""
    from spot_kernels.gpu import launch

    def precision(device: torch.device) -> str:
        return "ieee" if launch.architecture(device).startswith("gfx") else "tf32"

    with mock.patch.object(launch, "float32_precision", precision):
        _attend(_WIDE, torch.float32, False)


def _shift(dtype: torch.dtype, bos_dtype: torch.dtype, shared: bool) -> None:
    from spot_kernels.gpu import shift_by_order

    tokens = torch.empty((64, 196, 768), dtype=dtype)
    bos = torch.empty((768,) if shared else (64, 768), dtype=bos_dtype)
    order = torch.empty((196,) if shared else (64, 196), dtype=torch.int64)
    out = shift_by_order.forward(tokens, bos, order)
    shift_by_order.backward(out, order, torch.empty_like(tokens), torch.empty_like(bos))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for shape in (_WIDE, _NARROW, _PADDED):
        yield f"bfloat16 {shape}", partial(_attend, shape, torch.bfloat16, False)
    for shape in (_WIDE, _NARROW):
        yield f"float32 {shape}", partial(_attend, shape, torch.float32, False)
    yield "float32 by tf32", _attend_tf32
    yield "float16, an order for each sample", partial(_attend, _MANY, torch.float16, True)
    yield "shift bfloat16", partial(_shift, torch.bfloat16, torch.float32, True)
    yield "shift float32", partial(_shift, torch.float32, torch.float32, False)
