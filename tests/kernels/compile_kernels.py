"""Compiles every kernel as its launcher would launch it on a chip, without the chip: one JSON line per kernel.

    python tests/kernels/compile_kernels.py sm_90 [gfx942 …] [--only slot_attention] [--jobs 2] [--csv FILE] [--summary]
    python tests/kernels/compile_kernels.py sm_90 --bind   launches by Triton's own compiler beside ours: what differs

Another Triton than the installed one comes first on PYTHONPATH: pip install --no-deps --target DIR triton==3.6.0.
--summary prints a table instead: the largest registers, shared memory and spills of each kernel's configurations.

`compile_cases/<operator>.py` has `cases()`: pairs of a name and a function that calls the launchers on CPU tensors,
whose values do not matter. Launches that look the same to the compiler are compiled once. Must run without
TRITON_INTERPRET. Fields: Triton's version, the case, kernel, constants, options, bytes of shared memory,
spilled bytes (local memory of a thread), registers, and whether the machine code computes in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness.targets import target_file

from spot_kernels.gpu.launch import ARCHITECTURES, Call, recording

_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_TYPES |= {torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8"}
_TYPES |= {torch.uint8: "*u8", torch.bool: "*u1"}


def specialise(call: Call) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a launch, by the rules of Triton's just-in-time compiler."""
    names = call.kernel.arg_names
    constants = {(names.index(name),): value for name, value in call.constants.items()}
    signature, attributes = {}, {}
    runtime = iter(call.arguments)
    for i, name in enumerate(names):
        if (i,) in constants:
            signature[name] = "constexpr"
            continue
        value = next(runtime)
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned = True
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not call.kernel.params[i].do_not_specialize_on_alignment
        else:
            signature[name] = "fp32"
        if aligned and signature[name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(compiled, architecture: str) -> dict:
    """Registers, spilled bytes and float64 use, from the machine code."""
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        # scratch memory only: scalar registers spill to lanes of vector registers, not to memory
        registers, spilled = (
            int(re.search(rf"\.{key}:\s*(\d+)", text).group(1)) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        return {"registers": registers, "spilled": spilled, "float64": bool(re.search(r"\bv_\w+_f64", text))}
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, *spilled = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL"))
    float64 = bool(re.search(r"\.f64\b", compiled.asm["ptx"]))
    return {"registers": registers, "spilled": sum(spilled), "float64": float64}


def target_of(architecture: str):
    from triton.backends.compiler import GPUTarget

    gfx = architecture.startswith("gfx")
    return GPUTarget("hip", architecture, 64) if gfx else GPUTarget("cuda", int(architecture[3:]), 32)


def compile_call(job: tuple[str, str, int]) -> dict:
    """Compiles one launch of one case, named by its index: kernels cannot be pickled for another process."""
    architecture, case, index = job
    import triton
    from triton.compiler import ASTSource

    call = launches(architecture, case)[index]
    signature, constants, attributes = specialise(call)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
    row = {"triton": triton.__version__, "architecture": architecture, "case": case}
    row |= {"kernel": call.kernel.__name__, "constants": call.constants}
    row |= options
    source, target = ASTSource(call.kernel, signature, constants, attributes), target_of(architecture)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # any failure of the compiler is a result
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    return row | {"shared": compiled.metadata.shared} | resources(compiled, architecture)


class _Bound(Exception):
    """Ends Triton's compiler once it has specialised a launch."""


def bound(call: Call) -> tuple[dict, dict, dict]:
    """The specialisation of a launch by Triton's own just-in-time compiler, without empty attributes."""
    from triton.compiler import compiler

    specialised = []

    def stop(self, fn, signature, constexprs=None, attrs=None):
        specialised[:] = dict(signature), dict(constexprs or {}), {k: v for k, v in (attrs or {}).items() if v}
        raise _Bound

    with mock.patch.object(compiler.ASTSource, "__init__", stop), contextlib.suppress(_Bound):
        call.kernel.warmup(
            *call.arguments,
            grid=call.grid,
            num_warps=call.num_warps,
            num_stages=call.num_stages,
            enable_fp_fusion=True,
            **call.constants,
        )
    return tuple(specialised)


def bind(todo: list[tuple[str, str, int]]) -> int:
    """Compares `bound` with `specialise` for every launch, with a stand-in for the driver; how many differ."""
    from triton.runtime import driver

    class Driver:
        def __init__(self, architecture: str) -> None:
            self.target = target_of(architecture)

        def get_current_target(self):
            return self.target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    differ = 0
    for architecture, case, index in todo:
        driver.set_active(Driver(architecture))
        call = launches(architecture, case)[index]
        if bound(call) != specialise(call):
            differ += 1
            print(f"{architecture} {case} {call.kernel.__name__}: {bound(call)} differs from {specialise(call)}")
    print(f"{len(todo)} launches, {differ} differ")
    return differ


_recorded: dict[tuple[str, str], list[Call]] = {}


def launches(architecture: str, case: str) -> list[Call]:
    if (architecture, case) not in _recorded:
        module, _, name = case.partition(":")
        run = dict(importlib.import_module(f"compile_cases.{module}").cases())[name]
        with recording(architecture) as calls:
            run()
        _recorded[architecture, case] = calls
    return _recorded[architecture, case]


def jobs(architectures: list[str], only: str) -> list[tuple[str, str, int]]:
    """All launches of all cases that differ to the compiler, as (architecture, case, index)."""
    distinct, seen = [], set()
    modules = sorted(path.stem for path in (HERE / "compile_cases").glob("[!_]*.py"))
    for architecture in architectures:
        for module in modules:
            if only not in module:
                continue
            for name, _ in importlib.import_module(f"compile_cases.{module}").cases():
                case = f"{module}:{name}"
                for index, call in enumerate(launches(architecture, case)):
                    key = (architecture, call.kernel.__name__, call.num_warps, call.num_stages, repr(specialise(call)))
                    if key not in seen:
                        seen.add(key)
                        distinct.append((architecture, case, index))
    return distinct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="compile_cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--csv", type=target_file, metavar="FILE", help="write a line for every configuration")
    parser.add_argument("--summary", action="store_true", help="print a table of the kernels")
    parser.add_argument("--bind", action="store_true", help="compile nothing, compare what Triton would compile")
    options = parser.parse_args()
    todo = jobs(options.architectures, options.only)
    if options.bind:
        sys.exit(int(bind(todo) > 0))
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(compile_call, todo):
            rows.append(row)
            if not options.summary:
                print(json.dumps(row), flush=True)
    if options.csv is not None:
        write_csv(options.csv, rows)
    if options.summary:
        print(summary(rows))


_COLUMNS = (
    "triton architecture case kernel num_warps num_stages registers shared spilled float64 constants error".split()
)


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (row["architecture"], row["case"], row["kernel"], str(row))):
            constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
            writer.writerow(row | {"constants": constants})
    partial.replace(path)


def summary(rows: list[dict]) -> str:
    """Markdown: a line for each kernel of each module of cases and each chip."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        module = row["case"].partition(":")[0]
        groups.setdefault((row["architecture"], module, row["kernel"]), []).append(row)
    lines = [
        f"Triton {rows[0]['triton']}",
        "",
        "| chip | module | kernel | configurations | registers | shared memory, KiB | spilled, bytes | float64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (architecture, module, kernel), launched in sorted(groups.items()):
        cells = [architecture, module, f"`{kernel}`", str(len(launched))]
        if failed := [row for row in launched if "error" in row]:
            cells += [f"{len(failed)} do not compile", "", "", ""]
        else:
            most = {name: max(row[name] for row in launched) for name in ("registers", "shared", "spilled")}
            cells += [str(most["registers"]), f"{most['shared'] / 1024:.1f}", str(most["spilled"])]
            cells.append("yes" if any(row["float64"] for row in launched) else "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
