"""Reading ahead: results in order, a bounded number begun, errors in their place, nothing left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from spot_fast.data.loading.read_ahead import read_ahead


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_the_order_of_the_items(workers):
    def slow_first(item):
        time.sleep(0.01 if item % 4 == 0 else 0)
        return item

    futures = read_ahead(slow_first, iter(range(20)), depth=5, workers=workers)
    assert [future.result() for future in futures] == list(range(20))
    assert list(read_ahead(slow_first, [], depth=5, workers=workers)) == []


def test_no_more_than_depth_are_begun_beyond_the_one_in_use():
    begun = []
    with closing(read_ahead(begun.append, range(20), depth=3, workers=2)) as futures:
        next(futures).result()
        time.sleep(0.05)
        assert begun == [0, 1, 2, 3]
    begun.clear()
    next(read_ahead(begun.append, range(20), depth=3))
    assert begun == [0]  # without threads nothing is done ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_waits_in_its_place_and_ends_nothing(workers):
    futures = read_ahead(lambda item: 1 / item, [1, 0, 2], depth=2, workers=workers)
    assert [type(future.exception()) for future in futures] == [type(None), ZeroDivisionError, type(None)]


def test_leaving_early_cancels_what_has_not_begun():
    before, begun, go = threading.active_count(), [], threading.Event()

    def wait(item):
        begun.append(item)
        go.wait(5)

    futures = read_ahead(wait, range(20), depth=9, workers=1)
    threading.Timer(0.05, go.set).start()
    next(futures)
    futures.close()
    assert len(begun) <= 2
    time.sleep(0.1)
    assert threading.active_count() == before


def test_a_pool_of_the_caller_stays_open():
    with ThreadPoolExecutor(1) as pool:
        futures = read_ahead(lambda item: item, range(20), depth=4, pool=pool)
        assert next(futures).result() == 0
        futures.close()
        assert pool.submit(int, "7").result() == 7
