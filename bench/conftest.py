"""Collects the operators' benchmarks and prints their table at the end."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
from harness import kernel_rows
from harness.kernel_bench import Bench, Case, Setting
from harness.machine import ROOT, commit, cores, cpu_name
from harness.tables import slug
from harness.targets import target_csv

from spot_kernels import dispatch

# pytest's stash of the session's benchmark
_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spot_kernels")
    group.addoption(
        "--bench-csv",
        type=target_csv,
        metavar="PATH",
        help="write the rows to this file, or to a file "
        "named after GPU and versions in this folder (on a GPU: bench/results unless given)",
    )
    group.addoption("--tiny", action="store_true", help="shapes that take no time, to see that everything works")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BENCH] = Bench(Setting(gpu=torch.cuda.is_available(), tiny=config.getoption("--tiny")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each technique of each of the module's cases; those of a case follow one another."""
    if "time_it" in metafunc.fixturenames:
        setting = metafunc.config.stash[_BENCH].setting
        pairs = [(case, name) for case in metafunc.module.cases(setting) for name in case.techniques]
        # × and the like would be escaped, spaces make names that have to be quoted
        names = [
            re.sub(r"[^A-Za-z0-9.]+", "-", f"{case.operator} {case.shape} {case.dtype} {name}".replace("×", "x"))
            for case, name in pairs
        ]
        metafunc.parametrize("time_it", pairs, ids=names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shapes that aims speak of go first, scaling and the like last: a run on a GPU may be cut short."""

    def rank(item: pytest.Item) -> int:
        if not hasattr(item, "callspec") or "time_it" not in item.callspec.params:
            return 0
        case, _ = item.callspec.params["time_it"]
        aimed = any(aim.concerns(case.operator, case.shape, case.dtype) for aim in kernel_rows.AIMS)
        return 0 if aimed else 1 if kernel_rows.COMPILE in case.techniques else 2

    items.sort(key=rank)


@pytest.fixture
def time_it(request: pytest.FixtureRequest, benchmark) -> Callable[[], None]:
    """Measures one technique of one case, and fails where its numbers are wrong."""
    case: Case
    case, technique = request.param
    bench = request.config.stash[_BENCH]

    def run() -> None:
        row = bench.row(case, technique)
        _write(request.config)
        if row.failed:
            pytest.fail(row.problem, pytrace=False)
        if row.problem:
            pytest.skip(row.problem)
        benchmark.group = " · ".join(row.key)
        rounds = 1 if bench.setting.tiny else 3
        benchmark.pedantic(bench.call(technique), rounds=rounds, warmup_rounds=0 if bench.setting.tiny else 1)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[_BENCH]
    if not bench.rows:
        return
    ceilings = bench.ceilings
    products = ", ".join(f"{name} product {flops / 1e12:.3g} TFLOP/s" for name, flops in ceilings.flops.items())
    about = _about(bench)
    terminalreporter.section("operators")
    text = [
        f"{about['device']}, {about['cpu']}, {about['cores']} cores, torch {about['torch']}, triton {about['triton']}, "
        f"{about['date']}",
        f"measured ceilings: copy {ceilings.bytes / 1e9:.3g} GB/s, {products}",
        "",
        kernel_rows.table(bench.rows, ceilings),
        "",
        kernel_rows.problems(bench.rows),
        kernel_rows.aims_text(bench.rows, bench.setting.gpu),
    ]
    terminalreporter.write_line("\n".join(text))
    path = _csv(config)
    if path:
        terminalreporter.write_line(f"written to {path}")


def _write(config: pytest.Config) -> None:
    """The CSV as far as it is, so that a run that is cut short leaves its rows."""
    path = _csv(config)
    if path:
        bench = config.stash[_BENCH]
        kernel_rows.write_csv(path, _about(bench), bench.rows)


def _csv(config: pytest.Config) -> Path | None:
    bench = config.stash[_BENCH]
    path: Path | None = config.getoption("--bench-csv")
    if path is None:
        if not bench.setting.gpu or bench.setting.tiny:
            return None
        path = ROOT / "bench" / "results"
    if path.suffix != ".csv":
        about = _about(bench)
        versions = (f"{name}-{slug(about[name])}" for name in ("torch", "triton"))
        return path / ("_".join(("kernels", slug(about["device"]), *versions, about["date"])) + ".csv")
    return path


def _about(bench: Bench) -> dict[str, str]:
    """Texts for the columns `kernel_rows.ABOUT`."""
    numbers = {"copy_bytes_per_s": bench.ceilings.bytes} | {
        f"{name}_flops_per_s": flops for name, flops in bench.ceilings.flops.items()
    }
    return _machine() | {name: f"{value:.4g}" for name, value in numbers.items()}


@functools.cache
def _machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": f"{date.today()}",
        "device": device,
        "cpu": cpu_name(),
        "cores": str(cores()),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if dispatch.TRITON else "none",
        "commit": commit(),
    }
