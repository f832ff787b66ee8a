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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The coverage check asks what the other tests compared: it goes last."""
    items.sort(key=lambda item: item.path.name == "test_golden_coverage.py")
