"""Matching of two label maps: overlap counts → IoU → optimal assignment → renamed labels (SPOT, section 3.1).

    IoU[t, s]  = |teacher mask t ∩ student mask s| / |teacher mask t ∪ student mask s|, 0 where both are empty
    cost[t, s] = 1 - IoU[t, s], 1000 for a teacher mask without a token
    assignment = the one-to-one map of teacher masks to student masks of least total cost

On a GPU one kernel counts, assigns and renames, one program an image, without waiting for the device, for up to 64
slots. On the CPU the native library runs, or scipy and PyTorch where it was not built; `chosen_backend` says which. All
of them are exact and assign in the same order (`spot_kernels.linear_assignment`), so they also agree where several
assignments are optimal. On a GPU, more slots and backend torch copy the cost to the host and the result back, which
waits for the device.

Labels and assignments are integers: no gradients flow through these operators.
"""

from __future__ import annotations

import torch

from spot_kernels import checks, dispatch, native
from spot_kernels.linear_assignment import assign, empty_assignment
from spot_kernels.reference import mask_matching as reference

EMPTY_TEACHER_COST = 1e3
# Limits of the kernels: slots, whose counts are held in registers; tokens, so that float32 counts are exact.
MOST_SLOTS, MOST_TOKENS = 64, 2**24


def empty_counts(a: torch.Tensor, num_a: int, num_b: int) -> torch.Tensor:
    """Overlap counts [B, num_a, num_b]."""
    return a.new_empty((len(a), num_a, num_b), dtype=torch.int64)


def empty_assigned(student: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Assignment and its IoU [B, K], cost [B, K, K]."""
    cost = student.new_empty((len(student), num_slots, num_slots), dtype=torch.float32)
    return empty_assignment(cost), cost.new_empty(cost.shape[:2]), cost


def empty_renamed(teacher: torch.Tensor) -> torch.Tensor:
    """Renamed labels [B, N]."""
    return teacher.new_empty(teacher.shape, dtype=torch.int64)


@torch.library.custom_op("spot_kernels::overlap_counts", mutates_args=())
def _overlap_counts(
    a: torch.Tensor, b: torch.Tensor, num_a: int, num_b: int, valid: torch.Tensor | None, backend: str
) -> torch.Tensor:
    if backend == "triton":
        from spot_kernels.gpu import mask_matching as kernels

        counts = empty_counts(a, num_a, num_b)
        kernels.overlap_counts(a, b, num_a, num_b, valid, MOST_TOKENS, counts)
        return counts
    return _count(("a", "b"), a, b, num_a, num_b, valid, backend)


@_overlap_counts.register_fake
def _(a, b, num_a, num_b, valid, backend):
    return empty_counts(a, num_a, num_b)


@torch.library.custom_op("spot_kernels::assign_masks", mutates_args=())
def _assign_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from spot_kernels.gpu import mask_matching as kernels

        results = empty_assigned(student, num_slots)
        kernels.assign_masks(student, teacher, EMPTY_TEACHER_COST, *results)
        return results
    return _assign_in_steps(student, teacher, num_slots, backend)


@_assign_masks.register_fake
def _(student, teacher, num_slots, backend):
    return empty_assigned(student, num_slots)


@torch.library.custom_op("spot_kernels::match_masks", mutates_args=())
def _match_masks(student: torch.Tensor, teacher: torch.Tensor, num_slots: int, backend: str) -> torch.Tensor:
    if backend == "triton":
        from spot_kernels.gpu import mask_matching as kernels

        renamed = empty_renamed(teacher)
        kernels.match_masks(student, teacher, num_slots, EMPTY_TEACHER_COST, renamed)
        return renamed
    assignment, _, _ = _assign_in_steps(student, teacher, num_slots, backend)
    return assignment.gather(1, teacher.long())


@_match_masks.register_fake
def _(student, teacher, num_slots, backend):
    return empty_renamed(teacher)


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
            range. On a GPU, where checking labels would wait for the device, the kernel does not count a token with
            such a label, and backend torch gives wrong counts or a device-side assertion.
    """
    _check_labels("overlap_counts", a=a, b=b)
    if num_a < 1 or num_b < 1:
        raise ValueError(f"overlap_counts: num_a is {num_a} and num_b {num_b}: pass at least 1")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != a.shape or valid.device != a.device):
        raise ValueError(
            f"overlap_counts: valid is {valid.dtype} {tuple(valid.shape)} on {valid.device}: "
            f"pass bool {tuple(a.shape)} on {a.device}"
        )
    return _overlap_counts(a, b, num_a, num_b, valid, dispatch.choose("overlap_counts", a))


def assign_masks(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student slot that matches each teacher slot.

    Args:
        student, teacher: label maps [B, N] of an integer dtype, labels in 0…num_slots-1.
        num_slots: K, at least 1.

    Returns:
        assignment [B, K] int64: student slot of each teacher slot, a permutation; see `linear_assignment` for ties,
        which empty slots make common. iou [B, K] float32: IoU of each teacher mask with its student mask.
        cost [B, K, K] float32: the costs that were minimised, teacher slots by student slots. Where the kernel's search
        gives up, which only corrupted memory can cause, an image's assignment is -1 and its iou 0.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or size does not fit; on the CPU also labels out of
            range. On a GPU, where checking labels would wait for the device, the kernel leaves out a token that has
            such a label in either map, and backend torch gives wrong results or a device-side assertion.
    """
    return _assign_masks(student, teacher, num_slots, _choose("assign_masks", student, teacher, num_slots))


def match_masks(student: torch.Tensor, teacher: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Teacher labels in the student's numbering: the targets of SPOT's attention loss.

    Args:
        student, teacher: label maps [B, N] of an integer dtype, labels in 0…num_slots-1.
        num_slots: K, at least 1.

    Returns:
        [B, N] int64: the student slot that `assign_masks` assigns to each token's teacher label. The kernel gives -1 to
        a teacher label out of range, and to all tokens of an image that `assign_masks` could not assign.

    Raises:
        ValueError: as `assign_masks`.
    """
    return _match_masks(student, teacher, num_slots, _choose("match_masks", student, teacher, num_slots))


def _choose(operator: str, student: torch.Tensor, teacher: torch.Tensor, num_slots: int) -> str:
    _check_labels(operator, teacher=teacher, student=student)
    if num_slots < 1:
        raise ValueError(f"{operator}: num_slots is {num_slots}: pass at least 1")
    limit = ""
    if num_slots > MOST_SLOTS:
        limit = f"num_slots is {num_slots}, more than {MOST_SLOTS}"
    elif teacher.shape[1] > MOST_TOKENS:
        limit = f"teacher {tuple(teacher.shape)} has more than {MOST_TOKENS} tokens"
    return dispatch.choose(operator, student, limit)


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


def _assign_in_steps(
    student: torch.Tensor, teacher: torch.Tensor, num_slots: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    both = _count(("teacher", "student"), teacher, student, num_slots, num_slots, None, backend)
    in_teacher, in_student = both.sum(2, keepdim=True), both.sum(1, keepdim=True)
    iou = both.float() / (in_teacher + in_student - both).clamp_(min=1)
    cost = (1 - iou).masked_fill_(in_teacher == 0, EMPTY_TEACHER_COST)
    assignment = assign(cost, None, backend)
    return assignment, iou.gather(2, assignment[:, :, None]).squeeze(2), cost


def _count(
    names: tuple[str, str],
    a: torch.Tensor,
    b: torch.Tensor,
    num_a: int,
    num_b: int,
    valid: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    if a.device.type == "cpu":
        count = native.overlap_counts if backend == "native" else reference.overlap_counts
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
