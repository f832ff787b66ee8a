"""Assignments and mask matching: `linear_assignment` and `match_masks`.

An assignment reads a float32 cost and writes an int64 column for each row; matching reads two int64 label maps and
writes one. Both are bound by the length of their dependent steps, not by these bytes, so a percentage of the copy
ceiling says little; the time does.

The baseline is scipy with the copies to the host and back that it needs, on a GPU also the wait. Results are compared
exactly: by the total cost of the assignment, and by the IoU that the renamed labels reach.
"""

from __future__ import annotations

import torch
from harness.kernel_bench import Case, Problem, Results, Setting
from harness.kernel_clock import Work
from harness.kernel_rows import EAGER, OURS

import spot_kernels
from spot_kernels.reference import mask_matching as reference


def assignment_work(batch: int, rows: int, columns: int) -> Work:
    return Work(4 * batch * rows * columns + 8 * batch * rows, 0)


def matching_work(batch: int, tokens: int) -> Work:
    return Work(3 * 8 * batch * tokens, 0)


def plain_assignment(cost: torch.Tensor) -> torch.Tensor:
    return reference.linear_assignment(cost.cpu()).to(cost.device)


def plain_matching(student: torch.Tensor, teacher: torch.Tensor, slots: int) -> torch.Tensor:
    assignment, _, _ = reference.assign_masks(student.cpu(), teacher.cpu(), slots)
    return assignment.to(teacher.device).gather(1, teacher)


def assignment_problem(batch: int, rows: int, columns: int, device: torch.device) -> Problem:
    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        return (torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(seed)).to(device),)

    cost = inputs(0)[0].double()

    def check(computed: Results, exact: Results, plain: Results) -> tuple[float, None]:
        """The total cost of each problem against scipy's; as many pairs as the smaller side has, no column twice."""
        chosen, best = computed.outputs[0], exact.outputs[0]
        times = torch.nn.functional.one_hot(chosen + 1, columns + 1)[:, :, 1:].sum(1)
        assert bool((times.sum(1) == min(rows, columns)).all()) and times.max() == 1, "not one-to-one"
        picked = [cost.gather(2, c.clamp(min=0)[:, :, None]).squeeze(2) for c in (chosen, best)]
        totals = [torch.where(c >= 0, p, 0).sum(1) for c, p in zip((chosen, best), picked, strict=True)]
        worst = (totals[0] - totals[1]).abs().max().item()
        assert worst <= 1e-9, f"a total cost is {worst:.3g} above the least"
        return worst, None

    techniques = {OURS: lambda: spot_kernels.linear_assignment, EAGER: lambda: plain_assignment}
    return Problem(inputs, techniques, plain_assignment, check=check)


def matching_problem(batch: int, tokens: int, slots: int, device: torch.device) -> Problem:
    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        """A teacher, and a student that agrees on four tokens of five under other numbers."""
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randint(slots, (batch, tokens), generator=generator)
        names = torch.rand(batch, slots, generator=generator).argsort(1)
        noise = torch.randint(slots, (batch, tokens), generator=generator)
        keep = torch.rand(batch, tokens, generator=generator) < 0.8
        return torch.where(keep, names.gather(1, teacher), noise).to(device), teacher.to(device)

    def check(computed: Results, exact: Results, plain: Results) -> tuple[float, None]:
        wrong = (computed.outputs[0] != exact.outputs[0]).sum().item()
        assert not wrong, f"{wrong} labels differ from those of scipy's assignment"
        return 0.0, None

    techniques = {
        OURS: lambda: lambda student, teacher: spot_kernels.match_masks(student, teacher, slots),
        EAGER: lambda: lambda student, teacher: plain_matching(student, teacher, slots),
    }
    return Problem(inputs, techniques, techniques[EAGER](), check=check)


def cases(setting: Setting) -> list[Case]:
    device = setting.device
    assignments = (
        ((2, 3, 3), (2, 4, 3))
        if setting.tiny
        else ((64, 7, 7), (64, 24, 24), (64, 64, 64), (64, 300, 100), (16, 1024, 256))
    )
    matchings = ((2, 9, 3),) if setting.tiny else ((64, 196, 7), (64, 196, 24))
    made = []
    for batch, rows, columns in assignments:
        label = f"{batch} of {rows}×{columns}"
        made.append(
            Case(
                "linear_assignment",
                label,
                "float32",
                assignment_work(batch, rows, columns),
                None,
                (OURS, EAGER),
                lambda b=batch, r=rows, c=columns: assignment_problem(b, r, c, device),
                waiting=(EAGER,),
            )
        )
    for batch, tokens, slots in matchings:
        label = f"SPOT {batch}×{tokens} K{slots}" if slots == 7 else f"{batch}×{tokens} K{slots}"
        made.append(
            Case(
                "match_masks",
                label,
                "int64",
                matching_work(batch, tokens),
                None,
                (OURS, EAGER),
                lambda b=batch, n=tokens, k=slots: matching_problem(b, n, k, device),
                waiting=(EAGER,),
            )
        )
    return made


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
