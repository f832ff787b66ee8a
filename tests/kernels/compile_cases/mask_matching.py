"""Launches of the assignment and mask-matching kernels: every tile and number of warps, wide and tall, the dtypes."""

from functools import partial

import torch

from spot_kernels import mask_matching as operators
from spot_kernels.gpu import linear_assignment, mask_matching
from spot_kernels.linear_assignment import empty_assignment

EMPTY_COST = operators.EMPTY_TEACHER_COST


def _labels(dtype, batch=64, tokens=196):
    return torch.empty(batch, tokens, dtype=dtype)


def _linear_assignment(cost, counted=False):
    num_columns = torch.empty(len(cost), dtype=torch.int64) if counted else None
    linear_assignment.linear_assignment(cost, num_columns, empty_assignment(cost))


def _assign_masks(student, teacher, slots):
    mask_matching.assign_masks(student, teacher, EMPTY_COST, *operators.empty_assigned(student, slots))


def _match_masks(student, teacher, slots):
    mask_matching.match_masks(student, teacher, slots, EMPTY_COST, operators.empty_renamed(teacher))


def _overlap_counts(a, b, num_a, num_b, valid):
    counts = operators.empty_counts(a, num_a, num_b)
    mask_matching.overlap_counts(a, b, num_a, num_b, valid, operators.MOST_TOKENS, counts)


def cases():
    # every width of the search; the last two are those of detectors
    shapes = [(7, 7), (11, 11), (24, 20), (64, 64), (100, 20), (100, 200), (300, 100), (256, 1024), (1024, 256)]
    some = [(7, 7), (300, 100)]
    for dtype, sizes in (
        (torch.float64, shapes),
        (torch.float32, shapes),
        (torch.bfloat16, some),
        (torch.float16, some),
    ):
        for rows, columns in sizes:
            cost = torch.empty(64, rows, columns, dtype=dtype)
            name = f"linear_assignment {rows}x{columns} {dtype}"
            yield name, partial(_linear_assignment, cost)
    for rows, columns in ((64, 64), (300, 100), (1024, 256)):
        cost = torch.empty(64, rows, columns)
        yield f"linear_assignment {rows}x{columns} counted", partial(_linear_assignment, cost, counted=True)

    integers = [(torch.int64, (7, 11, 24, 64)), (torch.uint8, (7,)), (torch.int32, (24,))]
    for dtype, numbers in integers:
        for slots in numbers:
            student, teacher = _labels(dtype), _labels(dtype)
            yield f"assign_masks {slots} {dtype}", partial(_assign_masks, student, teacher, slots)
            yield f"match_masks {slots} {dtype}", partial(_match_masks, student, teacher, slots)

    a, b = _labels(torch.int64, 8, 320 * 320), _labels(torch.uint8, 8, 320 * 320)
    for num_a, num_b in ((7, 7), (24, 255)):
        for valid in (None, _labels(torch.bool, 8, 320 * 320)):
            name = f"overlap_counts {num_a}x{num_b}{'' if valid is None else ' masked'}"
            yield name, partial(_overlap_counts, a, b, num_a, num_b, valid)
