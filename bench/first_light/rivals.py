"""The other kernels in a replayed graph beside what torch.compile makes of plain PyTorch, and two of them under ncu.

    python bench/first_light/rivals.py [--rehearse]
    python bench/first_light/rivals.py --warm            compiles the rivals, keeps them on disk, ends
    python bench/first_light/rivals.py --once OPERATOR   a few calls of ours, for ncu

Forward and backward at SPOT's shapes, cold caches, medians with p20 and p80, and how many times as long torch.compile
takes. ncu, where it is installed, reads how busy memory and multiprocessors are.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

from compare import compare, fresh_compiler
from record import ABSENT, GO, LATE, Options, Recorder, Time, parser, run

import torch  # isort: skip
from bench_slot_module import OURS_COMPILED
from harness.kernel_bench import Case, Setting, all_cases, evaluate
from harness.kernel_rows import COMPILE, OURS

# Operator and the beginning of its shape.
WANTED = {
    "slot_attention_step": "SPOT 64",
    "slot_cross_attention": "decoder, map",
    "slot_cross_map": "teacher",
    "folded_cross_attention": "decoder",
    "gru_norm": "SPOT",
    "add_norm": "24 bits",
    "linear_relu": "decoder FFN",
    "shift_by_order": "decoder",
    "match_masks": "SPOT",
    "linear_assignment": "64 of 7",
    "SlotAttention": "SPOT",
}
# What ncu looks at, and the kernels of it.
COUNTED = {"slot_attention_step": "_forward_kernel|_backward_kernel", "permuted_causal_attention": "_forward|_backward"}
_METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of multiprocessors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
}
_NCU_SECONDS = 40.0


def cases(options: Options) -> list[Case]:
    """One case an operator, in bfloat16 where there is one."""
    every, found = all_cases(Setting(options.gpu, tiny=options.rehearse)), []
    for operator, shape in WANTED.items():
        fitting = [case for case in every if case.operator == operator]
        fitting.sort(key=lambda case: (not case.shape.startswith(shape), case.dtype == "float32"))
        found.append(fitting[0])
    return found


def rivals(recorder: Recorder, options: Options, time: Time) -> None:
    for case in cases(options):
        if time.left < 5:
            recorder.add(case.operator, case.shape, verdict=LATE)
            continue
        names = {technique: technique for technique in (OURS, OURS_COMPILED, COMPILE) if technique in case.techniques}
        with fresh_compiler():
            rows = compare(
                recorder,
                options,
                f"{case.operator}, {case.shape}",
                case.build(),
                names,
                backward=case.backward is not None,
            )
        times = {row.variant: row.value for row in rows if row.value is not None}
        for name in {OURS, OURS_COMPILED} & times.keys() if COMPILE in times else ():
            recorder.add(
                f"{case.operator}, {case.shape}",
                name,
                figure="× as fast as torch.compile",
                value=times[COMPILE] / times[name],
            )
    for name in COUNTED:
        if options.rehearse:
            recorder.add("ncu", name, verdict=ABSENT, note="there is no GPU to count on")
        else:
            count(recorder, name, time)


# ---- ncu


def command_of(name: str) -> list[str]:
    return [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--kernel-name",
        f"regex:{COUNTED[name]}",
        "--launch-skip",
        "6",
        "--launch-count",
        "6",
        "--metrics",
        ",".join(_METRICS),
        sys.executable,
        __file__,
        "--once",
        name,
    ]


def count(recorder: Recorder, name: str, time: Time) -> None:
    if shutil.which("ncu") is None:
        recorder.add("ncu", name, verdict=ABSENT, note="ncu is not installed")
        return
    try:
        done = subprocess.run(
            command_of(name), capture_output=True, text=True, timeout=max(1.0, min(_NCU_SECONDS, time.left - 2))
        )
    except subprocess.TimeoutExpired:
        recorder.add("ncu", name, verdict=LATE)
        return
    found = metrics(done.stdout)
    if not found:
        recorder.add("ncu", name, verdict=ABSENT, note=" ".join((done.stdout + done.stderr).split())[-200:])
    for kernel, values in found.items():
        text = ", ".join(f"{values[metric]:.0f} {unit}" for metric, unit in _METRICS.items() if metric in values)
        recorder.add("ncu", f"{name}: {kernel}", verdict=GO, note=text)


def metrics(text: str) -> dict[str, dict[str, float]]:
    """Kernel → metric → value of its last launch, from ncu's CSV."""
    begin = text.find('"ID"')
    found: dict[str, dict[str, float]] = {}
    if begin >= 0:
        for line in csv.DictReader(io.StringIO(text[begin:])):
            try:
                value = float(line["Metric Value"].replace(",", ""))
                found.setdefault(line["Kernel Name"].partition("(")[0], {})[line["Metric Name"]] = value
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
    return found


def once(name: str, options: Options) -> None:
    """A few calls of ours at the shape of the comparison, forward and backward."""
    every = all_cases(Setting(options.gpu, tiny=options.rehearse))
    case = next(case for case in every if case.operator == name and case.dtype != "float32")
    problem = case.build()
    function = problem.techniques[OURS]()
    for seed in range(6):
        evaluate(function, problem.inputs(seed), problem.parameters)
    if options.gpu:
        torch.cuda.synchronize()


def warm(options: Options) -> None:
    """Compiles the rivals, forward and backward; torch keeps them on disk."""
    for case in cases(options):
        if COMPILE in case.techniques:
            torch._dynamo.reset()
            problem = case.build()
            evaluate(problem.techniques[COMPILE](), problem.inputs(0), problem.parameters)


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--warm", action="store_true", help="only compile")
    words.add_argument("--once", metavar="OPERATOR", help="a few calls of an operator, nothing else")
    args = words.parse_args()
    chosen = Options(torch.cuda.is_available(), args.rehearse, args.out, args.seconds)
    if args.once or args.warm:
        sys.exit(once(args.once, chosen) if args.once else warm(chosen))
    sys.exit(run("rivals", rivals, args))
