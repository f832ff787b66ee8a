"""Rows on disk: what was written is read, a killed build goes on, damage is noticed, two builders do not collide."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from spot_fast.data.__main__ import main
from spot_fast.data.store import Store
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
    name, keep = {"a row's end": ("rows.bin", 5 * 40 + 11), "an index line's end": ("index.bin", 5 * 32 + 9),
                  "a bit of the last row": ("rows.bin", None)}[loss]  # fmt: skip
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


def test_corrupt_pictures_keep_label_and_reason(tmp_path):
    store = Store(tmp_path / "s", 3, {})
    with store.building() as writer:
        writer.append(rows(1)[0])
        writer.append(np.zeros(0, np.uint8), corrupt=("b.jpg", "is cut off"))
    again = Store(tmp_path / "s", 3, {})
    assert again.corrupt == {1: ("b.jpg", "is cut off")}
    fill(again, rows(3))
    assert again.complete and again.corrupt == {1: ("b.jpg", "is cut off")} and len(again.row(1)) == 0


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
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a cache")
    assert main(["caches", "--cache-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "incomplete" in printed[0] and "complete" in printed[1]
    assert "pixels-aa  COCO train2017, 9 rows of pixels" in printed[1] and printed[2].endswith(f" used in {tmp_path}")
    assert main(["caches", "--cache-dir", str(tmp_path), "--remove", "pixels-a"]) == 2
    assert "has no cache of that name" in capsys.readouterr().err
    assert main(["caches", "--cache-dir", str(tmp_path), "--remove", "pixels-aa"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-target-bb", "mine"]
    with Store(tmp_path / "features-target-bb", 9, {}).building():
        assert main(["caches", "--cache-dir", str(tmp_path), "--remove", "all"]) == 2
    assert "is being built by another process" in capsys.readouterr().err
    assert main(["caches", "--cache-dir", str(tmp_path), "--remove", "all"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_one_sentence_and_keeps_the_rest(tmp_path):
    store = Store(tmp_path / "s", 9, {})
    with pytest.raises(UserError, match="cannot be written .*free some space or use --cache none"):
        with store.building() as writer:
            writer.append(rows(1)[0])
            writer._rows.close()
            writer._rows = open("/dev/full", "ab", buffering=0)
            writer.append(rows(2)[1])
    assert Store(tmp_path / "s", 9, {}).written == 1
