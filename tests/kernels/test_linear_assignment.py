"""Assignments of detectors' sizes, with a number of columns for each problem, on all three backends; the drop-ins.

Small square problems, bad input and the kernel's limits are in test_mask_matching*.py; a million problems of all sizes
in `python tests/kernels/check_assignment.py 1000000`.
"""

import subprocess
import sys

import check_assignment
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import spot_kernels
from kernel_tier import DEVICE, every_backend, needs_library, needs_triton
from spot_kernels import native
from spot_kernels.reference import linear_assignment as reference

NAN = float("nan")


def _solve(backend: str, cost: torch.Tensor, num_columns: torch.Tensor | None = None) -> torch.Tensor:
    device = DEVICE if backend == "triton" else "cpu"
    with spot_kernels.use_backend(backend):
        counts = None if num_columns is None else num_columns.to(device)
        return spot_kernels.linear_assignment(cost.to(device), counts).cpu()


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@every_backend
@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (130, 40), (1024, 12), (12, 1024), (100, 256)])
def test_wide_problems_equal_scipy(backend, shape):
    """Every width of the search, with the smaller side in rows and in columns."""
    cost = _rand(1, *shape)
    assert torch.equal(_solve(backend, cost), reference.linear_assignment(cost))


@needs_triton
@pytest.mark.slow
def test_the_largest_numbers_of_row_and_column_fit():
    """1024 × 1024, the kernel's limit, in few steps: each row is nearest to its own column, but two to the same."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    cost = 1.0 - torch.eye(1024)[order][None]
    cost[0, 1023] = cost[0, 1022]
    assert torch.equal(_solve("triton", cost), reference.linear_assignment(cost))


@needs_triton
@pytest.mark.parametrize("kind", ["tied", "constant", "sums"])
def test_triton_breaks_wide_ties_as_scipy(kind):
    """Over several warps too; searches of many steps, through columns that other rows hold."""
    few = torch.randint(0, 3, (1, 20, 260), generator=torch.Generator().manual_seed(0)).double()
    few[..., 24:] += 5  # no row but the first four finds a free column at once
    cost = {"tied": few, "constant": torch.full_like(few, 0.3), "sums": few[:, :, :1] / 10 + few[:, :1] / 10}[kind]
    for problem in (cost, cost.mT):
        assert torch.equal(_solve("triton", problem), reference.linear_assignment(problem))


def _counted(rows: int, columns: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs whose padding is NaN, and the numbers of columns."""
    numbers = torch.tensor(counts)
    cost = _rand(len(counts), rows, columns)
    return cost.masked_fill(torch.arange(columns) >= numbers[:, None, None], NAN), numbers


@every_backend
@pytest.mark.parametrize("rows,columns,counts", [(20, 7, [7, 0, 3, 1]), (5, 9, [9, 2, 5, 0, 6]), (1, 1, [0, 1])])
def test_each_problem_has_its_own_columns(backend, rows, columns, counts):
    """More rows than columns or fewer, within a batch too. Padding is never assigned, and NaN in it is not read."""
    cost, numbers = _counted(rows, columns, counts)
    found = _solve(backend, cost, numbers)
    for problem, number, assigned in zip(cost, counts, found, strict=True):
        expected = torch.full((rows,), -1)
        row, column = linear_sum_assignment(problem[:, :number].numpy())
        expected[row] = torch.from_numpy(column)
        assert torch.equal(assigned, expected)


@every_backend
def test_counted_problems_may_be_strided(backend):
    cost, numbers = _counted(9, 6, [6, 4, 0, 2])
    strided = cost.mT.contiguous().mT
    narrow = torch.stack([numbers, numbers], 1)[:, 0]
    assert torch.equal(_solve(backend, strided, narrow), _solve(backend, cost, numbers.int()))


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_counted_problems(backend, shape):
    found = _solve(backend, torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    assert found.shape == shape[:2] and bool((found == -1).all())


@needs_triton
def test_triton_clamps_the_number_of_columns():
    """It cannot raise without a wait, and must not read or write outside the tensors."""
    cost = _rand(2, 3, 4)
    found = _solve("triton", cost, torch.tensor([-7, 2**40]))
    assert found[0].tolist() == [-1] * 3 and torch.equal(found[1:], reference.linear_assignment(cost[1:]))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize(
    "numbers,message",
    [
        (torch.tensor([2, 5]), "num_columns is 2 to 5, but cost has 4 columns: pass 0 to that"),
        (torch.tensor([-1, 4]), "num_columns is -1 to 4"),
        (torch.tensor([4]), r"num_columns is torch.int64 \(1,\) on cpu: pass integers \(2,\) on cpu"),
        (torch.tensor([4.0, 4.0]), r"num_columns is torch.float32 \(2,\)"),
        (torch.tensor([True, True]), r"num_columns is torch.bool \(2,\)"),
        (torch.empty(2, dtype=torch.int64, device="meta"), r"num_columns is torch.int64 \(2,\) on meta"),
    ],
)
def test_a_wrong_number_of_columns_is_named(backend, numbers, message):
    with spot_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        spot_kernels.linear_assignment(_rand(2, 3, 4), numbers)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_nan_before_the_padding_is_named(backend):
    cost, numbers = _counted(3, 4, [4, 2, 2])
    cost[2, 0, 1] = NAN
    with spot_kernels.use_backend(backend), pytest.raises(ValueError, match=r"cost\[2\] holds NaN"):
        spot_kernels.linear_assignment(cost, numbers)


@needs_library
def test_threads_change_nothing():
    """Blocks of problems go to several threads, which pay at this size; an error in any of them is reported."""
    cost, threads = _rand(200, 40, 30), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(native.linear_assignment(cost), reference.linear_assignment(cost))
        cost[-1, -1, -1] = NAN
        with pytest.raises(ValueError, match="NaN"):
            native.linear_assignment(cost)
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 4), st.integers(0, 12), st.integers(0, 12), st.integers(1, 50), st.integers(0, 2**31), st.booleans()
)
def test_any_counted_integers_equal_scipy(batch, rows, columns, highest, seed, single):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(-highest, highest, (batch, rows, columns), generator=generator).double()
    numbers = torch.randint(columns + 1, (batch,), generator=generator)
    cost = cost.float() if single else cost
    assert torch.equal(spot_kernels.linear_assignment(cost, numbers), reference.linear_assignment(cost, numbers))


@every_backend
def test_opcheck_and_one_graph(backend):
    device = DEVICE if backend == "triton" else "cpu"
    cost, numbers = (tensor.to(device) for tensor in _counted(4, 3, [3, 1]))
    cost = cost.nan_to_num(0.0)
    torch.library.opcheck(torch.ops.spot_kernels.linear_assignment.default, (cost, numbers, backend))
    with spot_kernels.use_backend(backend):
        compiled = torch.compile(spot_kernels.linear_assignment, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(cost, numbers), spot_kernels.linear_assignment(cost, numbers))


# ---- the interface of torch-linear-assignment


@every_backend
@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 3, 4), (2, 1, 1), (2, 0, 3), (0, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_drop_in_equals_scipy(backend, shape, dtype):
    """Also the indices, which are scipy's: rows in ascending order, as many as the smaller side."""
    cost = (100 * _rand(*shape)).to(dtype)
    with spot_kernels.use_backend(backend):
        assignment = spot_kernels.batch_linear_assignment(cost.to(DEVICE if backend == "triton" else "cpu")).cpu()
    assert assignment.dtype == torch.int64 and assignment.shape == shape[:2]
    rows, columns = spot_kernels.assignment_to_indices(assignment)
    pairs = min(shape[1:]) if shape[0] else 0
    assert rows.shape == columns.shape == (shape[0], pairs) and rows.dtype == columns.dtype == torch.int64
    for problem, row, column in zip(cost.double().numpy(), rows.numpy(), columns.numpy(), strict=True):
        assert all(map(np.array_equal, (row, column), linear_sum_assignment(problem)))


def test_integers_beyond_float32_are_exact():
    """Where 24 bits would call them equal, and the first of equals would win."""
    cost = torch.tensor([[[2**30 + 1, 2**30], [2**30, 2**30]]])
    assert spot_kernels.batch_linear_assignment(cost).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: spot_kernels.batch_linear_assignment(torch.zeros(3, 3)), r"must have the layout \[B, R, C\]"),
        (lambda: spot_kernels.batch_linear_assignment(torch.zeros(1, 2, 2).cfloat()), "cost is torch.complex64"),
        (lambda: spot_kernels.batch_linear_assignment(torch.full((1, 2, 2), float("inf"))), r"cost\[0\] holds NaN"),
        (lambda: spot_kernels.assignment_to_indices(torch.zeros(3)), r"must have the layout \[B, W\]"),
        (lambda: spot_kernels.assignment_to_indices(torch.tensor([[0, -1], [0, 1]])), "has 1 to 2 pairs a problem"),
    ],
)
def test_drop_in_names_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the command


@pytest.fixture
def check(monkeypatch):
    """check_assignment's main, for a number of problems."""
    threads = torch.get_num_threads()

    def run(problems: int) -> int:
        monkeypatch.setattr(sys, "argv", ["check_assignment.py", str(problems)])
        return check_assignment.main()

    yield run
    torch.set_num_threads(threads)


def test_check_compares_every_problem(check, capsys):
    """Some of each size class."""
    assert check(2000) == 0
    table = capsys.readouterr().out
    assert "| 1 to 8 | 1 to 8 | 1,400 | 0 | 0 |" in table and "| 100 to 1024 | 100 to 256 | 1 | 0 | 0 |" in table


def test_check_sees_a_wrong_column(check, capsys, monkeypatch):
    swapped = lambda cost, counts: reference.linear_assignment(cost, counts).flip(1)  # noqa: E731
    monkeypatch.setattr(spot_kernels, "linear_assignment", swapped)
    assert check(100) == 1
    assert "DIFFERENT: seed 0, uniform" in capsys.readouterr().out


@pytest.mark.slow
@needs_triton
def test_check_of_the_kernel():
    """Twenty thousand on a GPU, a hundred in the interpreter; the command takes thousands there, too."""
    words = ["20000", "--device", "cuda"] if DEVICE.type == "cuda" else ["100", "--interpreter"]
    done = subprocess.run([sys.executable, check_assignment.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "backend triton" in done.stdout, done.stdout + done.stderr
