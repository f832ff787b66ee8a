"""Calls of the segment command that were stopped and go on: nothing is done twice, nothing is lost, memory stays."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from spot_fast import segment
from spot_fast.config import preset
from spot_fast.segmentation import batch, record
from spot_fast.segmentation.record import Record
from spot_fast.segmentation.slot_file import SlotFile
from untrained_runs import TINY, untrained

FILES = ["--coco", "all.json", "--slots-file", "slots.safetensors"]
ALL = ["--masks", "decoder", "--no-overlay", "--batch-size", "2", *FILES]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working folder, with runs/untrained and nine images."""
    untrained(tmp_path / "runs" / "untrained", preset("scenes", **TINY))
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (20, 30 + i, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def segmented(monkeypatch):
    """Names of the images that go through the model."""
    names, finish = [], batch._finish

    def counted(prepared, segments, source, *arguments):
        names.append(source.name)
        return finish(prepared, segments, source, *arguments)

    monkeypatch.setattr(batch, "_finish", counted)
    return names


def contents(folder):
    """Everything that a call wrote."""
    labels = {path.name: path.read_bytes() for path in (folder / "segments").glob("*.png")}
    with safe_open(folder / "slots.safetensors", framework="np") as file:
        return labels, json.loads((folder / "all.json").read_text()), file.metadata(), file.get_tensor("slots").tolist()


def stop_after(monkeypatch, count):
    """Ctrl-C in place of the image after so many."""
    finish, calls = batch._finish, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) > count:
            raise KeyboardInterrupt
        return finish(*arguments)

    monkeypatch.setattr(batch, "_finish", interrupted)


def test_a_stopped_call_goes_on_and_ends_as_a_whole_one(work, segmented, monkeypatch):
    assert segment.main(["images", *ALL]) == 0
    whole = contents(work)
    assert sorted(segmented) == [str(i) for i in range(9)]
    for path in [*(work / "segments").iterdir(), work / "all.json", work / "slots.safetensors"]:
        path.unlink()
    segmented.clear()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert segment.main(["images", *ALL, "--resume", "--workers", "1"]) == 130
    assert not (work / "all.json").exists() and (work / "slots.safetensors.partial").exists()
    before = set(segmented)
    segmented.clear()
    assert 2 <= len(before) < 9
    assert segment.main(["images", *ALL, "--resume"]) == 0
    assert contents(work) == whole and not (work / "slots.safetensors.partial").exists()
    lines = [json.loads(line) for line in (work / "segments" / record.NAME).read_text().splitlines()]
    finished = [line["name"] for line in lines if "name" in line]
    # Those that were written but not yet recorded are done again, and have one line all the same.
    assert sorted(finished) == [str(i) for i in range(9)] and set(segmented) >= {str(i) for i in range(9)} - before


def test_nothing_is_done_again_and_new_images_join(work, segmented, capsys):
    assert segment.main(["images", *ALL]) == 0
    whole = contents(work)
    segmented.clear()
    assert segment.main(["images", *ALL, "--resume"]) == 0
    assert not segmented and contents(work) == whole
    assert "9 of 9 images were done before" in capsys.readouterr().out
    Image.new("RGB", (9, 9), "red").save(work / "images" / "new.png")
    assert segment.main(["images", *ALL, "--resume"]) == 0
    assert segmented == ["new"]
    labels, data, metadata, slots = contents(work)
    assert len(data["images"]) == len(slots) == 10 and json.loads(metadata["images"])[-1] == "new.png"
    assert slots[:9] == whole[3] and data["annotations"][: len(whole[1]["annotations"])] == whole[1]["annotations"]


@pytest.mark.parametrize("change", ["image", "lost", "settings", "model", "other"])
def test_what_changed_is_done_again(work, segmented, change):
    """An image that was written anew, an output that is gone, another option, a run trained anew, and files that a call
    with other settings has replaced."""
    assert segment.main(["images", *ALL]) == 0
    segmented.clear()
    more, expected = [], {"3"}
    if change == "image":
        Image.new("RGB", (30, 20), "red").save(work / "images" / "3.png")
    elif change == "lost":
        (work / "segments" / "3_labels.png").unlink()
    elif change == "other":
        assert segment.main(["images/3.png", "--masks", "decoder", "--no-overlay", "--fit", "interpolate"]) == 0
        segmented.clear()
    else:
        expected = {str(i) for i in range(9)}
        if change == "settings":
            more = ["--fit", "interpolate"]
        else:
            os.utime(work / "runs" / "untrained" / "model.safetensors", (1, 1))
    assert segment.main(["images", *ALL, *more, "--resume"]) == 0
    assert set(segmented) == expected
    labels, data, _, slots = contents(work)
    assert len(labels) == len(data["images"]) == len(slots) == 9


@pytest.mark.slow
def test_killed_again_and_again(work):
    """Killed at any moment by a signal that cannot be caught, the call ends with what an undisturbed one writes."""
    assert segment.main(["images", *ALL]) == 0
    whole = contents(work)
    for path in [*(work / "segments").iterdir(), work / "all.json", work / "slots.safetensors"]:
        path.unlink()
    for i in range(200):  # enough to be killed in the middle
        os.link(work / "images" / f"{i % 9}.png", work / "images" / f"copy_{i:03}.png")
    command = [sys.executable, "-m", "spot_fast.segment", "images", *ALL, "--resume"]
    seen = [0]
    while (code := _killed_after(command, work, least=seen[-1] + 70)) is None:
        seen.append(_recorded(work))
        assert seen[-1] > seen[-2]  # goes on instead of beginning again
    assert code == 0 and len(seen) > 2
    labels, data, _, slots = contents(work)
    names = [image["file_name"] for image in data["images"]]
    assert len(set(names)) == len(names) == len(slots) == len(labels) == 209
    assert all(labels[name] == png for name, png in whole[0].items())
    assert slots[:9] == pytest.approx(np.array(whole[3]), abs=1e-6)


def _recorded(work):
    file = work / "segments" / record.NAME
    return file.read_text().count('"name"') if file.exists() else 0


def _killed_after(command, work, least):
    """None where the process was killed after so many images are recorded, else its exit code."""
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if _recorded(work) >= least:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
        time.sleep(0.01)
    return process.returncode


def test_half_a_line_is_left_behind(tmp_path):
    """A process killed while it wrote a line: the line does not count, and the next one is whole."""
    first = Record(tmp_path, {"fit": "stretch"}, read=False)
    first.add("a" * 32, "1", {"name": "a"})
    first.close()
    with (tmp_path / record.NAME).open("a") as file:
        file.write('{"settings": "' + first.of_settings + '", "key": "bbb')
    again = Record(tmp_path, {"fit": "stretch"}, read=True)
    assert again.has("a" * 32, "1") and not again.has("a" * 32, "2")
    again.add("c" * 32, "1", {"name": "c"})
    again.close()
    for opened in (again, Record(tmp_path, {"fit": "stretch"}, read=True)):
        assert [entry["name"] for entry in opened.entries(["c" * 32, "a" * 32])] == ["c", "a"]
    assert not Record(tmp_path, {"fit": "interpolate"}, read=True).has("a" * 32, "1")


def test_processes_may_share_a_record(tmp_path):
    """Each finds its own lines, whoever wrote in between."""
    one, other = (Record(tmp_path, {"fit": "stretch"}, read=False) for _ in range(2))
    for number in range(3):
        for opened, name in ((one, "a"), (other, "b")):
            opened.add(name * 31 + str(number), "1", {"name": f"{name}{number}"})
    for opened, name in ((one, "a"), (other, "b")):
        opened.close()
        found = opened.entries([name * 31 + str(number) for number in range(3)])
        assert [entry["name"] for entry in found] == [f"{name}{number}" for number in range(3)]


def test_half_a_row_of_slots_is_left_behind(tmp_path):
    target = tmp_path / "slots.safetensors"
    slots = {name * 32: torch.randn(3, 4) for name in "abc"}
    first = SlotFile(target, "s" * 16, read=False)
    for key in ("a" * 32, "b" * 32):
        first.add(key, slots[key])
    first.close()
    partial = tmp_path / "slots.safetensors.partial"
    partial.write_bytes(partial.read_bytes()[:-5])
    again = SlotFile(target, "s" * 16, read=True)
    assert "a" * 32 in again and "b" * 32 not in again
    again.add("c" * 32, slots["c" * 32])
    again.add("a" * 32, slots["a" * 32] + 1)  # an image that changed: the later row counts
    again.finish(["c" * 32, "a" * 32], ["c.jpg", "a.jpg"], "model")
    with safe_open(target, framework="pt") as file:
        assert torch.equal(file.get_tensor("slots"), torch.stack([slots["c" * 32], slots["a" * 32] + 1]))
        assert json.loads(file.metadata()["images"]) == ["c.jpg", "a.jpg"]
    assert "a" * 32 not in SlotFile(target, "t" * 16, read=True)  # of other settings


def test_the_slots_of_a_stopped_call_are_not_lost(work, monkeypatch, capsys):
    """Without --resume the same call would begin anew, over what there is."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert segment.main(["images", *ALL]) == 130
    before = (work / "slots.safetensors.partial").read_bytes()
    assert segment.main(["images", *ALL]) == 2
    assert "has the slots of a stopped call: add --resume, or --overwrite" in capsys.readouterr().err
    assert (work / "slots.safetensors.partial").read_bytes() == before
    assert segment.main(["images", *ALL, "--overwrite"]) == 0


def test_slots_of_others_are_not_overwritten(work, capsys):
    (work / "slots.safetensors").write_bytes(b"someone's")
    assert segment.main(["images", *ALL]) == 2
    assert "holds no slots of the same model: choose another file" in capsys.readouterr().err
    assert (work / "slots.safetensors").read_bytes() == b"someone's" and not (work / "segments").exists()
    assert segment.main(["images", *ALL, "--overwrite", "--resume"]) == 0
    assert len(contents(work)[3]) == 9


def test_a_contact_sheet_is_of_one_call(work, capsys):
    assert segment.main(["images", "--grid", "sheet.png", "--resume"]) == 2
    assert "leave it out, or --resume" in capsys.readouterr().err
