"""The first minutes on a GPU: the rehearsal of the whole script, what is kept when something ends it, its verdicts."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ceilings
import compare
import layouts
import operators
import pytest
import record
import rivals
import steps
import techniques
import torch
from harness import kernel_bench, kernel_clock, machine, step_flops
from harness.kernel_rows import OURS
from record import ABSENT, GO, LATE, NO_GO, OUT_OF_TIME, PARTS, Options, Recorder, Row, Time

from paths import BENCH
from spot_fast.training.compiled import Compiled
from stand_in_gpu import pretend_gpu, square_case

SCRIPT = BENCH / "first_light.sh"
HERE = Options(gpu=False, rehearse=True, out=Path("."), seconds=60)


def call(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    more = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", str(SCRIPT), *words], env=os.environ | more, capture_output=True, text=True)


# ---- the whole script


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What `first_light.sh --rehearse` printed, its folder, and its seconds."""
    out = tmp_path_factory.mktemp("first_light")
    began = time.monotonic()
    done = call(["--rehearse"], OUT=str(out), COMMIT="abc1234")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out, time.monotonic() - began


def kept(out: Path, part: str) -> list[tuple[dict[str, str], Row]]:
    (path,) = out.glob(f"first_light_{part}_*.csv")
    return record.read(path)


@pytest.mark.slow
def test_rehearsal_runs_every_part(rehearsal):
    printed, out, _ = rehearsal
    ended = [line.partition(", ")[0] for line in printed.splitlines() if ": exit code" in line]
    assert ended == [f"{part}: exit code 0" for part in PARTS]
    assert (out / "first_light.txt").read_text() == printed
    # what a GPU machine gives back is eight files at most
    assert len(list(out.iterdir())) <= 8
    for part in PARTS:
        rows = kept(out, part)
        assert not [row for _, row in rows if row.verdict in (NO_GO, LATE)]
        for about, row in rows:
            assert row.part == part and about["torch"] == torch.__version__ and about["rehearsal"] == "yes"
            assert about["card"] and about["date"] and about["time"] and about["commit"] and about["triton"]
            assert printed.startswith(f"run {about['run']}, results in {out}\n")
            assert str(row).split("  ")[0] in printed


@pytest.mark.slow
def test_what_has_to_travel_is_far_below_the_limit(rehearsal):
    travels = re.search(r"^travels: ([\d.]+) MiB of 64$", rehearsal[0], re.MULTILINE)
    if not (BENCH.parent / ".git").exists():
        pytest.skip("a checkout without its history")
    assert float(travels[1]) < 40


@pytest.mark.slow
def test_each_part_has_what_it_is_for(rehearsal):
    _, out, _ = rehearsal
    rows = {part: [row for _, row in kept(out, part)] for part in PARTS}
    assert {"copy", "large product", "stage 1", "stage 2"} <= {row.subject for row in rows["ceilings"]}
    assert {"forward", "input", "weight"} <= {row.variant for row in rows["ceilings"]}
    checked = {row.subject.partition(",")[0] for row in rows["operators"]}
    assert checked >= set(
        "slot_attention_step permuted_causal_attention slot_cross_attention slot_cross_map shift_by_order gru_norm "
        "folded_cross_attention folded_cross_map "
        "add_norm linear_relu linear_assignment match_masks SlotAttention".split()
    )
    for stage in ("stage 1", "stage 2"):
        of_stage = [row for row in rows["steps"] if row.subject == stage]
        timed = {row.variant: row for row in of_stage if row.figure == "ms a step"}
        assert timed.keys() == {steps.EAGER, steps.COMPILED, steps.GRAPH, "aim"}
        assert all(row.error is not None and row.value > 0 for name, row in timed.items() if name != "aim")
        assert "recorded" in timed[steps.GRAPH].note
        assert any("are 4 plain ones" in row.figure and row.verdict == GO for row in of_stage)
    ladder = {row.variant: row for row in rows["techniques"] if row.subject == "stage 1"}
    assert {techniques.EVERYTHING, techniques.NOTHING} <= ladder.keys()
    assert all(row.value > 0 and row.error <= row.allowed for row in ladder.values())
    attention = {row.variant for row in rows["layouts"] if row.subject == "decoder's self-attention"}
    assert {"raster, ours", "raster, gathered", "order, FLASH", "order, CUDNN"} <= attention
    assert {row.subject.partition(",")[0] for row in rows["rivals"]} >= rivals.WANTED.keys()


@pytest.mark.slow
def test_the_last_line_says_how_far_the_aims_are(rehearsal):
    printed, out, _ = rehearsal
    last = printed.splitlines()[-1]
    assert "stage 1: " in last and "aim 6: " in last and "aim 12: " in last and "minutes, aim 30: " in last
    card = kept(out, "steps")[0][0]["card"]
    assert last.startswith(f"{card}: a rehearsal")
    command = [sys.executable, str(BENCH / "first_light" / "table.py"), *map(str, out.glob("*.csv"))]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.count("| what | of | figure |") == len(PARTS)


# ---- what ends a part


# Stands for python3 on a machine with a GPU: notes what it is asked for, fails at `operators`, never ends at `layouts`.
STAND_IN = """#!/usr/bin/env bash
echo "ran $*"
case $1 in
-c) exit ${IMPORTING_TORCH:-0} ;;
*operators*) exit 3 ;;
*layouts*) exec sleep 100 ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path):
    """STAND_IN as a file."""
    python = tmp_path / "stand-in python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return str(python)


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, stand_in):
    began = time.monotonic()
    done = call(["operators", "layouts", "ceilings"], OUT=str(tmp_path), PYTHON=stand_in, LIMIT="12")
    assert time.monotonic() - began < 40
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "operators: exit code 3, 0 s" in lines and "ceilings: no time is left" in lines
    assert any(line.startswith("layouts: exit code 1") for line in lines)  # 124, or 137 where INT is ignored
    run = re.match(r"run (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d), results in ", lines[1])[1]
    assert lines[-1].startswith(f"ran bench/first_light/table.py --last --run {run} {tmp_path}/first_light_")


@pytest.mark.parametrize(
    "words, wrong, says",
    [
        ("kernels", {}, "unknown part kernels: use ceilings, operators, steps, techniques"),
        ("layouts", {"LIMIT": "8min"}, "LIMIT=8min is no number of seconds: use 600"),
        ("layouts", {"LIMIT": "-5"}, "LIMIT=-5 is no"),
        ("layouts", {"LIMIT": "0"}, "LIMIT=0 is no"),
        ("layouts --rehearse", {"LIMIT": "4.5"}, "LIMIT=4.5 is no"),
        ("layouts", {"IMPORTING_TORCH": "1"}, "cannot import torch: name one that can"),
        ("layouts --rehearse", {"IMPORTING_TORCH": "1"}, "cannot import torch: name one that can"),
        ("layouts --rehearse", {"PYTHON": "/none/python"}, "PYTHON=/none/python cannot import torch"),
        ("layouts", {"IMPORTING_TORCH": "9"}, "there is no GPU here: add --rehearse"),
    ],
)
def test_nothing_is_begun_where_a_run_cannot_be(words, wrong, says, tmp_path, stand_in):
    done = call(words.split(), **{"OUT": str(tmp_path / "none"), "PYTHON": stand_in, **wrong})
    assert done.returncode == 2 and says in done.stderr and "== " not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "none").exists()


def test_without_a_gpu_nothing_is_begun(tmp_path):
    done = call(["ceilings"], OUT=str(tmp_path / "none"), CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    assert done.stderr == "error: there is no GPU here: add --rehearse for a rehearsal on this machine\n"


@pytest.mark.parametrize("words", ["layouts", "layouts --rehearse"])
def test_a_folder_that_cannot_be_written_to_is_named(words, tmp_path, stand_in):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        done = call(words.split(), OUT=str(tmp_path / out), PYTHON=stand_in)
        assert done.returncode == 2
        assert done.stderr == f"error: OUT={tmp_path / out} cannot be written to: name another folder\n"


def test_a_rehearsal_leaves_the_results_alone(tmp_path, stand_in):
    """Its files are in a new folder, which it names."""
    before = sorted((BENCH / "results").iterdir())
    done = call(["ceilings", "--rehearse"], OUT="", TMPDIR=str(tmp_path), PYTHON=stand_in)
    (log,) = tmp_path.glob("*/first_light.txt")
    assert done.returncode == 0 and f"results in {log.parent}\n" in log.read_text()
    assert sorted((BENCH / "results").iterdir()) == before


def test_a_row_is_on_disk_before_the_next_thing_happens(tmp_path):
    code = f"""if True:
        import os, sys
        sys.path[:0] = [{str(BENCH / "first_light")!r}]
        from pathlib import Path
        from record import Recorder
        recorder = Recorder("steps", Path({str(tmp_path)!r}))
        recorder.add("stage 1", "eager", figure="ms a step", value=8.7, error=1e-3, allowed=3e-3, verdict="go")
        os.kill(os.getpid(), 9)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    ((about, row),) = kept(tmp_path, "steps")
    expected = Row("steps", "stage 1", "eager", "ms a step", 8.7, error=1e-3, allowed=3e-3, verdict="go")
    assert row == expected and about["torch"] == torch.__version__


def arguments(tmp_path: Path):
    return record.parser("for a test").parse_args(["--rehearse", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "stop, code, verdict", [(KeyboardInterrupt(), OUT_OF_TIME, LATE), (RuntimeError("illegal memory access"), 1, NO_GO)]
)
def test_what_ends_a_part_is_its_last_row(stop, code, verdict, tmp_path):
    def work(recorder, options, left):
        recorder.add("before", verdict=GO)
        raise stop

    assert record.run("layouts", work, arguments(tmp_path)) == code
    before, last = (row for _, row in kept(tmp_path, "layouts"))
    assert before.verdict == GO and last.verdict == verdict and last.subject == "the whole part"


def test_a_part_with_a_no_go_fails_and_one_without_a_gpu_is_a_sentence(tmp_path, monkeypatch, capsys):
    assert record.run("rivals", lambda recorder, *_: recorder.add("x", verdict=NO_GO), arguments(tmp_path)) == 1
    assert record.run("rivals", lambda recorder, *_: recorder.add("x", verdict=GO), arguments(tmp_path)) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = record.parser("for a test").parse_args(["--out", str(tmp_path)])
    assert record.run("rivals", lambda *_: pytest.fail("ran"), words) == 2
    assert "rivals needs a GPU: add --rehearse" in capsys.readouterr().err


def test_clocks_are_asked_for_at_most_every_few_seconds(monkeypatch):
    """Each question takes its time, and more where no answer comes."""
    asked, seconds = [], [100.0]

    def smi(names, patience):
        asked.append(names)
        return list(answers)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "nvidia_smi", smi)
    monkeypatch.setattr(record.time, "monotonic", lambda: seconds[0])
    clocks, answers = record._Clocks(), ["1980", "2619"]
    assert [clocks.now() for _ in range(3)] == [("1980", "2619")] * 3 and len(asked) == 1
    seconds[0], answers = 104.0, ["345", "2619"]
    assert clocks.now() == ("1980", "2619") and len(asked) == 1
    seconds[0] = 106.0
    assert clocks.now() == ("345", "2619") and len(asked) == 2
    seconds[0], answers = 112.0, []
    assert clocks.now() == ("", "") and len(asked) == 3
    seconds[0] = 1e6
    assert clocks.now() == ("", "") and len(asked) == 3


def test_an_error_of_nvidia_smi_is_no_answer(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for code, answer in (
        ("echo 1980, 2619", ["1980", "2619"]),
        ("echo NVIDIA-SMI has failed; exit 9", []),
        ("exit 0", []),
        ("exec sleep 30", []),
    ):
        tool.write_text(f"#!/bin/sh\n{code}\n")
        tool.chmod(0o755)
        assert machine.nvidia_smi("clocks.sm,clocks.mem", 0.5) == answer


# ---- verdicts


def test_a_wrong_or_moving_operator_is_no_go():
    verdicts = [row.verdict for row in operators.check(square_case(lambda x: x.square()), 3)]
    assert verdicts == [GO, GO]
    verdicts = [row.verdict for row in operators.check(square_case(lambda x: x.square() + 1e-4), 3)]
    assert verdicts == [NO_GO, GO]
    moving = square_case(lambda x: x.square() * (1 + 1e-7 * torch.rand(()).item()))
    assert operators.check(moving, 20)[1].verdict == NO_GO


def test_an_operator_that_takes_its_process_along_is_no_go(tmp_path, monkeypatch):
    """An illegal access ends the process; the other operators have theirs."""

    def checks(operator, options, results):
        if operator == "dies":
            os._exit(7)
        if operator == "hangs":
            time.sleep(60)
        results.put(Row("operators", operator, verdict=GO))

    monkeypatch.setattr(operators, "checks_of", checks)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind, get=multiprocessing.get_context: get("fork"))
    recorder = Recorder("operators", tmp_path)
    operators.side_by_side(recorder, HERE, Time(6), ["one", "dies", "hangs", "two"], jobs=2)
    rows = {row.subject: row for row in recorder.rows}
    assert rows["one"].verdict == rows["two"].verdict == GO and rows["hangs"].verdict == LATE
    assert rows["dies"].verdict == NO_GO and "code 7" in rows["dies"].note


@pytest.mark.parametrize("name", operators.RACES)
def test_what_the_sanitizer_looks_at_runs(name, tmp_path):
    operators.once(name, torch.device("cpu"))
    recorder = Recorder("operators", tmp_path)
    for text, code, verdict in (
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, GO),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 9, NO_GO),
        ("Device not supported", 1, ABSENT),
    ):
        command = [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        operators.report_sanitizer(recorder, (name, process), Time(30))
        assert recorder.rows[-1].verdict == verdict, text
    operators.report_sanitizer(recorder, (name, None), Time(30))
    assert recorder.rows[-1].verdict == ABSENT and "not installed" in recorder.rows[-1].note


def test_a_step_that_computes_something_else_is_no_go(tmp_path, monkeypatch):
    import spot_kernels.modules.slot_attention as modules

    right = modules.slot_attention_step

    def off(*given, **options):
        updates, *rest = right(*given, **options)
        from spot_kernels import dispatch

        return updates * (1.0 if dispatch._choice.requested == "torch" else 1.05), *rest

    monkeypatch.setattr(modules, "slot_attention_step", off)
    recorder = Recorder("steps", tmp_path, rehearsal=True)
    steps.steps(recorder, replace(HERE, out=tmp_path), Time(60), 1)
    timed = [row for row in recorder.rows if row.figure == "ms a step" and row.variant != "aim"]
    assert timed and all(row.verdict == NO_GO and row.error > row.allowed for row in timed)


class Answers:
    """Stands for a row's process: says what it is given, a time each time it is asked."""

    closed: list[str] = []

    def __init__(self, stage, variant, words, threads):
        self.stage, self.variant, self.samples = stage, variant, []
        ready = {"error": 1e-3, "allowed": 3e-3, "recorded": variant.name != "without residual_norm"}
        self.says = {
            techniques.EVERYTHING: [ready, {"ms": 5.0}, {"ms": 5.2}, {"ms": 5.1}],
            "without order_layout": [{"late": True}],
            "without linear_relu": [{"problem": "RuntimeError: no such kernel"}],
            "without folded_cross_attention": [ready | {"error": 0.5}, {"ms": 6.0}, {"ms": 6.0}, {"ms": 6.0}],
        }.get(variant.name, [ready, {"ms": 7.0}, {"ms": 7.0}, {"ms": 7.0}])

    def answer(self, seconds):
        return self.says.pop(0)

    def ask(self):
        pass

    def close(self):
        self.closed.append(self.variant.name)


def test_a_technique_is_compared_with_the_step_that_has_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(techniques, "Process", Answers)
    recorder = Recorder("techniques", tmp_path)
    techniques.techniques(recorder, replace(HERE, rehearse=False), Time(60), [1], ["combo"])
    rows = {row.variant: row for row in recorder.rows if row.subject == "stage 1"}
    assert rows[techniques.EVERYTHING].value == 5.1 and rows[techniques.EVERYTHING].verdict == GO
    assert rows["without order_layout"].verdict == LATE and rows["without order_layout"].value is None
    assert rows["without linear_relu"].verdict == NO_GO and "no such kernel" in rows["without linear_relu"].note
    assert rows["without folded_cross_attention"].verdict == NO_GO  # its gradients are wrong
    assert rows["without residual_norm"].note == "+1.900 ms beside everything, NOT recorded"
    assert rows["Inductor: combo"].note == "+1.900 ms beside everything"
    assert set(Answers.closed) == {variant.name for variant in techniques.variants(["combo"])}


@pytest.mark.parametrize("name", techniques.VARIANTS)
def test_options_of_inductor_exist(name):
    import torch._inductor.config

    with torch._inductor.config.patch(techniques.VARIANTS[name]):
        pass


def test_a_rival_that_is_wrong_or_not_here_has_no_time(tmp_path):
    def absent():
        raise RuntimeError("no such backend")

    others = {"wrong": lambda: lambda x: x * x + 1e-2, "absent": absent}
    problem = square_case(lambda x: x.square(), others).build()
    names = {name: name for name in (OURS, "wrong", "absent")}
    rows = {row.variant: row for row in compare.compare(Recorder("rivals", tmp_path), HERE, "square", problem, names)}
    assert rows[OURS].value > 0 and rows[OURS].error < 1e-6
    assert rows["wrong"].verdict == NO_GO and rows["absent"].verdict == ABSENT
    assert rows["wrong"].value is rows["absent"].value is None


def test_layouts_are_compared_by_what_a_step_takes(tmp_path, monkeypatch):
    """Four blocks each, and the indexing that order layout needs once."""

    indexing = []

    def compared(recorder, options, subject, problem, names, exact=None, *, backward=True):
        times = {"raster, ours": 100.0, "raster, gathered": 180.0, "order, FLASH": 90.0, "order, CUDNN": 120.0}
        if not backward:
            times = {"order, once a step": indexing[-1]}
        return [recorder.add(subject, name, figure="µs", value=value, verdict=GO) for name, value in times.items()]

    monkeypatch.setattr(layouts, "compare", compared)
    for once, winner in ((30.0, "order layout wins: 10 µs"), (50.0, "raster stays: 10 µs")):
        indexing.append(once)
        recorder = Recorder("layouts", tmp_path)
        layouts.layouts(recorder, HERE, Time(60))
        assert recorder.rows[-1].note == f"{winner} a step, by order, FLASH"


# ---- what only a GPU runs, on a stand-in


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """A CPU with the functions of a GPU, whose graphs replay nothing."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(Options, "device", torch.device("cpu"))
    monkeypatch.setattr(compare, "DeviceClock", kernel_clock.HostClock)
    monkeypatch.setattr(ceilings, "DeviceClock", kernel_clock.HostClock)
    for module in (kernel_bench, ceilings):  # several sets of inputs, though the device is a CPU
        monkeypatch.setattr(module, "sets_needed", lambda size, device, most=16: 3)
    return replace(HERE, gpu=True)


def test_comparisons_on_a_stand_in(stand_in_gpu, tmp_path):
    recorder = Recorder("rivals", tmp_path)
    (row,) = compare.compare(
        recorder, stand_in_gpu, "square", square_case(lambda x: x.square()).build(), {OURS: "ours"}
    )
    assert row.verdict == GO and row.value is not None
    product = step_flops.Product(16, 8, 8, "weight")
    taken, wrong = ceilings.seconds(product, 2, stand_in_gpu)
    assert len(taken) >= 5 and 0 < wrong < 1e-2


def test_a_graph_that_replays_nothing_is_no_go(stand_in_gpu, tmp_path, monkeypatch):
    """All of a stage's path on a GPU but the GPU; as many graphed steps as plain ones do not end where those do."""
    monkeypatch.setattr(
        steps, "Compiled", lambda *given, backend, **options: Compiled(*given, backend="eager", **options)
    )
    recorder = Recorder("steps", tmp_path, rehearsal=True)
    steps.steps(recorder, stand_in_gpu, Time(60), 1)
    rows = {(row.variant, row.figure): row for row in recorder.rows}
    for variant in (steps.EAGER, steps.COMPILED, steps.GRAPH):
        assert rows[variant, "ms a step"].verdict == GO and "1.00 GB" in rows[variant, "ms a step"].note
        assert rows[variant, "no host wait in 3 steps"].verdict == GO
    assert "recorded" in rows[steps.GRAPH, "ms a step"].note
    assert rows[steps.GRAPH, "4 steps are 4 plain ones"].verdict == NO_GO
    assert rows["", "profile"].verdict == ABSENT  # which leaves all else as it is


NCU = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","_forward_kernel","gpu__time_duration.sum","ns","9,120"
"0","7","python","_forward_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","41.5"
"1","7","python","_backward_kernel(float*, int)","gpu__time_duration.sum","ns","26000"
"""


def test_counters_are_read_from_what_ncu_prints():
    assert rivals.metrics(NCU) == {
        "_forward_kernel": {
            "gpu__time_duration.sum": 9120.0,
            "dram__throughput.avg.pct_of_peak_sustained_elapsed": 41.5,
        },
        "_backward_kernel": {"gpu__time_duration.sum": 26000.0},
    }
    assert rivals.metrics("==ERROR== no permission") == {}
