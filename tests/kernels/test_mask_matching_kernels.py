"""The mask-matching kernels against the CPU's results, to the last bit and to the last choice among equals.

Under the interpreter few problems, since a 7 × 7 one takes 50 ms; on a GPU ten thousand.
"""

import pytest
import torch

import golden_tensors
import spot_kernels
from kernel_tier import DEVICE, assert_graph_replays, needs_gpu, needs_triton
from spot_kernels import dispatch, native
from spot_kernels.reference import mask_matching as reference

if dispatch.TRITON:
    import triton
    import triton.language as tl

    from spot_kernels.gpu import launch
    from spot_kernels.gpu.linear_assignment import column_numbers, shortest_augmenting_paths

    @triton.jit
    def _search(cost_ptr, out_ptr, rows, columns, COLUMNS: tl.constexpr):
        """The search alone, without the check of the costs that comes before it."""
        o_c = column_numbers(COLUMNS)
        row_of = shortest_augmenting_paths(cost_ptr, columns, 1, rows, columns, COLUMNS=COLUMNS)
        tl.store(out_ptr + o_c, row_of, mask=o_c < columns)


GOLDEN = ["matching.assignment", "matching.total_cost"]
pytestmark = needs_triton
ON_GPU = DEVICE.type == "cuda"
OPERATORS = torch.ops.spot_kernels

# problems per kind: 50 shapes × 25 on a GPU, 12 × 6 under the interpreter; kinds: 8
SHAPES, BATCH, LARGEST = (50, 25, 64) if ON_GPU else (12, 6, 8)
KINDS = ["random", "random32", "tied", "constant", "integer", "near-degenerate", "large and small", "sums"]


def _problems(kind: str, batch: int, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    shape = (batch, rows, columns)
    few = torch.randint(0, 3, shape, generator=generator)
    of_row, of_column = (
        torch.randint(1, 8, (batch, *side), generator=generator).double() / 10 for side in ((rows, 1), (1, columns))
    )
    return {
        "random": lambda: torch.randn(shape, generator=generator, dtype=torch.float64),
        "random32": lambda: torch.rand(shape, generator=generator),
        "tied": lambda: few.float() / 3,
        "constant": lambda: torch.full(shape, 0.3),
        "integer": lambda: torch.randint(-1000, 1000, shape, generator=generator).double(),
        "near-degenerate": lambda: 1 + few.double() * 2**-50,
        "large and small": lambda: 10.0 ** torch.randint(-9, 10, shape, generator=generator).double(),
        # every assignment of a square one has the same total, and the order of the additions decides
        "sums": lambda: of_row + of_column,
    }[kind]()


def _maps(batch: int, tokens: int, labels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, labels, (batch, tokens), generator=generator) for _ in range(2))


def _solve(cost: torch.Tensor) -> torch.Tensor:
    with spot_kernels.use_backend("triton"):
        return spot_kernels.linear_assignment(cost.to(DEVICE)).cpu()


def _total(cost: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    picked = cost.double().gather(2, columns.clamp(min=0)[:, :, None]).squeeze(2)
    return torch.where(columns >= 0, picked, 0).sum(1)


def _assert_same_choice(cost: torch.Tensor) -> None:
    """Requires scipy's least total cost, and the native library's choice among assignments of that cost."""
    columns, best = _solve(cost), reference.linear_assignment(cost)
    assert torch.equal(_total(cost, columns), _total(cost, best))
    assert torch.equal(columns, native.linear_assignment(cost) if native.available() else best)


@pytest.mark.parametrize("kind", KINDS)
def test_assignment_equals_the_native_library(kind):
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    fixed = [(1, 1), (7, 7), (1, LARGEST), (LARGEST, 1), (LARGEST, LARGEST)]
    drawn = torch.randint(1, LARGEST + 1, (SHAPES - len(fixed), 2), generator=generator).tolist()
    for rows, columns in [*fixed, *drawn]:
        _assert_same_choice(_problems(kind, BATCH, rows, columns, generator))


@pytest.mark.parametrize(
    "kind,rows,columns",
    [
        ("random", 24, 24),
        ("integer", 11, 33),
        ("near-degenerate", 24, 20),
        ("tied", 64, 64),
        ("constant", 64, 64),
        ("random32", 64, 9),
    ],
)
def test_assignment_of_many_slots(kind, rows, columns):
    """All widths that the kernel is compiled for, up to its largest problem."""
    _assert_same_choice(_problems(kind, 1, rows, columns, torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_assignment_takes_every_float(dtype):
    cost = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = _solve(cost.requires_grad_())
    assert columns.dtype == torch.int64 and not columns.requires_grad
    assert torch.equal(columns, reference.linear_assignment(cost.double()))


@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 9), (9, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.001e300])
def test_assignment_of_bad_costs_is_none(rows, columns, bad):
    """Such a problem ends, with -1 in every row, wherever the value is; the other problems are not affected."""
    cost = torch.rand(4, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reference.linear_assignment(cost)
    cost[0, 0, 0] = cost[2, -1, -1] = bad
    expected[0] = expected[2] = -1
    assert torch.equal(_solve(cost), expected)


@pytest.mark.parametrize("rows,columns", [(1, 1), (5, 5), (4, 9), (8, 8)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["everywhere", "a row", "a column", "one"])
def test_a_search_ends_whatever_it_reads(rows, columns, bad, where):
    """Costs that a missing barrier or another kernel's write could cause: it stops, with no rows or a permutation."""
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    chosen = {
        "everywhere": (slice(None), slice(None)),
        "a row": (-1, slice(None)),
        "a column": (slice(None), 0),
        "one": (0, -1),
    }[where]
    cost[chosen] = bad
    held = torch.full((columns,), -7, dtype=torch.int32, device=DEVICE)
    launch.launch(_search, (1,), cost.to(DEVICE), held, rows, columns, COLUMNS=16, num_warps=1, num_stages=1)
    held = held.cpu()
    assert bool((held == -1).all()) or sorted(held[held >= 0].tolist()) == list(range(rows))
    if where == "everywhere" and bad != bad:
        assert bool((held == -1).all())


def test_matching_of_broken_costs_assigns_no_slot(monkeypatch):
    """The fused kernel ends with NaN among the costs: -1 and 0 for that image, other images are not affected."""
    student, teacher = _maps(3, 20, 5)
    student, teacher = student.clamp(max=3), teacher.clamp(max=3)  # the last slot is empty
    teacher[1, :5] = torch.arange(5)  # except in one image
    expected = _match_on_cpu(student, teacher, 5)
    monkeypatch.setattr(spot_kernels.mask_matching, "EMPTY_TEACHER_COST", float("nan"))
    assignment, iou, cost, renamed = _match(student, teacher, 5)
    assert torch.equal(assignment[1], expected[0][1]) and torch.equal(renamed[1], expected[3][1])
    for image in (0, 2):
        assert cost[image].isnan().any() and bool((assignment[image] == -1).all())
        assert bool((renamed[image] == -1).all()) and bool((iou[image] == 0).all())


def test_assignment_of_the_largest_costs():
    """Sums of ±1e300 stay finite."""
    cost = torch.randint(-1, 2, (6, 6, 6), generator=torch.Generator().manual_seed(4)).double()
    assert torch.equal(_solve(cost * 1e300), reference.linear_assignment(cost))


def test_assignment_of_strided_costs():
    cost = torch.rand(8, 6, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(_solve(cost.mT), _solve(cost.mT.contiguous()))
    assert torch.equal(_solve(cost[::2, 1::2]), _solve(cost[::2, 1::2].contiguous()))
    same = torch.zeros(1, 1, 1, device=DEVICE).expand(2, 5, 5)
    assert torch.equal(_solve(same), torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_problems(shape):
    columns = _solve(torch.zeros(shape))
    assert columns.shape == shape[:2] and bool((columns == -1).all())


def _match(student: torch.Tensor, teacher: torch.Tensor, slots: int) -> tuple[torch.Tensor, ...]:
    """assignment, its IoU, cost, renamed labels: of the kernels."""
    student, teacher = student.to(DEVICE), teacher.to(DEVICE)
    with spot_kernels.use_backend("triton"):
        parts = *spot_kernels.assign_masks(student, teacher, slots), spot_kernels.match_masks(student, teacher, slots)
    return tuple(part.cpu() for part in parts)


def _match_on_cpu(student: torch.Tensor, teacher: torch.Tensor, slots: int) -> tuple[torch.Tensor, ...]:
    with spot_kernels.use_backend("auto"):
        return *spot_kernels.assign_masks(student, teacher, slots), spot_kernels.match_masks(student, teacher, slots)


def _assert_identical(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    "batch,tokens,slots,labels",
    [
        (1, 1, 1, 1),
        (3, 15, 2, 2),
        (2, 49, 6, 6),
        (4, 196, 7, 7),
        (2, 196, 7, 3),
        (2, 300, 11, 11),
        (1, 257, 16, 10),
        (1, 196, 24, 20),
        (1, 49, 33, 9),
        (1, 130, 64, 5),
    ],
)
def test_matching_equals_the_cpu(batch, tokens, slots, labels):
    """Costs equal to the last bit, hence the same assignment among equals, which empty slots make common."""
    student, teacher = _maps(batch, tokens, labels, seed=slots)
    _assert_identical(_match(student, teacher, slots), _match_on_cpu(student, teacher, slots))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_matching_takes_every_integer(dtype):
    """Also two different ones."""
    student, teacher = _maps(2, 40, 5)
    _assert_identical(_match(student.to(dtype), teacher.int(), 5), _match_on_cpu(student, teacher, 5))


def test_matching_of_strided_labels():
    student, teacher = _maps(3, 50, 4)
    expected = _match_on_cpu(student, teacher, 4)
    there = [labels.to(DEVICE).mT.contiguous().mT for labels in (student, teacher)]
    _assert_identical(_match(*there, 4), expected)
    same = teacher[:1].to(DEVICE).expand(3, 50)
    _assert_identical(_match(same, there[1], 4), _match_on_cpu(teacher[:1].expand(3, 50), teacher, 4))


@pytest.mark.parametrize("batch,tokens", [(0, 20), (0, 0), (2, 0)])
def test_matching_of_empty_maps(batch, tokens):
    labels = torch.zeros(batch, tokens, dtype=torch.int64)
    _assert_identical(_match(labels, labels, 7), _match_on_cpu(labels, labels, 7))


def test_golden_hand_made_maps():
    student = golden_tensors.load("matching.student_labels").flatten(1)
    teacher = golden_tensors.load("matching.teacher_labels").flatten(1)
    unique = golden_tensors.load("matching.is_unique")
    assignment, _, cost, _ = _match(student, teacher, 7)
    golden_tensors.assert_close("matching.assignment", assignment, where=unique[:, None].expand(-1, 7))
    golden_tensors.assert_close("matching.total_cost", _total(cost, assignment))


@pytest.mark.parametrize("wrong", [-1, 5, 2**32 + 3, -(2**40)])
def test_labels_out_of_range_are_left_out(wrong):
    """The GPU does not check labels. Truncated to 32 bits the third would be 3: it must not be counted as 3."""
    student, teacher = _maps(1, 40, 5)
    expected = _match_on_cpu(student[:, 2:], teacher[:, 2:], 5)
    student[0, 0] = teacher[0, 1] = wrong
    *pairs, renamed = _match(student, teacher, 5)
    _assert_identical(tuple(pairs), expected[:3])
    assert renamed[0, 0] == expected[0][0, teacher[0, 0]] and renamed[0, 1] == -1
    assert torch.equal(renamed[:, 2:], expected[3])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "batch,tokens,num_a,num_b", [(2, 100, 5, 9), (1, 5000, 3, 2), (2, 30, 70, 65), (0, 9, 2, 2), (2, 0, 2, 3)]
)
def test_overlap_counts_equal_the_reference(masked, batch, tokens, num_a, num_b):
    """Tokens split over programs (5000 of them), several tiles of labels; labels of invalid tokens may be anything."""
    generator = torch.Generator().manual_seed(tokens)
    a = torch.randint(0, num_a, (batch, tokens), generator=generator)
    b = torch.randint(0, num_b, (batch, tokens), generator=generator).int()
    valid = torch.rand(batch, tokens, generator=generator) < 0.5 if masked else None
    expected = reference.overlap_counts(a, b, num_a, num_b, valid)
    if masked:
        a, b = a.where(valid, -1), b.where(valid, 0)
    a, b = a.mT.contiguous().mT.to(DEVICE), b.to(DEVICE)
    with spot_kernels.use_backend("triton"):
        counts = spot_kernels.overlap_counts(a, b, num_a, num_b, None if valid is None else valid.to(DEVICE))
    assert counts.dtype == torch.int64 and torch.equal(counts.cpu(), expected)


def test_repeats_are_identical():
    student, teacher = _maps(2, 60, 4)
    first = _match(student, teacher, 7)
    for _ in range(100 if ON_GPU else 1):
        _assert_identical(_match(student, teacher, 7), first)


@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout):
    cost = torch.rand(2, 2, 3, device=DEVICE)
    student, teacher = (labels.to(DEVICE) for labels in _maps(2, 6, 3))
    if layout == "permuted":
        cost, student, teacher = (x.mT.contiguous().mT for x in (cost, student, teacher))
    torch.library.opcheck(OPERATORS.linear_assignment.default, (cost, None, "triton"))
    torch.library.opcheck(OPERATORS.linear_assignment.default, (cost.clone().requires_grad_(), None, "triton"))
    torch.library.opcheck(OPERATORS.assign_masks.default, (student, teacher, 3, "triton"))
    torch.library.opcheck(OPERATORS.match_masks.default, (student, teacher, 3, "triton"))
    torch.library.opcheck(OPERATORS.overlap_counts.default, (student, teacher, 3, 4, student > 1, "triton"))


def test_compiled_in_one_graph():
    student, teacher = (labels.to(DEVICE) for labels in _maps(2, 30, 4))

    def both(student, teacher):
        _, iou, cost = spot_kernels.assign_masks(student, teacher, 4)
        return spot_kernels.match_masks(student, teacher, 4), spot_kernels.linear_assignment(cost), iou

    with spot_kernels.use_backend("triton"):
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, compiled(student, teacher), both(student, teacher)))


def test_autocast_changes_nothing():
    """The costs are equal in bfloat16."""
    cost = torch.tensor([[[1.0, 1.0001], [1.0, 1.0]]])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert _solve(cost).tolist() == [[0, 1]]


def test_limits_are_named():
    labels = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    with spot_kernels.use_backend("triton"):
        for shape in ((1, 1025, 2), (1, 2, 1025)):
            with pytest.raises(
                ValueError, match="linear_assignment.*more than 1024 rows or columns: use backend torch"
            ):
                spot_kernels.linear_assignment(torch.zeros(shape, device=DEVICE))
        for operator in (spot_kernels.assign_masks, spot_kernels.match_masks):
            with pytest.raises(ValueError, match="num_slots is 65, more than 64: use backend torch"):
                operator(labels, labels, 65)
        with pytest.raises(ValueError, match="num_slots is 0: pass at least 1"):
            spot_kernels.match_masks(labels, labels, 0)
        many = labels[:, :1].expand(1, 2**24 + 1)
        with pytest.raises(ValueError, match="has more than 16777216 tokens: use backend torch"):
            spot_kernels.match_masks(many, many, 7)


@needs_gpu
def test_beyond_the_limits_the_host_computes():
    cost = torch.rand(2, 65, 70, device=DEVICE)
    assert torch.equal(spot_kernels.linear_assignment(cost).cpu(), reference.linear_assignment(cost.cpu()))
    student, teacher = _maps(2, 300, 65)
    assert spot_kernels.match_masks(student.to(DEVICE), teacher.to(DEVICE), 65).device.type == "cuda"
    assert dispatch.choose("match_masks", student.to(DEVICE)) == "triton"


def _everything(cost, student, teacher):
    return (
        spot_kernels.linear_assignment(cost),
        *spot_kernels.assign_masks(student, teacher, 7),
        spot_kernels.match_masks(student, teacher, 7),
        spot_kernels.overlap_counts(student, teacher, 7, 9),
    )


@needs_gpu
def test_captured_in_a_graph_without_a_sync():
    """Replayed on other inputs, the second of them with NaN, which the graph has to survive."""
    inputs = torch.rand(4, 7, 7, device=DEVICE), *(labels.to(DEVICE) for labels in _maps(4, 196, 7))

    def change(seed):
        for tensor, new in zip(inputs, (torch.rand(4, 7, 7), *_maps(4, 196, 5, seed)), strict=True):
            tensor.copy_(new)
        if seed == 2:
            inputs[0][0, 0, 0] = float("nan")

    assert_graph_replays(lambda: _everything(*inputs), change)
