"""Threads of a command on a machine that other programs use too."""

import threading
import time
import types

import pytest
import torch

from spot_fast.system import cpu_threads
from spot_fast.system.cpu_threads import CpuThreads, available_cores, side_by_side, threads_apart
from thread_count import threads


class Machine:
    """A clock, and what programs have used of its cores, as `CpuThreads` asks for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 2, threads: int = 2, tells: bool = True) -> None:
        self.now = self.own = self.others = 0.0
        self.used: list[int] = []
        self.said: list[str] = []
        monkeypatch.setattr(torch, "set_num_threads", self.used.append)
        self.threads = CpuThreads(
            threads,
            self.said.append,
            cores=cores,
            clock=lambda: self.now,
            busy_seconds=lambda: self.own + self.others if tells else None,
            own_seconds=lambda: self.own,
        )

    def run(self, seconds: float, others: float, step: float = 0.1) -> int:
        """Steps for so long beside programs that use `others` cores; the number of threads after it."""
        for _ in range(round(seconds / step)):
            self.now += step
            self.own += step * self.threads.threads
            self.others += step * others
            self.threads.adapt()
        return self.threads.threads


def test_a_core_that_another_program_takes_is_left_to_it_and_used_again(monkeypatch):
    machine = Machine(monkeypatch)
    assert machine.run(5, others=0.05) == 2
    assert machine.run(1.2, others=0.6) == 1  # two programs share a core
    assert machine.run(10, others=1.0) == 1
    assert machine.run(1.2, others=0.0) == 1  # it might come back at once
    assert machine.run(3, others=0.0) == 2
    assert machine.used == [2, 1, 2] and len(machine.said) == 1
    assert "1 of 2 threads" in machine.said[0] and "--threads 2" in machine.said[0]


def test_what_comes_and_goes_does_not_change_the_number_all_the_time(monkeypatch):
    machine = Machine(monkeypatch)
    for _ in range(20):
        machine.run(1, others=1.0)
        machine.run(1, others=0.0)
    assert machine.used == [2, 1]


@pytest.mark.parametrize(
    "cores, threads, others, expected",
    [(16, 16, 1.0, 15), (16, 16, 3.2, 13), (16, 8, 3.0, 8), (16, 16, 15.9, 1), (4, 4, 30.0, 1), (1, 1, 1.0, 1)],
)
def test_others_get_what_they_use(monkeypatch, cores, threads, others, expected):
    assert Machine(monkeypatch, cores, threads).run(3, others) == expected


def test_where_the_system_does_not_tell_nothing_changes(monkeypatch):
    machine = Machine(monkeypatch, tells=False)
    assert machine.run(5, others=1.0) == 2 and machine.used == [2] and machine.said == []


def test_computing_with_a_number_keeps_it_and_puts_back_what_was(monkeypatch):
    """Without one, threads adapt between the batches, on a CPU."""
    made = []
    threads = types.SimpleNamespace(adapt=lambda: None)
    monkeypatch.setattr(cpu_threads, "CpuThreads", lambda most, say: made.append(most) or threads)
    before = torch.get_num_threads()
    with cpu_threads.computing(3, torch.device("cpu")) as look:
        assert torch.get_num_threads() == 3 and look() is None
    with cpu_threads.computing(None, torch.device("cuda")) as look:
        assert torch.get_num_threads() == before and look() is None
    assert made == []
    with cpu_threads.computing(None, torch.device("cpu")) as look:
        assert made == [1] and look == threads.adapt
    assert torch.get_num_threads() == before


def test_own_threads_are_not_taken_for_another_program():
    """Of the real counters: this process computes on a core, and the difference is what others do."""
    busy, own = cpu_threads._busy_seconds(), time.process_time()
    if busy is None:
        pytest.skip("the system does not tell how busy its cores are")
    ended = threading.Event()
    spinning = threading.Thread(target=lambda: [None for _ in iter(ended.is_set, True)])
    spinning.start()
    time.sleep(0.5)
    ended.set()
    spinning.join()
    used, all_used = time.process_time() - own, cpu_threads._busy_seconds() - busy
    assert used > 0.1 and all_used > used - 0.1


@pytest.mark.parametrize("text, cores", [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 4)])
def test_a_container_has_its_quota(monkeypatch, tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cpu_threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cpu_threads.os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert available_cores() == cores


def test_a_container_of_the_older_kind_has_its_quota(monkeypatch, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(cpu_threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cpu_threads.os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert available_cores() == 4
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    assert available_cores() == 2


@pytest.fixture
def three_threads():
    with threads(3):
        yield


def test_calls_side_by_side_come_in_order_with_a_thread_each(three_threads):
    together = threading.Barrier(3, timeout=60)

    def call(item):
        if item < 3:
            together.wait()  # breaks unless three are on their way at once
        return item, torch.get_num_threads()

    assert list(side_by_side(call, range(7), torch.device("cpu"))) == [(item, 1) for item in range(7)]
    assert torch.get_num_threads() == 3
    assert threads_apart(torch.device("cpu")) == 3 and threads_apart(torch.device("cuda")) == 1


def test_with_one_thread_calls_run_in_their_turn():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = set(side_by_side(lambda _: threading.current_thread().name, range(3), torch.device("cpu")))
    finally:
        torch.set_num_threads(before)
    assert names == {threading.current_thread().name}


def test_an_error_side_by_side_comes_in_its_turn_and_ends_the_rest(three_threads):
    begun = []

    def call(item):
        begun.append(item)
        if item == 1:
            raise ValueError("item 1")
        return item

    results = side_by_side(call, range(100), torch.device("cpu"))
    assert next(results) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(results)
    assert len(begun) <= 6
