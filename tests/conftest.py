"""Settings of the whole suite: one thread (results do not depend on the machine), `torch.empty` filled with NaN."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run under its interpreter, which has to be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


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


# What has to go last, in this order: what compiles beside all other tests, what asks what the others compared.
_LAST = ["test_compile_only.py", "test_golden_coverage.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LAST.index(item.path.name) + 1 if item.path.name in _LAST else 0)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """The kernels compile on another core while the tests run on this one."""
    compile_only = [item for item in session.items if item.path.name == "test_compile_only.py"]
    if compile_only and len(compile_only) < len(session.items) and not session.config.option.collectonly:
        compile_only[0].module.begin(jobs=1)
