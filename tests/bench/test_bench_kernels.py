"""The operators' benchmark: its formulas, clocks, table and aims; that wrong numbers have no speed; GPU scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import bench_add_norm
import bench_folded_cross_attention
import bench_gru_norm
import bench_linear_relu
import bench_mask_matching
import bench_permuted_attention
import bench_shift_by_order
import bench_slot_attention
import bench_slot_cross_attention
import bench_slot_module
import kernel_table
import pytest
import torch
from harness import kernel_bench, kernel_clock, kernel_rows
from harness.kernel_bench import Bench, Setting
from harness.kernel_clock import Ceilings, DeviceClock, HostClock, Work, device_plan, interleaved
from harness.kernel_rows import COMPILE, EAGER, FLEX, OURS, SDPA, Row, duration

import spot_kernels
from paths import BENCH
from spot_kernels import dispatch
from stand_in_gpu import pretend_gpu, square_case

CEILINGS = Ceilings(1e9, {"float32": 1e12, "bfloat16": 2e12})
OPERATORS = set(
    "slot_attention_step permuted_causal_attention slot_cross_attention linear_assignment match_masks SlotAttention "
    "slot_cross_map folded_cross_attention folded_cross_map shift_by_order gru_norm add_norm linear_relu".split()
)


def test_work_by_hand():
    # 2 tokens, 3 slots, 4 channels: 8 and 12 elements of 2 bytes; 24 multiply-adds a product
    assert bench_slot_attention.work(1, 2, 3, 4, 2) == (Work(2 * (16 + 24), 96), Work(2 * (32 + 48), 240))
    maps = bench_slot_attention.work(1, 2, 3, 4, 2, maps=True)
    assert [w.bytes for w in maps] == [80 + 48, 160 + 48]  # attn and logits, 6 float32 each
    # 2 tokens see 1 + 2 tokens, so 12 multiply-adds a product; a log-sum-exp each, an order of 16 bytes
    assert bench_permuted_attention.work(1, 1, 2, 4, 2) == (Work(64 + 8 + 16, 48), Work(128 + 8 + 16, 120))
    cross = bench_slot_cross_attention.work(1, 1, 2, 3, 4, 2, with_map=True)
    assert cross == (Work(2 * (16 + 24) + 24, 96), Work(2 * (24 + 48) + 24, 240))
    assert bench_slot_cross_attention.map_work(1, 1, 2, 3, 4, 2) == (Work(40 + 24, 48), Work(80 + 24, 144))
    # 2 heads; 8, 12 and 16 elements of tokens, slots and a weight; 2 × 6 columns; 3 rows by a weight of 4 × 4
    folded = bench_folded_cross_attention.work(1, 2, 2, 3, 4, 2, with_map=True)
    assert folded == (Work(2 * (16 + 24 + 32) + 24, 192 + 192), Work(2 * (24 + 48 + 64) + 24, 768))
    assert bench_folded_cross_attention.map_work(1, 2, 2, 3, 4, 2) == Work(2 * (8 + 12 + 16) + 24, 96 + 96)
    assert bench_shift_by_order.work(1, 2, 4, 2) == (Work(32 + 16, 0),) * 2
    # 2 rows of 4: gates of 2 × 12 elements of 2 bytes a row, a state of 4 floats
    assert bench_gru_norm.work(2, 4, 2) == (Work(96 + 32 + 16 + 32, 240), Work(2 * 128 + 48, 480))
    # 10 elements of a bfloat16 stream, 24 bits of it, a float32 stream, and a LayerNorm alone
    found = [bench_add_norm.work(10, *sizes) for sizes in ((2, 2, 2, 0), (2, 2, 2, 1), (4, 2, 2, 0), (2, 0, 2, 0))]
    assert [[one.bytes for one in both] for both in found] == [[80, 80], [100, 80], [120, 160], [40, 60]]
    # 2 rows of 3 inputs and 4 outputs, weights of 12 elements: 24 multiply-adds a product
    assert bench_linear_relu.work(2, 3, 4, 2) == (Work(2 * (6 + 12 + 4 + 8), 48), Work(2 * (12 + 24 + 4 + 32), 96))
    assert bench_mask_matching.assignment_work(2, 3, 4) == Work(96 + 48, 0)
    assert bench_mask_matching.matching_work(2, 5) == Work(240, 0)
    # 1 token of 2 values, 1 slot of 1, MLP of 1 (4 bytes): k, v 8 bytes; inputs 8, slots 8
    forward, backward = bench_slot_module.work(1, 1, 1, 2, 1, 1, 4)
    assert forward == Work(16 + 4 * 8, 8 + 3 * (2 + 12 + 4) + 3 * 4)
    assert backward == Work(32 + 7 * 8, 2 * (8 + 54) + 2.5 * 12)


def test_every_gpu_shape_of_the_plan_is_there():
    cases = kernel_bench.all_cases(Setting(gpu=True))
    shapes = {(case.operator, case.shape) for case in cases}
    for operator, shape in [
        ("slot_attention_step", "SPOT 64×196 K7 d256"),
        ("slot_attention_step", "COCO high resolution 16×1024 K7 d256"),
        ("slot_attention_step", "MOVi-E 64×196 K24 d256"),
        ("slot_attention_step", "image-level 8×16384 K11 d64"),
        ("slot_attention_step", "N 8×16384 K7 d256"),
        ("slot_attention_step", "K 64×196 K64 d256"),
        ("permuted_causal_attention", "decoder 64×6 heads 196 d128"),
        ("slot_cross_attention", "decoder, map 64×6 heads 196 K7 d128"),
        ("slot_cross_map", "teacher 64×6 heads 196 K7 d128"),
        ("folded_cross_attention", "decoder 64×6 heads 196 K7 D768"),
        ("folded_cross_map", "teacher 64×6 heads 196 K7 D768"),
        ("shift_by_order", "decoder 64×196 D768"),
        ("gru_norm", "SPOT 64×K7 U256"),
        ("add_norm", "24 bits 64×196 D768"),
        ("linear_relu", "decoder FFN 64×196 768 to 3072"),
        ("linear_relu", "slots 64×7 256 to 1024"),
        ("linear_assignment", "64 of 7×7"),
        ("linear_assignment", "64 of 300×100"),
        ("match_masks", "SPOT 64×196 K7"),
        ("SlotAttention", "SPOT 64×196 K7 D768 U256"),
    ]:
        assert (operator, shape) in shapes
    floors = kernel_table.floors(cases, kernel_table.H200)
    # 13.3 MB at 4.3 TB/s
    assert "| SPOT 64×196 K7 d256 | bfloat16 | 13.3 | 0.08992 | 3.09 µs |" in floors
    # every aim speaks of a row that is measured, with the technique it is compared with
    for aim in kernel_rows.AIMS:
        (measured,) = [case for case in cases if aim.concerns(case.operator, case.shape, case.dtype)]
        assert OURS in measured.techniques and (not aim.than or aim.than in measured.techniques)


@pytest.mark.parametrize("setting", [Setting(True), Setting(False), Setting(False, tiny=True)])
def test_shapes_are_told_apart_by_their_labels(setting):
    keys = [(case.operator, case.shape, case.dtype) for case in kernel_bench.all_cases(setting)]
    assert len(set(keys)) == len(keys)


def test_cpu_shapes_say_where_they_are_smaller():
    cases = kernel_bench.all_cases(Setting(gpu=False))
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "bf16 autocast", "int64"}
    assert "decoder 8 of 64×6 heads 196 d128" in {case.shape for case in cases}
    assert kernel_bench.sizes("SPOT", 64, 64, "196 K7") == "SPOT 64×196 K7"
    assert not any(FLEX in case.techniques for case in cases)


# ---- clocks


def test_floor_is_the_slower_side():
    assert CEILINGS.floor(Work(1e9, 1e11), "float32") == (1.0, "bytes")
    assert CEILINGS.floor(Work(1e9, 4e12), "bf16 autocast") == (2.0, "flops")
    assert CEILINGS.floor(Work(1e9, 0), "int64") == (1.0, "bytes")


def test_device_plan_hides_the_host():
    slow_host = device_plan(enqueued=400e-6, whole=420e-6)
    assert slow_host.calls == 8  # what the queue holds: 100 launches a call
    assert slow_host.cycles / 2.1e9 > 8 * 400e-6
    assert device_plan(5e-6, 10e-6).calls == 50
    assert device_plan(20e-3, 50e-3).calls == 1
    assert device_plan(100e-6, 2e-3).calls == 3  # about 5 ms


def test_device_clock_sleeps_first(monkeypatch):
    """With a stand-in for the device: a sample is sleep, event, calls, event."""
    happened = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, stop):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(cycles), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock, given = DeviceClock(), []
    plan = clock.plan(given.append)
    assert given == [0, 1, 2, 0, 1, 2] and plan.calls >= 1
    seconds = clock.sample(lambda i: happened.append(f"call {i}"), kernel_clock.Plan(3, 77, 0.0))
    assert seconds == pytest.approx(0.002)
    assert happened == [77, "event", "call 0", "call 1", "call 2", "event"]


def test_techniques_take_turns():
    class Clock:
        order: list[str] = []

        def plan(self, call):
            return kernel_clock.Plan(1, 0, {"slow": 10.0, "fast": 0.1}[call(0)])

        def sample(self, call, plan):
            self.order.append(call(0))
            return float(len(self.order))

    clock = Clock()
    times = interleaved(clock, {"slow": lambda i: "slow", "fast": lambda i: "fast"}, seconds=0.5, least=3, most=30)
    assert clock.order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "fast"]
    assert times == {"slow": 4.0, "fast": 6.0}  # medians of 1, 4, 5 and of 2, 3, 6, 7, 8
    host, asleep = HostClock(), lambda i: time.sleep(0.002)
    assert host.plan(asleep).calls == 1 and host.sample(asleep, host.plan(asleep)) >= 2e-3


def test_spread_is_of_the_middle_six_of_ten():
    assert kernel_clock.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == kernel_clock.Spread(3.5, 2.0, 5.0)
    assert kernel_clock.spread([2.0]) == kernel_clock.Spread(2.0, 2.0, 2.0)


# ---- table


def rows() -> list[Row]:
    about = {"operator": "slot_attention_step", "shape": "SPOT 64", "dtype": "bfloat16", "output_error": 0.001}
    about |= {"forward_bytes": 1e6, "both_bytes": 3e6, "forward_flops": 1e6, "both_flops": 3e6}
    not_run = about | {"output_error": None}
    return [
        Row(technique=OURS, backend="triton", forward_s=2e-3, both_s=4e-3, peak_bytes=2**21, **about),
        Row(technique=EAGER, forward_s=6e-3, both_s=20e-3, **about),
        Row(technique=COMPILE, forward_s=3e-3, both_s=12e-3, **about),
        Row(technique=SDPA, **not_run, problem="FAILED: output 0: error 1, allowed 0.1"),
        Row(technique=FLEX, **not_run, problem="not here: no compiler"),
    ]


def test_table():
    lines = kernel_rows.table(rows(), CEILINGS).splitlines()
    assert lines[0] == "slot_attention_step"
    cells = [" ".join(line.split()) for line in lines]
    # 1 MB in 2 ms: 0.5 GB/s of 1; 3 MB in 4 ms
    ours = "ours (triton) 2.00 ms 4.00 ms – 1.00, 1.00 0.50 GB/s 50 % 0.75 GB/s 75 % 2.0 1.0e-03 –"
    assert cells[2] == f"SPOT 64 bfloat16 {ours}"
    assert cells[4].startswith("torch.compile 3.00 ms 12.0 ms – 1.50, 3.00 ")
    assert cells[5:] == ["SDPA FAILED FAILED", "FlexAttention – –"]
    again = [*rows(), replace(rows()[1], operator="other"), *rows()[:2]]
    assert [line for line in kernel_rows.table(again, CEILINGS).splitlines() if " " not in line and line] == [
        "slot_attention_step",
        "other",
    ]
    assert len({line.index("torch.compile" if "torch" in line else "eager") for line in lines[3:5]}) == 1
    assert kernel_rows.problems(rows()).splitlines()[1].endswith("FlexAttention: not here: no compiler")
    uncaptured = replace(rows()[0], not_captured="RuntimeError: it waits for the device")
    assert kernel_rows.problems([uncaptured]).endswith("no graph: RuntimeError: it waits for the device")


def test_a_table_from_before_a_column_existed_is_read():
    about, old = kernel_rows.read_csv(BENCH / "results" / "kernels_cpu_2026-11-25.csv")
    assert about["device"] == "cpu" and old and not any(row.not_captured for row in old)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (3.086e-6, "3.09 µs"),
        (99.96e-6, "100 µs"),
        (999.7e-6, "1.00 ms"),
        (0.0123, "12.3 ms"),
        (0.9996, "1.00 s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_aims():
    spot, image, *_, assignments = kernel_rows.AIMS
    assert kernel_rows.judge(spot, rows()) == (True, "3.00 × (4.00 ms, torch.compile 12.0 ms)")
    assert kernel_rows.judge(image, rows()) == (None, "not measured")
    slower = [replace(row, both_s=11e-3) if row.technique == COMPILE else row for row in rows()]
    assert kernel_rows.judge(spot, slower)[0] is False
    ours, *others = rows()
    wrong = replace(ours, both_s=None, forward_s=None, problem="FAILED: x")
    assert kernel_rows.judge(spot, [wrong, *others]) == (False, "ours FAILED")
    problem = Row("linear_assignment", "64 of 7×7", "float32", OURS, forward_s=19e-6)
    assert kernel_rows.judge(assignments, [problem])[0]
    assert not kernel_rows.judge(assignments, [replace(problem, forward_s=21e-6)])[0]
    assert kernel_rows.aims_text(rows(), gpu=True).count("????") == 5


def test_native_aim_is_the_worst_row():
    native = [replace(row, backend="native" if row.technique == OURS else "") for row in rows()]
    ((passed, _, detail),) = kernel_rows.native_aims(native)
    assert passed and detail == "least 5.00 × (SPOT 64 bfloat16)"
    close = [replace(row, dtype="float32", both_s=5e-3 if row.technique == EAGER else row.both_s) for row in native]
    ((passed, _, detail),) = kernel_rows.native_aims(native + close)
    assert not passed and detail == "least 1.25 × (SPOT 64 float32)"


def test_csv_there_and_back(tmp_path):
    path = tmp_path / "kernels.csv"
    about = dict.fromkeys(kernel_rows.ABOUT, "1") | {"device": "NVIDIA H200"}
    kernel_rows.write_csv(path, about, rows())
    about_read, back = kernel_rows.read_csv(path)
    assert about_read == about and kernel_rows.table(back, CEILINGS) == kernel_rows.table(rows(), CEILINGS)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a result"):
        kernel_rows.read_csv(path)
    assert kernel_table.main(["--table", str(path)]) == 2


# ---- right or wrong


def test_wrong_results_have_no_speed():
    bench = Bench(Setting(gpu=False, tiny=True))
    good = square_case(lambda x: x.square())
    assert bench.row(good, OURS).both_s > 0 and bench.row(good, OURS).output_error < 1e-6
    for wrong in (
        lambda x: x * x + 1e-5,  # outputs
        lambda x: (x * x).detach() + x - x.detach(),  # gradients
        lambda x: x * x * float("nan"),
    ):
        row = bench.row(square_case(wrong), OURS)
        assert row.failed and row.forward_s is None and row.both_s is None
        assert "FAILED" in kernel_rows.table([row], CEILINGS)

    def broken(x):
        raise RuntimeError("illegal memory access")

    def absent():
        raise RuntimeError("no compiler\nhere")

    # another order of summation is no mistake of PyTorch's, something else is
    near, far = (lambda: lambda x: x * x + 1e-6), (lambda: lambda x: x * x + 1e-4)
    row = bench.row(square_case(lambda x: x * x, {SDPA: near, FLEX: far}), SDPA)
    assert not row.failed and row.output_error > 1e-7 and row.both_s > 0
    assert bench.rows[-1].technique == FLEX and bench.rows[-1].failed
    row = bench.row(square_case(broken), OURS)
    assert row.problem == "FAILED: RuntimeError: illegal memory access"
    row = bench.row(square_case(lambda x: x.square(), {COMPILE: absent}), COMPILE)
    assert not row.failed and row.problem == "not here: RuntimeError: no compiler"


def test_ours_shows_the_backend_that_ran():
    bench = Bench(Setting(gpu=False, tiny=True))
    (first, *_) = bench_slot_attention.cases(bench.setting)
    with dispatch.use_backend("torch"):
        assert bench.row(first, OURS).backend == "torch"
    assert bench.row(first, EAGER).backend == ""
    cost = torch.rand(1, 2, 2)
    with kernel_bench.Backends() as backends:
        spot_kernels.linear_assignment(cost)
    chosen = dispatch.chosen_backend("linear_assignment", cost)
    assert backends.found.get("linear_assignment", "torch") == chosen


def test_gpu_path_with_a_stand_in(monkeypatch):
    """Queue, sets of inputs, memory and graph, on a CPU with the functions of a GPU."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(Setting, "device", torch.device("cpu"))
    bench = Bench(Setting(gpu=True, tiny=True))
    bench.clock, bench.ceilings = DeviceClock(), CEILINGS
    square = replace(square_case(lambda x: x * x), waiting=(EAGER,))
    row = bench.row(square, OURS)
    assert row.both_s > 0 and row.peak_bytes == 10**9 - 100 and row.graph_s >= 0
    assert bench.rows[1].technique == EAGER and bench.rows[1].graph_s is None
    # an argument of 80 bytes, a cache of 100
    assert kernel_bench.sets_needed(80, torch.device("cuda")) == 3
    monkeypatch.setattr(kernel_bench, "sets_needed", lambda size, device: 3 if size == 80 else 1)
    assert len(kernel_bench.input_sets(square.build(), bench.device)) == 3
    bench.call(OURS)()


def test_no_graph_outlives_an_evaluation():
    """A leaf's node that is kept belongs to the stream it was made on, and breaks captures on another one."""
    x = torch.randn(3, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    results = kernel_bench.evaluate(lambda x: (x * weight, None), (x,), (weight,), [torch.ones(3).bfloat16()])
    assert not any(t.requires_grad for t in (*results.outputs, *results.gradients))
    torch.testing.assert_close(results.gradients, (weight.detach(), x.detach()))
    assert x.grad is None and x.requires_grad


def test_a_capture_that_fails_leaves_the_stream_and_says_why(monkeypatch):
    """As PyTorch's context does: it raises a second error at its end, and does not leave its stream."""
    pretend_gpu(monkeypatch)
    set_to, calls, broken = [], [], [True]

    class Capture:
        def __init__(self, graph, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            pass

        def __exit__(self, *exception):
            if exception[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    def call(i):
        calls.append(i)
        if len(calls) > 4 and broken[0]:
            raise ValueError("waits for the device")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "set_stream", set_to.append)
    assert kernel_clock.captured(call, 2) == (None, "ValueError: waits for the device")
    assert calls == [0, 1, 0, 0, 1] and len(set_to) == 1
    broken[0] = False
    replay, why = kernel_clock.captured(call, 2)
    assert why == "" and len(set_to) == 2
    replay(0)


def test_assignment_must_be_optimal():
    problem = bench_mask_matching.assignment_problem(3, 4, 4, torch.device("cpu"))
    inputs = problem.inputs(0)
    best = kernel_bench.evaluate(problem.exact, inputs)
    assert problem.check(best, best, best) == (0.0, None)
    worse = kernel_bench.Results((best.outputs[0].flip(0),), ())
    with pytest.raises(AssertionError, match="above the least"):
        problem.check(worse, best, best)
    with pytest.raises(AssertionError, match="one-to-one"):
        problem.check(kernel_bench.Results((torch.zeros_like(best.outputs[0]),), ()), best, best)


def environment(**more: str) -> dict[str, str]:
    """One thread, because the tests share their cores, and no sign of pytest-xdist, which would disable benchmarks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".:kernels", **more}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=BENCH.parent, env=environment, capture_output=True, text=True)


# Runs pytest with an operator that is one percent off.
OFF = """
import sys, pytest, spot_kernels
right = spot_kernels.slot_attention_step
def off(*args, **kwargs):
    updates, attn, logits = right(*args, **kwargs)
    return updates * 1.01, attn, logits
spot_kernels.slot_attention_step = off
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_wrong_operator_fails_the_benchmark():
    words = ["bench/bench_slot_attention.py", "--benchmark-only", "--tiny", "-q", "-p", "no:cacheprovider"]
    done = run([sys.executable, "-c", OFF, *words], environment())
    assert done.returncode == 1, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("measured ceilings") :]
    (ours, *_) = [line for line in table.splitlines() if " ours " in line]
    assert "FAILED" in ours and " µs" not in ours and " ms" not in ours
    assert "2 failed, 2 passed" in done.stdout


# ---- every bench, the scripts and the sweep


@pytest.fixture(scope="module")
def tiny_bench(tmp_path_factory):
    """All operators' benches at sizes that take no time: what was printed, and the folder of its CSV."""
    out = tmp_path_factory.mktemp("bench")
    words = "-m pytest bench --benchmark-only --benchmark-quiet --tiny -q -p no:cacheprovider --bench-csv".split()
    done = run([sys.executable, *words, str(out)], environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


@pytest.mark.slow
def test_every_bench_runs_at_tiny_size(tiny_bench, capsys):
    printed, out = tiny_bench
    (path,) = out.glob("kernels_*_torch-*_triton-*.csv")
    about, measured = kernel_rows.read_csv(path)
    assert {row.operator for row in measured} >= OPERATORS
    assert not [row for row in measured if row.failed]
    assert about["torch"] == torch.__version__ and float(about["copy_bytes_per_s"]) > 0
    assert "PASS" in printed or "FAIL" in printed or not dispatch.NATIVE
    # the table again, from the file
    assert kernel_table.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.split("\n\n")[0] in printed


def test_gpu_script_runs_a_part(tmp_path):
    folders = {name: str(tmp_path / name.lower()) for name in ("OUT", "STORE", "GPU")}
    more = folders | {"QUICK": "1", "PYTHON": sys.executable, "DEVICE": "cpu", "WORKERS": "0"}
    done = run(["bash", str(BENCH / "gpu_check.sh"), "correct"], environment(**more))
    assert done.returncode == 0 and "correct: exit code 0" in done.stdout, done.stdout + done.stderr
    assert "passed" in (tmp_path / "out" / "tests_gpu.txt").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["kernel"], "unknown part kernel: use correct, techniques, tiles, growth, decoding, scenes, photos"),
        ([], "say which part: correct, techniques, tiles, growth, decoding, scenes, photos"),
    ],
)
def test_gpu_script_knows_its_parts(words, message, tmp_path):
    more = {"OUT": str(tmp_path / "out"), "STORE": str(tmp_path / "store"), "PYTHON": "true"}
    done = run(["bash", str(BENCH / "gpu_check.sh"), *words], environment(**more))
    assert done.returncode == 2 and f"error: {message}" in done.stderr


interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs Triton's interpreter")


@interpreted
def test_sweep_reaches_the_launches():
    """Each sweep finds its function, and each of the fields that it changes arrives at a launch."""
    import sweep

    from spot_kernels.gpu.launch import recording

    def launches(entry, change):
        problem = sweep.shapes(entry, Setting(gpu=False, tiny=True))[0].build()
        with recording("sm_90") as calls, sweep.changed(entry, change):
            kernel_bench.evaluate(problem.techniques[OURS](), problem.inputs(0), problem.parameters)
        return [(call.kernel.__name__, call.grid, call.constants, call.num_warps, call.num_stages) for call in calls]

    for entry in sweep.SWEEPS:
        assert launches(entry, None), entry.title
        for name, values in entry.grid.items():
            if name not in ("number", "programs"):  # a tiny shape has nothing to split, nor rows for as many programs
                assert launches(entry, {name: values[0]}) != launches(entry, {name: values[-1]}), (entry.title, name)


@interpreted
def test_sweep_prints_the_best(capsys, monkeypatch):
    import sweep

    few = replace(sweep.SWEEPS[0], operator="slot_cross_attention", grid={"block_n": (16, 64)}, only={})
    few = replace(few, function="slot_cross_attention._forward_config")
    monkeypatch.setattr(sweep, "SWEEPS", (few,))
    assert sweep.main(["--tiny", "--only", "slot_cross"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("slot_cross_attention._forward_config · tiny")
    assert "table" in lines[1] and "block_n=32" in lines[1] and len(lines) == 4
    assert sweep.main(["--tiny", "--minutes", "0"]) == 3
    capsys.readouterr()
    assert sweep.main(["--tiny", "--shape", "SPOT"]) == 0 and not capsys.readouterr().out
