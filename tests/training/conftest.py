import pytest

from tiny_runs import tiny, train


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a finished stage-1 run of `tiny()`."""
    return train(tmp_path_factory.mktemp("teacher"), tiny(eval_images=0))[0]
