"""What permuted_causal_attention launches on a GPU; see compile_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch

from spot_kernels.gpu import launch, permuted_attention, permuted_attention_backward
from spot_kernels.permuted_attention import empty_gradients, empty_results

# B, N, H, d of q, k, v, which are thirds of one tensor, as the modules have them: few tokens and many, wide heads and
# narrow ones, and a width that is no power of two.
_WIDE, _NARROW, _PADDED, _MANY = (2, 196, 6, 128), (2, 1024, 6, 64), (2, 196, 4, 96), (2, 4096, 2, 128)
_518_PIXELS = (2, 1369, 6, 128)  # ViT-B/14; no tile and no vector divides the tokens


def _attend(shape: tuple[int, int, int, int], dtype: torch.dtype, per_sample: bool) -> None:
    batch, tokens, heads, width = shape
    parts = torch.empty((batch, tokens, 3, heads, width), dtype=dtype).permute(2, 0, 3, 1, 4)
    order = torch.empty((batch, tokens) if per_sample else (tokens,), dtype=torch.int64)
    out, lse = empty_results(parts[0])
    permuted_attention.forward(*parts, order, out, lse)
    permuted_attention_backward.backward(torch.empty_like(out), *parts, order, out, lse, *empty_gradients(parts[0]))


def _attend_tf32() -> None:
    """What runs where the user allows tf32, which AMD's chips do not have."""

    def precision(device: torch.device) -> str:
        return "ieee" if launch.architecture(device).startswith("gfx") else "tf32"

    with mock.patch.object(launch, "float32_precision", precision):
        _attend(_WIDE, torch.float32, False)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for shape in (_WIDE, _NARROW, _PADDED, _518_PIXELS):
        yield f"bfloat16 {shape}", partial(_attend, shape, torch.bfloat16, False)
    for shape in (_WIDE, _NARROW):
        yield f"float32 {shape}", partial(_attend, shape, torch.float32, False)
    yield "float32 by tf32", _attend_tf32
    yield "float16, an order for each sample", partial(_attend, _MANY, torch.float16, True)
