"""The native library against scipy and numpy: same costs, same assignments, same refusals."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from kernel_tier import needs_library
from spot_kernels import native
from spot_kernels.reference import mask_matching as reference

SOLVERS = [pytest.param(native.linear_assignment, marks=needs_library), reference.linear_assignment]
BATCH = 25


@pytest.mark.skipif("CI" not in os.environ or not shutil.which("c++"), reason="not CI's installation with a compiler")
def test_an_installation_with_a_compiler_has_the_library():
    """Otherwise all its tests would be skipped silently."""
    assert native.available(), native.describe()


def _problems(kind: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """[BATCH, rows, columns]; float32 for half of the kinds."""
    shape = (BATCH, rows, columns)
    integers = torch.randint(0, 4, shape, generator=generator)
    return {
        "random": lambda: torch.randn(shape, generator=generator, dtype=torch.float64),
        "random32": lambda: torch.rand(shape, generator=generator),
        "tied": lambda: integers.float() / 3,
        "constant": lambda: torch.full(shape, 0.3),
        "integer": lambda: torch.randint(-1000, 1000, shape, generator=generator).double(),
        "near-degenerate": lambda: 1 + integers.double() * 2**-50,
        "large and small": lambda: 10.0 ** torch.randint(-9, 10, shape, generator=generator).double(),
        "product": lambda: torch.arange(1.0, rows + 1)[:, None] * torch.arange(1.0, columns + 1).expand(shape),
    }[kind]()


def _assert_optimal(cost: torch.Tensor, assignment: torch.Tensor) -> None:
    """Requires scipy's choice, among optimal assignments too, since both search alike."""
    rows = cost.shape[1]
    for problem, chosen in zip(cost.double().numpy(), assignment.numpy(), strict=True):
        row, column = linear_sum_assignment(problem)
        assert len(chosen) == rows and chosen.min() >= -1
        assert np.array_equal(np.flatnonzero(chosen >= 0), row) and np.array_equal(chosen[row], column)


@needs_library
@pytest.mark.parametrize(
    "kind", ["random", "random32", "tied", "constant", "integer", "near-degenerate", "large and small", "product"]
)
def test_linear_assignment_equals_scipy(kind):
    """50 shapes × 25 problems for each of eight kinds: 10,000 problems."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1), (7, 7), (24, 24), (1, 24), (24, 1), *torch.randint(1, 25, (45, 2), generator=generator).tolist()]
    for rows, columns in shapes:
        cost = _problems(kind, rows, columns, generator)
        _assert_optimal(cost, native.linear_assignment(cost))


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("shape", [(4, 4), (2, 5), (5, 3)])
def test_linear_assignment_equals_brute_force(solve, shape):
    rows, columns = shape
    cost = torch.randint(0, 6, (40, *shape), generator=torch.Generator().manual_seed(1)).double()
    wide = cost if rows <= columns else cost.mT
    choices = torch.tensor(list(itertools.permutations(range(wide.shape[2]), wide.shape[1])))
    best = wide[:, torch.arange(wide.shape[1]), choices].sum(2).amin(1)
    assignment = solve(cost)
    total = torch.where(assignment >= 0, cost.gather(2, assignment.clamp(min=0)[:, :, None]).squeeze(2), 0).sum(1)
    assert torch.equal(total, best)


@needs_library
def test_one_buffer_serves_a_batch():
    """A problem's result does not depend on its neighbours."""
    cost = torch.rand(64, 11, 11, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([native.linear_assignment(problem[None]) for problem in cost])
    assert torch.equal(native.linear_assignment(cost), alone)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(dtype, bad):
    cost = torch.zeros(3, 4, 4, dtype=dtype)
    cost[2, 3, 3] = bad
    with pytest.raises(ValueError, match="NaN, infinity"):
        native.linear_assignment(cost)


@pytest.mark.parametrize("solve", SOLVERS)
def test_largest_costs(solve):
    """Up to ±1e300 sums of costs stay finite; beyond that a cost is refused, like NaN."""
    cost = torch.randint(-1, 2, (200, 9, 9), generator=torch.Generator().manual_seed(4)).double()
    assert torch.equal(solve(cost * 1e300), solve(cost))
    with pytest.raises(ValueError, match="beyond 1e300"):
        solve(cost * 1.001e300)


@needs_library
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_problems(shape):
    assignment = native.linear_assignment(torch.zeros(shape))
    assert assignment.shape == shape[:2] and bool((assignment == -1).all())


@needs_library
@pytest.mark.parametrize(
    "dtype, other",
    [
        (torch.uint8, torch.int16),
        (torch.int16, torch.uint8),
        (torch.int32, torch.int64),
        (torch.int64, torch.int64),
        (torch.uint8, torch.uint8),
        (torch.int8, torch.int16),
        (torch.int64, torch.uint8),
        (torch.int16, torch.int64),
    ],
)
def test_overlap_counts_equals_numpy(dtype, other):
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(0, 5, (6, 97), generator=generator, dtype=dtype)
    b = torch.randint(0, 9, (6, 97), generator=generator, dtype=other)
    valid = torch.rand(6, 97, generator=generator) < 0.7
    for mask in (None, valid):
        expected = np.zeros((6, 5, 9), dtype=np.int64)
        weight = np.ones((6, 97), dtype=np.int64) if mask is None else mask.numpy().astype(np.int64)
        np.add.at(expected, (np.arange(6)[:, None], a.numpy(), b.numpy()), weight)
        counts = native.overlap_counts(a, b, 5, 9, mask)
        assert counts.dtype == torch.int64 and np.array_equal(counts.numpy(), expected)


@needs_library
@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_label_out_of_range_is_refused(label):
    good = torch.zeros(2, 8, dtype=torch.int64)
    bad = good.clone()
    bad[1, 7] = label
    for maps in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="out of range"):
            native.overlap_counts(*maps, 5, 5)


@pytest.fixture
def fresh_load(monkeypatch):
    """Loads the library again in the test and after it."""
    monkeypatch.setattr(native, "_NAMED", "")
    native._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._load.cache_clear()


def test_a_missing_library_is_described(fresh_load, tmp_path):
    fresh_load.setattr(native, "_PATH", tmp_path / "libspot_native.so")
    assert not native.available()
    assert native.describe() == (
        "no native library (libspot_native.so was not built: not installed, or without a C++ compiler); "
        "scipy and PyTorch are used"
    )
    with pytest.raises(RuntimeError, match="no native library"):
        native.linear_assignment(torch.zeros(1, 2, 2))


def test_another_build_can_be_named():
    """SPOT_KERNELS_LIBRARY, read once at import."""
    done = subprocess.run(
        [sys.executable, "-m", "spot_kernels"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SPOT_KERNELS_LIBRARY": "nowhere/lib.so"},
        capture_output=True,
        text=True,
    )
    assert "SPOT_KERNELS_LIBRARY is nowhere/lib.so, which does not exist" in done.stdout, done.stderr


def test_a_broken_library_is_described(fresh_load, tmp_path):
    broken = tmp_path / "libspot_native.so"
    broken.write_bytes(b"not a library")
    fresh_load.setattr(native, "_PATH", broken)
    assert not native.available() and "does not load" in native.describe()


@needs_library
def test_a_library_of_another_version_is_described(fresh_load):
    fresh_load.setattr(native, "_ABI", -1)
    assert not native.available() and "install again" in native.describe()


@needs_library
def test_a_buffer_that_does_not_fit_is_refused():
    """A ValueError that names it, before anything is read or written."""
    labels = torch.zeros(2, 8, dtype=torch.int64)
    for call in (
        lambda: native.linear_assignment(torch.zeros(2, 3, 3, dtype=torch.int64)),
        lambda: native.linear_assignment(torch.zeros(2, 3, 3).half()),
        lambda: native.linear_assignment(torch.zeros(2, 3, 3, device="meta")),
        lambda: native.overlap_counts(labels, labels[:1], 2, 2),
        lambda: native.overlap_counts(labels, labels[:, :7], 2, 2),
        lambda: native.overlap_counts(labels, labels, 2, 2, torch.ones(2, 7, dtype=torch.bool)),
        lambda: native.overlap_counts(labels, labels, 2, 2, labels),
        lambda: native.mask_labels(torch.zeros(2, 9, 3).double(), 80),
        lambda: native.mask_labels(torch.zeros(2, 8, 3), 80),
    ):
        with pytest.raises(ValueError, match="native library: [a-z]+ is torch.*: pass a contiguous torch.* on the CPU"):
            call()


@needs_library
def test_freed_memory_is_refused():
    """Sharded training leaves parameters with a shape but without memory between their uses."""
    cost = torch.zeros(2, 3, 3)
    cost.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a buffer is missing"):
        native.linear_assignment(cost)


@needs_library
def test_empty_batches_of_any_size_need_no_memory():
    """Nothing is allocated for the sizes of an empty batch, and no product of them overflows."""
    huge = 2**31
    assert native.linear_assignment(torch.empty(0, huge, huge)).shape == (0, huge)
    empty = torch.empty(0, 8, dtype=torch.int64)
    assert native.overlap_counts(empty, empty, huge, huge).shape == (0, huge, huge)
    assert native.mask_labels(torch.empty(0, 9, 3), huge).shape == (0, huge, huge)


@needs_library
@pytest.mark.parametrize("sizes", [(1, -1, 3), (-1, 3, 3), (2**40, 2**40, 2**40), (2**62, 3, 3)])
def test_sizes_that_no_memory_has_are_refused(sizes):
    """Calls the library directly, as from C: no product of sizes overflows."""
    library, cost = native._library(), torch.zeros(1, 3, 3)
    assignment = torch.zeros(1, 3, dtype=torch.int64)
    assert library.spot_linear_assignment_f32(cost.data_ptr(), None, *sizes, 1, assignment.data_ptr()) == 1
    labels = native._Labels(assignment.data_ptr(), 2)
    for both in (sizes, sizes[::-1]):
        assert library.spot_overlap_counts(labels, labels, None, 1, *both, 1, assignment.data_ptr()) == 1
        assert library.spot_mask_labels(cost.data_ptr(), *both, 80, 0, 1, assignment.data_ptr()) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "cmake", "c++"))) or not sys.platform.startswith("linux"),
    reason="needs cmake and a C++ compiler on Linux",
)
def test_no_sanitizer_finds_anything():
    """A build with AddressSanitizer and UndefinedBehaviorSanitizer runs a selection of these tests to their end.

    `bash tests/kernels/sanitize_native.sh` runs all of them.
    """
    here = Path(__file__).parent
    chosen = "empty or buffer or memory or sizes or missing or columns or threads or overlap or counts"
    chosen = f"({chosen} or default and native) and not triton and not sanitizer"
    files = [here / f"test_{name}.py" for name in ("native", "mask_labels", "linear_assignment", "default_dtype")]
    done = subprocess.run(
        ["bash", here / "sanitize_native.sh", *files, "-k", chosen],
        env={key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
