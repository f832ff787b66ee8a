"""Rows on disk: what was written is read, a killed build goes on, damage is noticed, two builders do not collide."""

import errno
import fcntl
import io
import multiprocessing
import os
import signal
import time
from unittest.mock import Mock

import numpy as np
import pytest

from spot_fast.data.__main__ import main
from spot_fast.data.caching import store as store_module
from spot_fast.data.caching.store import NotBuilt, Store, located
from spot_fast.errors import UserError


def rows(count, size=40):
    return np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)


def fill(store, data, until=None):
    with store.building() as writer:
        for row in data[writer.written : until]:
            writer.append(row, height=4, width=10)


def test_rows_come_back_also_in_another_process_of_the_same_name(tmp_path):
    data = rows(9)
    store = Store(tmp_path / "s", 9, {"kind": "test"})
    assert not store.complete and not (tmp_path / "s").exists()
    fill(store, data)
    for reader in (store, Store(tmp_path / "s", 9, {})):
        assert reader.complete and reader.nbytes == data.size
        assert np.array_equal(reader.take(np.array([8, 0, 3, 3])), data[[8, 0, 3, 3]])
        assert np.array_equal(reader.row(5), data[5])
    with store.building() as writer:
        assert writer is None


def test_a_build_goes_on_where_it_stopped(tmp_path):
    data = rows(9)
    fill(Store(tmp_path / "s", 9, {}), data, until=4)
    again = Store(tmp_path / "s", 9, {})
    assert again.written == 4 and not again.complete
    wrong = data.copy()
    wrong[:4] = 0  # the first four must not be written again
    fill(again, wrong)
    assert np.array_equal(again.take(np.arange(9)), data)


@pytest.mark.parametrize("loss", ["a row's end", "an index line's end", "a bit of the last row"])
def test_what_a_power_failure_took_is_written_again(tmp_path, loss):
    data = rows(9)
    fill(Store(tmp_path / "s", 9, {}), data, until=6)
    name, keep = {
        "a row's end": ("rows.bin", 5 * 40 + 11),
        "an index line's end": ("index.bin", 5 * 32 + 9),
        "a bit of the last row": ("rows.bin", None),
    }[loss]
    file = tmp_path / "s" / name
    content = bytearray(file.read_bytes())
    if keep is None:
        content[-1] ^= 1
    file.write_bytes(content[:keep])
    store = Store(tmp_path / "s", 9, {})
    fill(store, data)
    assert np.array_equal(store.take(np.arange(9)), data)


def test_damage_is_an_error_that_names_the_folder(tmp_path):
    fill(Store(tmp_path / "s", 9, {}), rows(9))
    file = tmp_path / "s" / "rows.bin"
    content = bytearray(file.read_bytes())
    content[3 * 40 + 7] ^= 64
    file.write_bytes(content)
    store = Store(tmp_path / "s", 9, {})
    store.take(np.array([2, 4]))
    with pytest.raises(UserError, match=r"/s is damaged \(row 3 differs from its checksum\): delete that folder"):
        store.take(np.array([2, 3]))
    file.write_bytes(content[:100])
    with pytest.raises(UserError, match="rows.bin is shorter than its index says"):
        Store(tmp_path / "s", 9, {})
    file.unlink()
    with pytest.raises(UserError, match="rows.bin is shorter than its index says"):
        Store(tmp_path / "s", 9, {})
    (tmp_path / "s" / "corrupt.json").write_text('{"1": ["a.jp')
    with pytest.raises(UserError, match=r"corrupt\.json cannot be read"):
        Store(tmp_path / "s", 9, {})


def test_corrupt_images_keep_label_and_reason(tmp_path):
    store = Store(tmp_path / "s", 3, {})
    with store.building() as writer:
        writer.append(rows(1)[0])
        writer.append(np.zeros(0, np.uint8), corrupt=("b.jpg", "is cut off"))
    again = Store(tmp_path / "s", 3, {})
    assert again.corrupt == {1: ("b.jpg", "is cut off")}
    fill(again, rows(3))
    assert again.complete and again.corrupt == {1: ("b.jpg", "is cut off")} and len(again.row(1)) == 0


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    """Old archives have names in Latin-1, which Python reads as lone surrogates."""
    name = os.fsdecode(b"caf\xe9.jpg")
    with Store(tmp_path / "s", 1, {"data": name}).building() as writer:
        writer.append(np.zeros(0, np.uint8), corrupt=(name, f"{name} is cut off"))
    assert Store(tmp_path / "s", 1, {}).corrupt == {0: (name, f"{name} is cut off")}


def with_corrupt(folder, data, row, size):
    """A complete store in which `row` is a corrupt image's, of so many bytes."""
    store = Store(folder, len(data), {})
    with store.building() as writer:
        for number, content in enumerate(data):
            if number == row:
                writer.append(np.zeros(size, np.uint8), corrupt=("b.jpg", "Input/output error"))
            else:
                writer.append(content, height=4, width=10)
    return store


@pytest.mark.parametrize("size", [40, 0])
def test_a_corrupt_row_is_replaced_alone(tmp_path, size):
    """In place, or behind all others where it had no bytes."""
    data = rows(9)
    store = with_corrupt(tmp_path / "s", data, 3, size)
    earlier = Store(tmp_path / "s", 9, {})
    store.refill([(3, data[3], 4, 10), (5, data[0], 4, 10)])  # 5 is not corrupt
    for reader in (store, Store(tmp_path / "s", 9, {})):
        assert not reader.corrupt and all(np.array_equal(reader.row(row), data[row]) for row in range(9))
    assert list(earlier.corrupt) == [3] and np.array_equal(earlier.row(4), data[4])
    assert (tmp_path / "s" / "corrupt.json").read_text() == "{}"


@pytest.mark.parametrize("place", ["the row", "its line", "the words"])
def test_a_replacement_that_fails_leaves_a_store_that_is_read(tmp_path, monkeypatch, place):
    data, calls = rows(9), []
    store = with_corrupt(tmp_path / "s", data, 3, 40)
    fails_at = {"the row": 1, "its line": 2, "the words": 3}[place]
    write = store_module._write

    def fails(file, content):
        calls.append(None)
        if len(calls) == fails_at:
            file.write(memoryview(content)[:5])
            raise OSError(errno.EIO, "Input/output error")
        write(file, content)

    monkeypatch.setattr(store_module, "_write", fails)
    if place == "the words":
        monkeypatch.setattr(Store, "_write_corrupt", lambda store: fails(None, b"") if calls.append(None) else None)
        store.refill([(3, data[3], 4, 10)])
    else:
        with pytest.raises(NotBuilt, match="Input/output error"):
            store.refill([(3, data[3], 4, 10)])
    again = Store(tmp_path / "s", 9, {})
    assert list(again.corrupt) == ([] if place == "the words" else [3]) and again.complete
    assert np.array_equal(again.take(np.array([0, 4, 8])), data[[0, 4, 8]])
    again.check(np.arange(9))  # the row of a corrupt image has no checksum to keep


class Others:
    """What another user's files do to this one: `lock` and rows may be read and not written, or nothing at all."""

    def __init__(self, monkeypatch, folder, readable=True):
        real_open, real_access, real_stat = os.open, os.access, os.stat

        def inside(path):
            return str(path).startswith(str(folder))

        def refuse(refused):
            if refused:
                raise PermissionError(errno.EACCES, "Permission denied")

        def opened(path, flags, *mode, **options):
            refuse(inside(path) and (flags & (os.O_RDWR | os.O_CREAT) or not readable))
            return real_open(path, flags, *mode, **options)

        def stat(path, **options):
            refuse(inside(path) and path != folder and not readable)
            return real_stat(path, **options)

        def access(path, mode):
            return real_access(path, mode) and not (inside(path) and mode & os.W_OK)

        for name, function in (("open", opened), ("stat", stat), ("access", access)):
            monkeypatch.setattr(os, name, function)


def test_a_complete_store_that_may_only_be_read(tmp_path, monkeypatch):
    data = rows(9)
    fill(located(tmp_path, "s", 9, {}), data)
    Others(monkeypatch, tmp_path / "s")
    store = located(tmp_path, "s", 9, {})
    assert store.folder == tmp_path / "s"
    with store.building() as writer:
        assert writer is None
    assert np.array_equal(store.take(np.arange(9)), data)


@pytest.mark.parametrize("readable", [True, False])
def test_what_another_user_keeps_incomplete_or_private_is_built_beside_it(tmp_path, monkeypatch, readable):
    data, said = rows(9), []
    fill(located(tmp_path, "s", 9, {}), data, until=4)
    before = (tmp_path / "s" / "index.bin").read_bytes()
    with monkeypatch.context() as patch:
        Others(patch, tmp_path / "s", readable)
        store = located(tmp_path, "s", 9, {})
        assert store.folder == tmp_path / f"s-user{os.getuid()}"
    with store.building(said.append) as writer:
        for row in data:
            writer.append(row)
    assert said == [f"the cache {tmp_path / 's'} is another user's and cannot be used: {store.folder.name} is built"]
    assert np.array_equal(store.take(np.arange(9)), data)
    assert (tmp_path / "s" / "index.bin").read_bytes() == before


def test_what_another_user_is_building_is_waited_for(tmp_path, monkeypatch):
    """His lock can be read: the store is complete when he has done."""
    data = rows(9)
    fill(located(tmp_path, "s", 9, {}), data, until=4)
    lock = os.open(tmp_path / "s" / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    Others(monkeypatch, tmp_path / "s")
    store = located(tmp_path, "s", 9, {})
    assert store.folder == tmp_path / "s"
    monkeypatch.undo()

    def finish(text):
        assert "another process builds" in text
        os.close(lock)
        fill(Store(tmp_path / "s", 9, {}), data)

    with store.building(finish) as writer:
        assert writer is None
    assert np.array_equal(store.take(np.arange(9)), data)


@pytest.mark.parametrize("missing", ["locks", "memory mapping", "truncation", "fsync"])
def test_file_systems_that_lack_something(tmp_path, monkeypatch, missing):
    data = rows(9)

    def refused(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    class NoTruncation(io.FileIO):
        truncate = refused

    if missing == "locks":
        monkeypatch.setattr(fcntl, "flock", refused)
    elif missing == "memory mapping":
        monkeypatch.setattr(np, "memmap", refused)
    elif missing == "fsync":
        monkeypatch.setattr(os, "fsync", refused)
    else:
        monkeypatch.setattr(store_module, "open", lambda path, mode, **options: NoTruncation(path, mode), raising=False)
    store = Store(tmp_path / "s", 9, {})
    fill(store, data, until=5)
    fill(store, data)
    monkeypatch.setattr(store_module, "open", open, raising=False)
    with_corrupt(tmp_path / "t", data, 3, 40).refill([(3, data[3], 4, 10)])
    for store in (Store(tmp_path / name, 9, {}) for name in "st"):
        assert np.array_equal(store.take(np.array([8, 3, 3])), data[[8, 3, 3]]) and np.array_equal(
            store.row(2), data[2]
        )


def test_a_store_that_cannot_be_read_now_is_not_written_over(tmp_path, monkeypatch):
    """A disk or server that fails for a while loses nothing."""
    fill(Store(tmp_path / "s", 9, {}), rows(9))
    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        store = Store(tmp_path / "s", 9, {})
        assert not store.complete
        with pytest.raises(NotBuilt, match="cannot be written .Input/output error"), store.building():
            pass
    assert Store(tmp_path / "s", 9, {}).complete


def _slow_build(folder, started):
    with Store(folder, 200, {}).building() as writer:
        for row in rows(200)[writer.written :]:
            writer.append(row)
            started.set()
            time.sleep(0.01)


def _fast_build(folder, waited):
    store = Store(folder, 200, {})
    with store.building(lambda text: waited.set()) as writer:
        if writer is not None:
            for row in rows(200)[writer.written :]:
                writer.append(row)


def test_a_second_builder_waits_and_takes_over_from_a_killed_one(tmp_path):
    context = multiprocessing.get_context("fork")
    started, waited = context.Event(), context.Event()
    first = context.Process(target=_slow_build, args=(tmp_path / "s", started))
    second = context.Process(target=_fast_build, args=(tmp_path / "s", waited))
    first.start()
    assert started.wait(10)
    second.start()
    assert waited.wait(10)
    os.kill(first.pid, signal.SIGKILL)
    for process in (first, second):
        process.join(10)
    assert second.exitcode == 0
    assert np.array_equal(Store(tmp_path / "s", 200, {}).take(np.arange(200)), rows(200))


def test_caches_are_listed_and_removed(tmp_path, capsys):
    for name, until in (("pixels-aa", 9), ("features-target-bb", 4)):
        fill(Store(tmp_path / name, 9, {"kind": "pixels", "data": "COCO train2017"}), rows(9), until)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("not a cache")
    caches = ["caches", "--cache-dir", str(tmp_path)]
    assert main(caches) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "incomplete" in printed[0] and "complete" in printed[1]
    assert "pixels-aa  COCO train2017, 9 rows of pixels" in printed[1] and printed[2].endswith(f" used in {tmp_path}")
    assert main([*caches, "--remove", "pixels-a"]) == 2
    assert "has no cache of that name" in capsys.readouterr().err
    assert main([*caches, "--remove", "pixels-aa"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-target-bb", "notes"]
    fill(Store(tmp_path / "features-target-cc", 9, {}), rows(9))
    with Store(tmp_path / "features-target-bb", 9, {}).building():
        assert main([*caches, "--remove", "all"]) == 2
    assert not (tmp_path / "features-target-cc").exists()  # one in use keeps no other
    assert "is being built by another process" in capsys.readouterr().err
    assert main([*caches, "--remove", "all"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_full_disk_is_one_sentence_and_keeps_the_rest(tmp_path):
    store = Store(tmp_path / "s", 9, {})
    with pytest.raises(UserError, match="cannot be written .*free some space or use --cache none"):
        with store.building() as writer:
            writer.append(rows(1)[0])
            writer._rows.close()
            writer._rows = open("/dev/full", "ab", buffering=0)
            writer.append(rows(2)[1])
    assert Store(tmp_path / "s", 9, {}).written == 1
