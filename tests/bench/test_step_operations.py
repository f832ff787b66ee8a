"""The number of operations of a step does not grow unnoticed; how they are counted."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import step_operations
import torch
from harness.step_counts import Count, Operators, launches_of, multi_tensor_launches, of_generated
from harness.step_runs import TrainerSteps, settings, write_teacher

from paths import BENCH
from spot_kernels import dispatch

CPU = torch.device("cpu")
# Operators, products among them, of an eager step of the small model on a CPU. Smaller numbers are welcome here.
EAGER = {1: (612, 153), 2: (806, 207)}
# Operations, products among them, of a compiled step of the small model on a GPU.
COMPILED = {1: (339, 111), 2: (490, 148)}


def eager_step(stage: int, folder) -> Count:
    config = settings(stage, precision="float32", batch_size=4, tiny=True)
    teacher = write_teacher(folder / "teacher", config) if stage == 2 else None
    steps = TrainerSteps(config, CPU, teacher, cached=True)
    steps.next()  # makes the moments
    count = Count(stage, "a step")
    with Operators(count):
        steps.next()
    return count


@pytest.mark.parametrize("stage", EAGER)
def test_an_eager_step_has_no_more_operators_than_before(stage, tmp_path):
    count = eager_step(stage, tmp_path)
    operations, products = EAGER[stage]
    assert count.operations <= operations, count.names.most_common(40)
    assert count.products <= products
    assert count.operations > 0.8 * operations, "fewer: write the smaller number above"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of PyTorch for CUDA, but no GPU")
def test_a_compiled_step_has_no_more_operations_than_before(tmp_path):
    path = tmp_path / "counts.csv"
    command = [sys.executable, str(BENCH / "step_operations.py"), "--tiny", "--csv", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(path, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for stage, (operations, products) in COMPILED.items():
        of_stage = [line for line in lines if line["stage"] == str(stage)]
        assert [line["part"] for line in of_stage] == ["what it is given", "forward", "backward", "update"]
        assert sum(int(line["operations"]) for line in of_stage) <= operations
        assert sum(int(line["products"]) for line in of_stage) <= products
        assert sum(int(line["ours"]) for line in of_stage) > 0


def test_views_and_allocations_are_no_operations():
    count = Count(1, "")
    x = torch.ones(4, 6)
    with Operators(count):
        y = torch.empty(6, 4)
        z = x.t().reshape(4, 6).detach() + 1  # the reshape copies
        torch.mm(x, y, out=torch.empty(4, 4))
        z[0].mul_(2)
    assert count.names == {"clone": 1, "add": 1, "mm": 1, "mul_": 1} and count.products == 1
    # clone and add: 24 numbers read and written each; mm: 24 + 24 read, its result written as it is given; mul_: 6 both
    assert count.bytes == 4 * (48 + 48 + (48 + 2 * 16) + 12)


@pytest.mark.skipif(not dispatch.TRITON, reason="needs triton")
def test_operators_of_ours_count_by_their_launches():
    func = torch.ops.spot_kernels.permuted_causal_attention.default
    q = torch.empty(2, 6, 196, 64, dtype=torch.bfloat16)
    for backend in ("torch", "triton"):  # one operator, and its one kernel
        assert launches_of(func, (q, q, q, torch.arange(196), backend), {}) == 1


def test_lists_of_tensors_are_cut_as_pytorch_cuts_them():
    small = [torch.empty(10) for _ in range(111)]
    assert multi_tensor_launches((small, 2.0)) == 2  # 110 tensors a launch
    assert multi_tensor_launches((small[:37],) * 4) == 2  # 36 where there are four lists
    large = [torch.empty(1, 1).expand(65536, 321)]
    assert multi_tensor_launches((large, 2.0)) == 2  # 320 blocks of 65,536
    assert multi_tensor_launches((torch.ones(3), 2.0)) == 1


CODE = """
class Runner:
    def call(self, args):
        buf0 = empty_strided_cuda((4, 4), (4, 1), torch.float32)
        # Topologically Sorted Source Nodes: [x], Original ATen: [aten.mm]
        extern_kernels.mm(arg0, arg1, out=buf0)
        triton_poi_fused_add_12.run(buf0, buf1, 16, stream=stream0)
        triton_poi_fused_add_3.run(buf0, buf1, 16, stream=stream0)
        buf4 = workspace_0[0 * 4 * 4 : (0 + 1) * 4 * 4].view(4, 4).sum(dim=0)
        buf5 = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(buf4)
        del buf0
def benchmark_compiled_module(times=10, repeat=10):
    extern_kernels.mm(arg0, arg1)
"""


def test_launches_of_generated_code():
    from torch.fx import Graph

    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 4)
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    product.meta["val"] = torch.empty(4, 4)
    body = CODE[CODE.index("def call(") :].partition("def benchmark_compiled_module")[0]
    one = types.SimpleNamespace(backward=True, body=body, graph=graph, bytes=1000, peak=10)
    count = of_generated(1, one)
    attention = "_scaled_dot_product_cudnn_attention_backward"
    assert count.names == {"mm": 1, "triton_poi_fused_add": 2, "sum of partial sums": 1, attention: 3}
    assert count.part == "backward" and count.products == 1 and count.flops == 2 * 4**3 and count.bytes == 1000


def test_a_stage_is_the_sum_of_its_parts():
    parts = [Count(1, "forward", products=2, flops=3e9, bytes=5e6, peak=7e6), Count(1, "backward", bytes=1e6)]
    parts[0].add("mm", 3)
    parts[1].add("add")
    lines = step_operations.table(parts).splitlines()
    assert lines[-1] == "| **stage 1** | 4 | 5 | 0 | 3 | 6 | 7 |"
    assert "    3  mm" in step_operations.names(parts)
    assert replace(parts[0], part="x").row().gflop == 3.0


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build for CUDA")
def test_a_cpu_build_is_a_sentence(capsys):
    assert step_operations.main([]) == 2
    assert capsys.readouterr().err.startswith("error: PyTorch")


def test_without_a_compiler_there_is_a_sentence(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": f"{BENCH.parent}:{BENCH.parent / 'kernels'}"}
    command = [sys.executable, str(BENCH / "step_operations.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == "error: there is no C compiler: install gcc or clang\n"
