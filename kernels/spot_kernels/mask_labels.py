"""Label maps of soft masks: bilinear resize from the patch grid (corners not aligned), then the largest mask wins.

    labels[y, x] = the first k with the largest  Σ_ij  wy[y, i] wx[x, j] masks[i, j, k]

On the CPU the native library does it in one pass without full-size maps of floats, with PyTorch's arithmetic, so that
near-ties are decided alike; elsewhere, and for small maps, PyTorch resizes a few images at a time.
"""

from __future__ import annotations

import math

import torch

from spot_kernels import checks, dispatch, native
from spot_kernels.reference import mask_labels as reference

MOST_MASKS = 256
# Up to this side PyTorch resizes with another algorithm, which sums in another order.
_SMALL = 64


@torch.library.custom_op("spot_kernels::mask_labels", mutates_args=())
def _mask_labels(masks: torch.Tensor, size: int, backend: str) -> torch.Tensor:
    run = native.mask_labels if backend == "native" else reference.mask_labels
    return run(masks.float(), size)


@_mask_labels.register_fake
def _(masks, size, backend):
    return masks.new_empty((masks.shape[0], size, size), dtype=torch.uint8)


def mask_labels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """The hard label map of soft masks on the patch grid.

    Args:
        masks: [B, N, K], floating point and finite, N = G × G in raster order, K at most 256; resized in float32.
        size: side of the label map in pixels.

    Returns:
        labels [B, size, size] uint8 in 0…K-1; of equal masks the first wins. No gradients flow. NaN wins over
        everything on PyTorch's path and over nothing on the native library's.

    Raises:
        ValueError: naming the argument whose shape, dtype or size does not fit.
    """
    checks.floating("mask_labels", masks=masks)
    checks.shape("mask_labels", "masks", masks, "[B, N, K]")
    _, tokens, slots = masks.shape
    if not tokens or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"mask_labels: masks {tuple(masks.shape)} has {tokens} tokens, which is not a square grid")
    if not 1 <= slots <= MOST_MASKS:
        raise ValueError(f"mask_labels: masks {tuple(masks.shape)} has {slots} masks: pass 1 to {MOST_MASKS}")
    if size < 1:
        raise ValueError(f"mask_labels: size is {size}: pass the side of the label map in pixels, at least 1")
    backend = dispatch.choose("mask_labels", masks)
    # detached: torch.func would differentiate the operator, which has no rule for it
    return _mask_labels(masks.detach(), size, backend if size > _SMALL else "torch")
