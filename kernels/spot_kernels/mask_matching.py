"""Matching of two label maps: overlap counts → IoU → optimal assignment → renamed labels (SPOT, section 3.1).

    IoU[t, s]  = |teacher mask t ∩ student mask s| / |teacher mask t ∪ student mask s|, 0 where both are empty
    cost[t, s] = 1 - IoU[t, s], 1000 for a teacher mask without a token
    assignment = the one-to-one map of teacher masks to student masks of least total cost

On the CPU the assignment runs in the native library, or in scipy where that was not built; `spot_kernels.native` says
which. Both are exact and search in the same order, so they also agree where several assignments are optimal. A cost on
another device is copied to the host and the result back, which waits for the device; everything else stays there.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, native
from spot_kernels.reference import mask_matching as reference

EMPTY_TEACHER_COST = 1e3


@torch.library.custom_op("spot_kernels::overlap_counts", mutates_args=())
def _overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None
) -> torch.Tensor:
    return _count(("a", "b"), a, b, num_a, num_b, valid)


@_overlap_counts.register_fake
def _(a, b, num_a, num_b, valid):
    return a.new_empty((a.shape[0], num_a, num_b), dtype=torch.int64)


@torch.library.custom_op("spot_kernels::linear_assignment", mutates_args=())
def _linear_assignment(cost: torch.Tensor) -> torch.Tensor:
    return _assign(cost)


@_linear_assignment.register_fake
def _(cost):
    return cost.new_empty(cost.shape[:2], dtype=torch.int64)


@torch.library.custom_op("spot_kernels::assign_masks", mutates_args=())
def _assign_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    both = _count(("teacher", "student"), teacher, student, num_slots, num_slots)
    in_teacher, in_student = both.sum(2, keepdim=True), both.sum(1, keepdim=True)
    iou = both.float() / (in_teacher + in_student - both).clamp_(min=1)
    cost = (1 - iou).masked_fill_(in_teacher == 0, EMPTY_TEACHER_COST)
    assignment = _assign(cost)
    return assignment, iou.gather(2, assignment[:, :, None]).squeeze(2), cost


@_assign_masks.register_fake
def _(student, teacher, num_slots):
    batch = student.shape[0]
    pairs = student.new_empty((batch, num_slots), dtype=torch.int64)
    return pairs, pairs.new_empty(pairs.shape, dtype=torch.float32), pairs.new_empty(
        (batch, num_slots, num_slots), dtype=torch.float32
    )


def overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """How many tokens have label i in `a` and label j in `b`.

    Args:
        a, b: label maps [B, N] of an integer dtype, labels in 0…num_a-1 and 0…num_b-1.
        num_a, num_b: numbers of labels, at least 1.
        valid: bool [B, N]; where it is False nothing is counted, whatever the labels. None: every token counts.

    Returns:
        counts [B, num_a, num_b] int64.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or size does not fit; on the CPU also labels out of
            range. Elsewhere, where looking would mean waiting, they give wrong counts or a device-side assertion.
    """
    _check_labels("overlap_counts", a=a, b=b)
    if num_a < 1 or num_b < 1:
        raise ValueError(f"overlap_counts: num_a is {num_a} and num_b {num_b}: pass at least 1")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != a.shape or valid.device != a.device):
        raise ValueError(
            f"overlap_counts: valid is {valid.dtype} {tuple(valid.shape)} on {valid.device}: "
            f"pass bool {tuple(a.shape)} on {a.device}"
        )
    return _overlap_counts(a, b, num_a, num_b, valid)


def linear_assignment(cost: torch.Tensor) -> torch.Tensor:
    """One-to-one assignment of rows to columns with the least total cost, for each problem of a batch.

    Exact, in double precision. Where several assignments are optimal the result still depends on the costs alone: rows
    are added in order, each by a shortest augmenting path that, at equal distance, ends at a free column rather than
    passing through a taken one, and at the free column of lowest index as long as it has passed through none (a
    constant cost gives row i column i). `csrc/linear_assignment.cpp` states the rule in full; scipy's is the same.

    Args:
        cost: [B, R, C], floating point, finite. Gradients do not flow.

    Returns:
        columns [B, R] int64, on the cost's device: the column of each row. With R > C, -1 for the R - C rows without
        one.

    Raises:
        ValueError: naming what is wrong with the cost: its shape, its dtype, NaN, infinity, or values so large that
            their sums might overflow (beyond ±1e300).
    """
    checks.floating("linear_assignment", cost=cost)
    checks.shape("linear_assignment", "cost", cost, "[B, R, C]")
    return _linear_assignment(cost)


def assign_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student slot that stands for each teacher slot.

    Args:
        student, teacher: label maps [B, N] of an integer dtype, labels in 0…num_slots-1.
        num_slots: K, at least 1.

    Returns:
        assignment [B, K] int64: student slot of each teacher slot, a permutation; see `linear_assignment` for ties,
        which empty slots make common. iou [B, K] float32: IoU of each teacher mask with its student mask.
        cost [B, K, K] float32: the costs that were minimised, teacher slots by student slots.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or size does not fit; on the CPU also labels out of
            range. Elsewhere, where looking would mean waiting, they give wrong counts or a device-side assertion.
    """
    _check_labels("assign_masks", teacher=teacher, student=student)
    if num_slots < 1:
        raise ValueError(f"assign_masks: num_slots is {num_slots}: pass at least 1")
    return _assign_masks(student, teacher, num_slots)


def match_masks(student: torch.Tensor, teacher: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Teacher labels in the student's numbering: the targets of SPOT's attention loss.

    student, teacher: label maps [B, N] of an integer dtype, labels in 0…num_slots-1. Returns [B, N] int64, the student
    slot that `assign_masks` gives to the teacher's label of each token. Raises ValueError as `assign_masks` does.
    """
    assignment, _, _ = assign_masks(student, teacher, num_slots)
    return assignment.gather(1, teacher.long())


def _check_labels(operator: str, **labels: torch.Tensor) -> None:
    (first, reference_map), *_ = labels.items()
    for name, tensor in labels.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{operator}: {name} is {tensor.dtype}: pass integer labels (argmax of the soft masks)")
        checks.shape(operator, name, tensor, "[B, N]")
        if tensor.shape != reference_map.shape:
            raise ValueError(
                f"{operator}: {name} {tuple(tensor.shape)} and {first} {tuple(reference_map.shape)} must be label maps "
                "of the same tokens"
            )
        if tensor.device != reference_map.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} but {first} on {reference_map.device}: move one"
            )


def _count(
    names: tuple[str, str], a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    if a.device.type == "cpu":
        count = native.overlap_counts if native.available() else reference.overlap_counts
        try:
            return count(a, b, num_a, num_b, valid)
        except ValueError:
            for name, labels, number in zip(names, (a, b), (num_a, num_b), strict=True):
                counted = labels if valid is None else labels[valid]
                if ((counted < 0) | (counted >= number)).any():
                    low, high = (int(bound) for bound in counted.aminmax())
                    raise ValueError(
                        f"{name} has labels {low} to {high}, but {number} are expected: labels lie in 0 to {number - 1}"
                    ) from None
            raise
    return reference.overlap_counts(a, b, num_a, num_b, valid)


def _assign(cost: torch.Tensor) -> torch.Tensor:
    on_host = cost.cpu()
    if on_host.dtype != torch.float64:
        on_host = on_host.float()
    solve = native.linear_assignment if native.available() else reference.linear_assignment
    try:
        return solve(on_host).to(cost.device)
    except ValueError:
        good = (on_host.abs() <= 1e300).flatten(1).all(1)
        raise ValueError(
            f"cost[{good.int().argmin()}] holds NaN, infinity or a value beyond 1e300: forbid pairs by a smaller cost"
        ) from None
