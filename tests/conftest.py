"""Settings of the whole suite: one thread per test (results do not depend on the machine), `torch.empty` filled with
NaN, as many processes as cores, and the check that no golden tensor was left uncompared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import golden_coverage

# Without a GPU the Triton kernels run under its interpreter, which has to be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
# Processes that tests start do not compete for the cores either.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files whose tests share no set-up: each test goes to whichever process is free, a file of any other kind to one.
_INDEPENDENT = {"test_compile_only.py"}
# Files that take the longest begin first: one that began last would keep one process busy while the others idle.
_LONGEST_FIRST = ["test_compile_only.py"]


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """No test writes into the user's cache folder."""
    os.environ["SPOT_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def fill_uninitialised_memory():
    """Memory that is read before it is written shows as NaN instead of as whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# ---- processes (pytest-xdist; without it everything runs in one)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process per core where whole folders are tested; single files and debugging sessions stay in this one."""
    option = config.option
    files_only = all(Path(argument.split("::")[0]).is_file() for argument in config.args)
    chosen = getattr(option, "numprocesses", 0) is not None or hasattr(config, "workerinput")
    if chosen or files_only or option.usepdb or option.collectonly:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1:
        option.numprocesses = min(cores, 8)
        option.dist = "loadfile"
        option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file's tests stay together, because they share fixtures, but for those of `_INDEPENDENT`."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if Path(file).name in _INDEPENDENT else file

    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


# ---- golden coverage


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(golden_coverage.Coverage(config), "golden_coverage")
