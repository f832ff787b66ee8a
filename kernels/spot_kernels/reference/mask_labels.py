"""Plain version of mask_labels: PyTorch's bilinear resize, a few images at a time, and the first largest mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Floats of resized masks held at a time: as many as a CPU's cache holds; 256 MiB elsewhere.
_FLOATS = {"cpu": 2**21}
_FLOATS_ELSEWHERE = 2**26


def mask_labels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """masks [B, G * G, K] -> [B, size, size] uint8: the largest mask at each pixel; see spot_kernels.mask_labels."""
    batch, tokens, slots = masks.shape
    grid = math.isqrt(tokens)
    maps = masks.detach().float().mT.contiguous()
    labels = torch.empty(batch, size, size, dtype=torch.uint8, device=masks.device)
    step = max(1, _FLOATS.get(masks.device.type, _FLOATS_ELSEWHERE) // (slots * size * size))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        # one channel: with three, or with channels last, PyTorch sums in another order on a CPU
        one = maps[part].view(-1, 1, grid, grid)
        large = F.interpolate(one, size=(size, size), mode="bilinear", align_corners=False)
        # max with indices is an order of magnitude faster than argmax over a strided dimension on a CPU
        labels[part] = large.view(-1, slots, size, size).max(dim=1).indices
    return labels
