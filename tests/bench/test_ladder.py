"""The ladder: its rows and verdicts, its table and CSV, and one row's process, on a small model."""

import io
import json
import sys
from dataclasses import asdict, replace

import ladder
import pytest
import torch
from harness import ladder_row, step_runs
from harness.ladder_row import Job
from ladder import REFERENCE, Row, Technique

from spot_kernels import dispatch

PLAIN = {"float32": (1e-9, 1e-6), "bf16": (1e-4, 1e-2)}
OURS = Technique("ours", precision="bf16", cached=True)
CPU = torch.device("cpu")


class StandIn:
    """A process whose errors, seconds a step and end are those of its technique."""

    errors = {}
    seconds = {REFERENCE.name: [9.0, 2.0, 4.0, 3.0], "ours": [9.0, 1.0, 1.0, 1.0]}
    dies = ""

    def __init__(self, job, technique):
        self.technique = technique
        self.times = iter(self.seconds[technique.name]) if technique else None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        pass

    def read(self):
        if self.technique is None:
            return {"plain": PLAIN, "flops": {"False": 3e9, "True": 2e9}}
        return self.errors.get(self.technique.name, {"loss_error": 0.0, "gradient_error": 1e-4})

    def step(self):
        seconds = next(self.times)
        if self.technique.name == self.dies and seconds != 9:
            raise ladder_row.RowEnded("out of memory")
        return seconds

    def end(self):
        return 100.0


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(ladder, "Process", StandIn)
    monkeypatch.setattr(StandIn, "errors", {})
    return monkeypatch


def rows(*techniques):
    return ladder.measure(1, 4, 3, CPU, tiny=True, techniques=techniques)


def test_rows_of_a_stage(stand_in):
    reference, ours = rows(REFERENCE, OURS)
    assert (reference.ms, reference.images_s, reference.times, reference.gflop) == (3000, 4 / 3, 1, 12)
    assert (ours.ms, ours.images_s, ours.times, ours.gflop, ours.peak_mib) == (1000, 4, 3, 8, 100)


@pytest.mark.parametrize("error", ["loss_error", "gradient_error"])
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_a_wrong_row_has_no_speed(stand_in, error, value):
    stand_in.setattr(StandIn, "errors", {"ours": {"loss_error": 0.0, "gradient_error": 0.0} | {error: value}})
    reference, ours = rows(REFERENCE, OURS)
    assert ours.failed and ours.ms is ours.times is ours.peak_mib is None and "allowed" in ours.problem
    assert not reference.failed and reference.ms
    assert "| ours | FAILED | – | – | – | – |" in ladder.table([reference, ours], 1e12)


def test_a_row_that_ends_has_no_speed(stand_in):
    stand_in.setattr(StandIn, "dies", "ours")
    reference, ours = rows(REFERENCE, OURS)
    assert ours.failed and ours.problem == "out of memory" and ours.ms is None and reference.ms
    stand_in.setattr(StandIn, "dies", "")
    stand_in.setattr(StandIn, "errors", {"ours": {"error": "no compiler"}})
    assert rows(REFERENCE, OURS)[1].problem == "no compiler"


def test_rows_that_do_nothing_on_a_device_are_skipped(monkeypatch):
    monkeypatch.setattr(ladder, "cpu_has_bfloat16", lambda: True)
    gpu = torch.device("cuda")
    *others, compiled, graph = ladder.techniques(CPU)
    assert ladder.reason_to_skip(compiled, CPU).startswith("skipped: on a CPU")
    assert ladder.reason_to_skip(graph, CPU).startswith("skipped: there is no GPU")
    skipped = {one.adds for one in others if ladder.reason_to_skip(one, CPU)}
    assert "order_layout" in skipped and "folded_cross_attention" not in skipped and "" not in skipped
    assert not any(ladder.reason_to_skip(one, gpu) for one in ladder.techniques(gpu))


def test_each_technique_has_a_row_which_later_rows_keep():
    rows = [one for one in ladder.techniques(torch.device("cuda")) if one.cached]
    assert {one.adds for one in rows} == {"", *dispatch.TECHNIQUES}
    assert set(rows[0].without) == dispatch.TECHNIQUES.keys() and not rows[-1].without
    for before, row in zip(rows, rows[1:], strict=False):
        assert set(before.without) - set(row.without) == {row.adds} - {""}


def test_a_processor_without_bfloat16_has_its_rows_in_float32(monkeypatch):
    monkeypatch.setattr(ladder, "cpu_has_bfloat16", lambda: False)
    rows = {one.name: one for one in ladder.techniques(CPU)}
    bfloat16 = rows.pop("+ bfloat16 products, float32 weights")
    assert "does not multiply bfloat16" in ladder.reason_to_skip(bfloat16, CPU)
    assert {one.precision for one in rows.values()} == {"float32"}


def test_few_processes_run_at_once_on_a_cpu(stand_in):
    """Ratios are those of the same group's reference."""
    many = [replace(OURS, name=f"row {number}") for number in range(6)]
    stand_in.setattr(StandIn, "seconds", StandIn.seconds | {one.name: [9.0, 1.0, 2.0, 1.5] for one in many})
    found = ladder.groups([REFERENCE, *many], CPU)
    assert [[one.name for one in group] for group in found] == [
        [REFERENCE.name, "row 0", "row 1", "row 2", "row 3"],
        [REFERENCE.name, "row 4", "row 5"],
    ]
    assert ladder.groups([REFERENCE, OURS], torch.device("cuda")) == [[REFERENCE], [OURS]]
    assert [row.times for row in rows(REFERENCE, *many)] == [1, 2, 2, 2, 2, 2, 2]


def test_coco_is_projected_from_the_fastest_right_rows_of_its_batch():
    right = [
        ladder.Row(1, "slow", 64, ms=100.0),
        ladder.Row(1, "fast", 64, ms=6.0),
        ladder.Row(2, "fast", 64, ms=12.0),
        ladder.Row(2, "wrong", 64, problem="loss off"),
    ]
    assert "92,400 steps of 64 a stage, at the fastest rows' speed: 9.2 + 18.5 = 27.7 min" in ladder.projection(right)
    assert ladder.projection(right[:2]) == ladder.projection([replace(row, batch_size=8) for row in right]) == ""


def test_limits_are_a_multiple_of_plain_errors():
    assert ladder.limits(PLAIN, "float32") == (1e-6, 1e-3)
    assert ladder.limits(PLAIN, "bf16") == (4e-3, pytest.approx(3e-2))


def test_csv_and_table(tmp_path, capsys):
    made = [
        Row(1, "reference", 8, 100.0, 80.0, 1.0, 40.0, 1500.0, 1e-8, 1e-6, 1e-6, 1e-3),
        Row(2, "+ magic", 8, problem="skipped: no wand"),
    ]
    about = ladder.about_machine(CPU, 2e12)
    ladder.write_csv(tmp_path / "new" / "l.csv", made, about)
    assert ladder.read_csv(tmp_path / "new" / "l.csv") == (made, about)
    assert ladder.main(["--table", str(tmp_path / "new" / "l.csv")]) == 0
    printed = capsys.readouterr().out
    assert "| reference | 80.0 | 100 | 1.00 | 20.0 | 1,500 | 1.0e-08 | 1.0e-06 |" in printed
    assert "+ magic: skipped: no wand" in printed and "2 TFLOP/s" in printed


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rows_process(stage, tmp_path, monkeypatch, capsys):
    config = step_runs.settings(stage, precision="float32", batch_size=4, tiny=True)
    teacher = step_runs.write_teacher(tmp_path / "teacher", config) if stage == 2 else ""
    job = Job(stage, 4, "cpu", True, str(teacher), str(tmp_path))
    ladder_row._exact(job)
    about = answers(capsys)[0]
    assert about["flops"]["False"] > about["flops"]["True"] > 0
    assert about["plain"]["float32"][1] < 5e-4 < about["plain"]["bf16"][1] < 0.1
    monkeypatch.setattr(ladder, "cpu_has_bfloat16", lambda: True)
    for technique in (*ladder.techniques(CPU)[:4], replace(OURS, changes={"att_weight": 0.5, "lr": 1.0, "seed": 1})):
        monkeypatch.setattr(sys, "stdin", io.StringIO("step\nend\n"))
        ladder_row._row(job, Technique(**json.loads(json.dumps(asdict(technique)))))
        checked, step, memory = answers(capsys)
        limits = ladder.limits(about["plain"], technique.precision)
        row = Row(stage, "row", 4, loss_limit=limits[0], gradient_limit=limits[1], **checked)
        judged = ladder.verdict(row)
        assert judged.failed == bool(technique.changes), (technique.name, judged.problem)
        assert step["value"] > 0 and memory["value"] > 10


def answers(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix("ladder ")) for line in lines if line.startswith("ladder ")]


def test_a_process_does_without_techniques(tmp_path):
    """Those of its row, by name; an unknown one ends it."""
    unknown = replace(OURS, without=("magic",))
    with ladder_row.Process(Job(1, 4, "cpu", True, "", str(tmp_path)), unknown) as process:
        assert "technique 'magic' is unknown" in process.read()["error"]


def test_last_words_of_a_process(tmp_path):
    with ladder_row.Process(Job(1, 4, "nowhere", True, "", str(tmp_path)), REFERENCE) as process:
        assert "nowhere" in process.read()["error"]
        with pytest.raises(ladder_row.RowEnded):
            process.step()
