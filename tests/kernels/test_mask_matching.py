"""Mask matching, on the native path and on the one without a compiler, against golden and against definitions.

The kernels have test_mask_matching_kernels.py.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_tensors
import spot_kernels
from spot_kernels import dispatch, native
from spot_kernels.reference import mask_matching as reference

GOLDEN = ["matching.*", "self_training.*.matching*"]


@pytest.fixture(params=["native", "torch"])
def path(request):
    """The backend that the operators run on."""
    if request.param == "native" and not dispatch.NATIVE:
        pytest.skip(native.describe())
    with spot_kernels.use_backend(request.param):
        yield request.param


def _maps(batch: int, tokens: int, slots: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, slots, (batch, tokens), generator=generator) for _ in range(2))


def test_golden_hand_made_maps(path):
    student = golden_tensors.load("matching.student_labels").flatten(1)
    teacher = golden_tensors.load("matching.teacher_labels").flatten(1)
    unique = golden_tensors.load("matching.is_unique")
    assignment, iou, cost = spot_kernels.assign_masks(student, teacher, 7)
    golden_tensors.assert_close("matching.assignment", assignment, where=unique[:, None].expand(-1, 7))
    golden_tensors.assert_close("matching.iou", iou, where=unique[:, None].expand(-1, 7))
    total = cost.gather(2, assignment[:, :, None]).double().sum((1, 2))
    golden_tensors.assert_close("matching.total_cost", total)
    assert torch.equal(assignment.sort(1).values, torch.arange(7).expand(6, 7))


@pytest.mark.parametrize("case", ["regular", "empty_teacher_slot"])
def test_golden_self_training(path, case):
    student = golden_tensors.load("self_training.student_attention_labels").flatten(1)
    teacher = golden_tensors.load(f"self_training.{case}.teacher_labels").flatten(1)
    assert bool(golden_tensors.load(f"self_training.{case}.matching_is_unique").all())
    assignment, iou, _ = spot_kernels.assign_masks(student, teacher, 7)
    golden_tensors.assert_close(f"self_training.{case}.matching", assignment)
    golden_tensors.assert_close(f"self_training.{case}.matching_iou", iou)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 4),
    tokens=st.integers(0, 60),
    slots=st.integers(1, 24),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
def test_assign_masks_equals_the_plain_version(batch, tokens, slots, seed, dtype):
    student, teacher = (labels.to(dtype) for labels in _maps(batch, tokens, slots, seed))
    expected = reference.assign_masks(student, teacher, slots)
    torch.testing.assert_close(spot_kernels.assign_masks(student, teacher, slots), expected, rtol=1e-6, atol=0)


def test_both_paths_give_the_same():
    """Also where the optimum is not unique: half of the slots are empty here."""
    if not dispatch.NATIVE:
        pytest.skip(native.describe())
    student, teacher = _maps(64, 49, 5)
    results = []
    for backend in ("native", "torch"):
        with spot_kernels.use_backend(backend):
            pairs = spot_kernels.assign_masks(student, teacher, 11)
            results.append((*pairs, spot_kernels.match_masks(student, teacher, 11)))
    assert all(map(torch.equal, *results))


def test_without_a_library_scipy_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE", False)
    monkeypatch.setattr(native, "_load", lambda: (None, "no native library"))
    cost = torch.rand(2, 4, 4)
    assert spot_kernels.chosen_backend("linear_assignment", cost) == "torch"
    assert torch.equal(spot_kernels.linear_assignment(cost), reference.linear_assignment(cost))
    student, teacher = _maps(2, 9, 3)
    assert torch.equal(spot_kernels.match_masks(student, student, 3), student)
    assert spot_kernels.overlap_counts(student, teacher, 3, 3).sum() == 18


def test_match_masks_undoes_a_renaming(path):
    student, _ = _maps(8, 196, 7)
    generator = torch.Generator().manual_seed(1)
    renamed = torch.stack([torch.randperm(7, generator=generator)[labels] for labels in student])
    assert torch.equal(spot_kernels.match_masks(student, renamed, 7), student)
    assert torch.equal(spot_kernels.match_masks(student, student, 7), student)


def test_empty_masks(path):
    """Teacher 2 and 3 are empty: they cost 1000 and get what is left; student 1 and 3 are empty: IoU 0, not NaN."""
    student = torch.tensor([[0, 0, 2, 2]])
    teacher = torch.tensor([[1, 1, 0, 0]])
    assignment, iou, cost = spot_kernels.assign_masks(student, teacher, 4)
    assert assignment[0, :2].tolist() == [2, 0]
    assert iou.tolist() == [[1, 1, 0, 0]]
    assert cost[0].tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [1000] * 4, [1000] * 4]


@pytest.mark.parametrize("batch,tokens", [(0, 196), (0, 0), (3, 0)])
def test_empty_input(path, batch, tokens):
    labels = torch.zeros(batch, tokens, dtype=torch.int64)
    assignment, iou, cost = spot_kernels.assign_masks(labels, labels, 7)
    assert (assignment.shape, iou.shape, cost.shape) == ((batch, 7), (batch, 7), (batch, 7, 7))
    assert torch.equal(assignment, torch.arange(7).expand(batch, 7))
    assert spot_kernels.match_masks(labels, labels, 7).shape == (batch, tokens)
    assert spot_kernels.overlap_counts(labels, labels, 3, 5).tolist() == [[[0] * 5] * 3] * batch
    assert spot_kernels.linear_assignment(torch.zeros(batch, 2, tokens)).shape == (batch, 2)


def test_strided_labels(path):
    student, teacher = _maps(6, 50, 7)
    expected = spot_kernels.match_masks(student, teacher, 7)
    assert torch.equal(spot_kernels.match_masks(student.mT.contiguous().mT, teacher.mT.contiguous().mT, 7), expected)
    same = student[:1].expand(6, 50)
    assert torch.equal(spot_kernels.match_masks(same, same, 7), same)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 80),
    num_a=st.integers(1, 9),
    num_b=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    library=st.booleans(),
)
def test_overlap_counts_equals_numpy(batch, tokens, num_a, num_b, seed, masked, library):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, num_a, (batch, tokens), generator=generator)
    b = torch.randint(0, num_b, (batch, tokens), generator=generator)
    valid = torch.rand(batch, tokens, generator=generator) < 0.5 if masked else None
    expected = np.zeros((batch, num_a, num_b), dtype=np.int64)
    np.add.at(expected, (np.arange(batch)[:, None], a, b), 1 if valid is None else valid.long().numpy())
    if masked:
        a, b = a.where(valid, 255), b.where(valid, -1)  # not looked at
    count = spot_kernels.overlap_counts if library else reference.overlap_counts
    counts = count(a, b, num_a, num_b, valid)
    assert counts.dtype == torch.int64 and np.array_equal(counts.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_linear_assignment_takes_every_float(path, dtype):
    cost = torch.randint(0, 100, (5, 4, 6), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    columns = spot_kernels.linear_assignment(cost)
    assert columns.dtype == torch.int64 and torch.equal(columns, reference.linear_assignment(cost.double()))


def test_linear_assignment_of_strided_costs(path):
    cost = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spot_kernels.linear_assignment(cost.mT), spot_kernels.linear_assignment(cost.mT.contiguous()))
    same = torch.zeros(1, 1, 1).expand(3, 5, 5)
    assert torch.equal(spot_kernels.linear_assignment(same), torch.arange(5).expand(3, 5))


def test_more_rows_than_columns(path):
    cost = torch.tensor([[[3.0], [1.0], [2.0]]])
    assert spot_kernels.linear_assignment(cost).tolist() == [[-1, 0, -1]]


LABELS = torch.zeros(2, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: spot_kernels.linear_assignment(torch.zeros(3, 3)), r"cost \(3, 3\) must have the layout \[B, R, C\]"),
        (lambda: spot_kernels.linear_assignment(torch.zeros(1, 3, 3).long()), "cost is torch.int64: pass float64"),
        (lambda: spot_kernels.linear_assignment(torch.tensor([[[0.0]], [[float("nan")]]])), r"cost\[1\] holds NaN"),
        (lambda: spot_kernels.linear_assignment(torch.tensor([[[float("inf"), 1.0]]])), r"cost\[0\] holds NaN, inf"),
        (lambda: spot_kernels.linear_assignment(torch.ones(1, 2, 2).double() * 1e301), r"beyond 1e300: forbid pairs"),
        (lambda: spot_kernels.assign_masks(LABELS, LABELS + 9, 7), "teacher has labels 9 to 9, but 7 are expected"),
        (lambda: spot_kernels.assign_masks(LABELS - 1, LABELS, 7), "student has labels -1 to -1, but 7 are expected"),
        (lambda: spot_kernels.assign_masks(LABELS, LABELS[:, :4], 7), r"student \(2, 9\) and teacher \(2, 4\) must be"),
        (lambda: spot_kernels.assign_masks(LABELS.float(), LABELS, 7), "student is torch.float32: pass integer labels"),
        (lambda: spot_kernels.match_masks(LABELS[0], LABELS, 7), r"student \(9,\) must have the layout \[B, N\]"),
        (lambda: spot_kernels.match_masks(LABELS, LABELS, 0), "num_slots is 0: pass at least 1"),
        (lambda: spot_kernels.overlap_counts(LABELS, LABELS + 3, 3, 3), "b has labels 3 to 3, but 3 are expected"),
        (lambda: spot_kernels.overlap_counts(LABELS, LABELS, 3, 0), "num_b 0: pass at least 1"),
        (lambda: spot_kernels.overlap_counts(LABELS, LABELS, 3, 3, LABELS), r"valid is torch.int64 \(2, 9\)"),
    ],
)
def test_bad_input_is_named(path, call, message):
    with pytest.raises(ValueError, match=message):
        call()


OPERATORS = torch.ops.spot_kernels


@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(path, layout):
    cost = torch.rand(3, 4, 6)
    student, teacher = _maps(3, 20, 5)
    if layout == "permuted":
        cost, student, teacher = (x.mT.contiguous().mT for x in (cost, student, teacher))
    torch.library.opcheck(OPERATORS.linear_assignment.default, (cost, None, path))
    torch.library.opcheck(OPERATORS.linear_assignment.default, (cost.clone().requires_grad_(), None, path))
    torch.library.opcheck(OPERATORS.assign_masks.default, (student, teacher, 5, path))
    torch.library.opcheck(OPERATORS.match_masks.default, (student, teacher, 5, path))
    torch.library.opcheck(OPERATORS.overlap_counts.default, (student, teacher, 5, 6, None, path))
    torch.library.opcheck(OPERATORS.overlap_counts.default, (student, teacher, 5, 6, student > 2, path))


def test_compiled_in_one_graph(path):
    student, teacher = _maps(4, 49, 7)
    compiled = torch.compile(spot_kernels.match_masks, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(student, teacher, 7), spot_kernels.match_masks(student, teacher, 7))
