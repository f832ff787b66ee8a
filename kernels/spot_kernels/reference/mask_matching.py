"""Plain versions of the mask-matching operators, in PyTorch; scipy assigns (reference/linear_assignment.py).

They are the tests' oracle, and run on the CPU where the native library was not built.
"""

from __future__ import annotations

import torch

from spot_kernels.reference.linear_assignment import linear_assignment


def overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """a, b [B, N] integer labels, valid [B, N] bool or None -> counts [B, num_a, num_b] int64.

    Raises ValueError for a label out of range, on the CPU only: checking would wait for another device.
    """
    a, b = a.long(), b.long()
    if valid is not None:  # labels of invalid tokens may be anything, such as 255
        a, b = a.where(valid, 0), b.where(valid, 0)
    if a.device.type == "cpu" and any(((labels < 0) | (labels >= n)).any() for labels, n in ((a, num_a), (b, num_b))):
        raise ValueError("a label is out of range")
    bins = len(a) * num_a * num_b
    index = a * num_b + b + torch.arange(len(a), device=a.device)[:, None] * (num_a * num_b)
    ones = torch.ones_like(index) if valid is None else valid.long()
    # not bincount: it would wait for the device to learn the largest index
    counts = index.new_zeros(bins).scatter_add_(0, index.flatten(), ones.flatten())
    return counts.view(len(a), num_a, num_b)


def assign_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """student, teacher [B, N] integer labels -> assignment [B, K], iou [B, K], cost [B, K, K]; see mask_matching."""
    slots = torch.arange(num_slots, device=student.device)[:, None]
    in_student = (student[:, None, :] == slots).float()
    in_teacher = (teacher[:, None, :] == slots).float()
    both = in_teacher @ in_student.transpose(1, 2)
    either = in_teacher.sum(2)[:, :, None] + in_student.sum(2)[:, None, :] - both
    iou = torch.where(either > 0, both / either, 0.0)
    cost = torch.where(in_teacher.sum(2)[:, :, None] > 0, 1 - iou, 1e3)
    assignment = linear_assignment(cost)
    return assignment, iou.gather(2, assignment[:, :, None]).squeeze(2), cost
